"""SPENModule's phases: what each trains, its optimizer, resumption, the choice of a checkpoint."""

import lightning
import pytest
import torch
from spen_problems import ADAM, blocks, checkpoint, network, network_of, staged, trainer

from hvpopt.lightning.phases import Phase, active_phase
from hvpopt.nested.losses import EndToEnd, LabelByLabel


def parameters(module):
    return {name: p.detach().clone() for name, p in module.energy.named_parameters()}


class Record(lightning.Callback):
    """Keeps, for each epoch, which parts moved, and the optimizer's options and states."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = parameters(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        after = parameters(pl_module)
        parts = {n.split(".")[0] for n in after if not torch.equal(self.before[n], after[n])}
        (group,) = trainer.optimizers[0].param_groups
        steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
        self.epochs.append((parts, group["lr"], group["weight_decay"], steps))


def test_an_epoch_belongs_to_one_phase():
    phases = list(staged().values())
    assert [active_phase(phases, epoch) for epoch in range(6)] == [0, 1, 1, 2, 2, 2]
    ended = [Phase(LabelByLabel(), 2), Phase(LabelByLabel(), 1)]
    assert [active_phase(ended, epoch) for epoch in range(5)] == [0, 0, 1, 1, 1]


def test_each_phase_trains_its_part_with_its_options_and_a_fresh_optimizer(tmp_path):
    record = Record()
    trainer(tmp_path, 5, callbacks=[record]).fit(network(), datamodule=blocks())
    # three batches an epoch
    assert record.epochs == [
        ({"encoder"}, 1e-2, 0, {3}),
        ({"head"}, 2e-2, 0.01, {3}),
        ({"head"}, 2e-2, 0.01, {6}),
        ({"encoder", "head"}, 1e-3, 0, {3}),
        ({"encoder", "head"}, 1e-3, 0, {6}),
    ]


def test_a_phase_without_options_leaves_the_optimizer_its_own(tmp_path):
    record = Record()
    module = network({"all": Phase(LabelByLabel(), trains="encoder")})
    trainer(tmp_path, 1, callbacks=[record]).fit(module, datamodule=blocks())
    assert record.epochs[0][1:3] == (1e-2, 0)


def test_a_phase_may_be_left_out(tmp_path):
    record = Record()
    phases = staged() | {"head": None}
    trainer(tmp_path, 2, callbacks=[record]).fit(network(phases), datamodule=blocks())
    assert [parts for parts, *_ in record.epochs] == [{"encoder"}, {"encoder", "head"}]


def test_a_schedule_runs_within_a_phase(tmp_path):
    record = Record()
    module = network(scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5))
    trainer(tmp_path, 4, callbacks=[record]).fit(module, datamodule=blocks())
    # the schedule has stepped before the end of the epoch is recorded
    assert [lr for _, lr, *_ in record.epochs] == [0.5e-2, 1e-2, 0.5e-2, 0.5e-3]


class Modes(lightning.Callback):
    def __init__(self):
        self.modes = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            energy = pl_module.energy
            self.modes.append((energy.encoder.training, energy.head.training))


def test_a_frozen_part_is_in_evaluation_mode_also_after_validation(tmp_path):
    modes = Modes()
    trainer(tmp_path, 4, callbacks=[modes]).fit(network(), datamodule=blocks())
    assert modes.modes == [(True, False), (False, True), (False, True), (True, True)]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path, stop):
    whole = network()
    trainer(tmp_path, 5, enable_checkpointing=False).fit(whole, datamodule=blocks())
    first = checkpoint(tmp_path)
    trainer(tmp_path, stop, callbacks=[first]).fit(network(), datamodule=blocks())
    resumed = network(seed=1)
    trainer(tmp_path, 5, callbacks=[checkpoint(tmp_path)]).fit(
        resumed, datamodule=blocks(), ckpt_path=first.last_model_path, weights_only=True
    )
    for (name, ours), theirs in zip(
        resumed.energy.state_dict().items(), whole.energy.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_checkpoint_is_chosen_among_phases_that_predict_like_the_last(tmp_path):
    keep = checkpoint(tmp_path)
    run = trainer(tmp_path, 3, callbacks=[keep])
    module = network(staged(classifier=0.1, head=1e-9))  # the classifier's phase scores the most
    run.fit(module, datamodule=blocks())
    assert torch.load(keep.best_model_path, weights_only=True)["phase_index"] == 1
    assert keep.best_model_score == pytest.approx(float(run.callback_metrics["val/f1"]), abs=0.2)


def test_the_classifiers_phase_is_no_candidate(tmp_path):
    run = trainer(tmp_path, 1)
    run.fit(network(), datamodule=blocks())
    assert run.callback_metrics["val/candidate"].isnan()
    assert run.callback_metrics["val/f1"] > 0


def test_what_was_frozen_before_stays_frozen_and_the_rest_is_thawed_at_the_end(tmp_path):
    module = network()
    frozen = module.energy.encoder.hidden[0].weight.requires_grad_(False)
    module = network_of(module.energy)
    before = frozen.clone()
    trainer(tmp_path, 4).fit(module, datamodule=blocks())
    assert torch.equal(frozen, before)
    left = [name for name, p in module.energy.named_parameters() if not p.requires_grad]
    assert left == ["encoder.hidden.0.weight"]
    assert all(part.training for part in module.energy.modules())


def test_a_strategy_that_knows_of_unused_parameters_passes(tmp_path):
    module = network()
    strategy = "ddp_find_unused_parameters_true"
    module.trainer = trainer(tmp_path, 1, strategy=strategy, devices=1)
    module.setup("fit")


# --- refusals


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: network({}), "phases is empty"),
        (lambda: network({"a": None}), "phases is empty"),
        (
            lambda: network({"a": Phase(LabelByLabel()), "b": Phase(LabelByLabel())}),
            r"phases\.a has no number of epochs",
        ),
        (
            lambda: network({"only": Phase(EndToEnd())}, minimizer=None),
            r"phases\.only has the loss EndToEnd, which needs inference; give a minimizer",
        ),
        (lambda: Phase(LabelByLabel(), 0), "epochs=0 is out of range"),
        (lambda: Phase(LabelByLabel(), trains="tail"), "trains='tail' is unknown"),
        (lambda: Phase(LabelByLabel(), lr=-1), "lr=-1 is out of range"),
        (lambda: Phase(LabelByLabel(), weight_decay=-1), "weight_decay=-1 is out of range"),
    ],
)
def test_mistakes_are_refused_at_once(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_part_without_parameters_cannot_be_trained(tmp_path):
    module = network({"head": Phase(EndToEnd(), trains="head")}, ADAM)
    module.energy.head = torch.nn.Identity()
    with pytest.raises(ValueError, match="trains 'head' of the energy, where no parameter req"):
        trainer(tmp_path, 1).fit(module, datamodule=blocks())
