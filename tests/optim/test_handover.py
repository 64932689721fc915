import copy
import io
import logging
import math
import pickle
from functools import partial
from pathlib import Path

import hydra
import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from problems import closure_of, flat, problem
from test_ddp import in_two_processes
from torch import nn
from torch.optim import LBFGS as TorchLBFGS
from torch.optim import SGD, Adam, Muon
from torch.utils.data import DataLoader, TensorDataset

import hvpopt
from hvpopt.lightning.callbacks import OptimizerMonitor
from hvpopt.optim.handover import Handover
from hvpopt.optim.newton_cg import NewtonCG
from hvpopt.optim.report import NewtonCGReport
from hvpopt.optim.smd import SMD
from hvpopt.optim.sophia import SophiaG
from hvpopt.optim.stages import Stage

LBFGS = partial(TorchLBFGS, max_iter=4, line_search_fn="strong_wolfe")


def schedule():
    return [
        Stage(Adam, steps=3, lr=1e-2),
        Stage(LBFGS, steps=2),
        Stage(SophiaG, steps=5, update_every=3),
        Stage(NewtonCG, damping=0.1, max_cg_steps=5),
    ]


def run(optimizer, task, num_steps):
    closure = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    return [float(optimizer.step(closure).detach()) for _ in range(num_steps)]


def test_the_steps_are_those_of_the_optimizers_one_after_the_other():
    ours, theirs = problem("dropout"), problem("dropout")
    optimizer = Handover(ours.params, schedule())
    torch.manual_seed(1)
    losses = run(optimizer, ours, 13)
    torch.manual_seed(1)
    expected = []
    for make, num_steps in (
        (partial(Adam, lr=1e-2), 3),
        (LBFGS, 2),
        (partial(SophiaG, update_every=3), 5),
        (partial(NewtonCG, damping=0.1, max_cg_steps=5), 3),
    ):
        expected += run(make(theirs.params), theirs, num_steps)
    assert losses == expected
    assert torch.equal(flat(ours.params), flat(theirs.params))


def test_each_stage_calls_the_closure_as_it_does_alone():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=2), Stage(LBFGS, steps=1), Stage(SGD)])
    calls = []

    def loss():
        calls.append(1)
        return task.loss(task.net(task.x))

    counts = []
    for _ in range(4):
        calls.clear()
        optimizer.step(closure_of(optimizer, loss))
        counts.append(len(calls))
    assert counts[:2] == [1, 1]
    assert 2 <= counts[2] <= 5  # up to max_eval = 4 · 5/4
    assert counts[3] == 1


def scripted(losses):
    """A closure whose loss follows a script, whatever the parameters are."""
    w = nn.Parameter(torch.zeros(1))
    script = iter(losses)

    def closure():
        w.grad = None
        loss = w.sum() + next(script)
        loss.backward()
        return loss

    return w, closure


def num_steps_of_first_stage(losses, **options):
    w, closure = scripted(losses)
    optimizer = Handover([w], [Stage(SGD, lr=0.0, **options), Stage(SGD, lr=0.0)])
    for step in range(len(losses)):
        before = optimizer.optimizer
        optimizer.step(closure)
        if optimizer.optimizer is not before:
            return step
    return None


def test_a_stage_ends_when_the_mean_loss_of_a_window_falls_too_little():
    falling = [8, 8, 4, 4, 2, 2, 1, 1]
    assert num_steps_of_first_stage(falling, stall_tolerance=0.5, stall_window=2) == 4
    assert num_steps_of_first_stage(falling, stall_tolerance=0.49, stall_window=2) is None
    noisy = [8, 0, 4, 3, 2, 4, 2, 4, 9]  # means 4, 3.5, 3, 3
    assert num_steps_of_first_stage(noisy, stall_tolerance=0, stall_window=2) == 8
    assert num_steps_of_first_stage(noisy, stall_tolerance=0.13, stall_window=2) == 4
    negative = [-1, -2, -2.1, -2.1]
    assert num_steps_of_first_stage(negative, stall_tolerance=0.1, stall_window=1) == 3
    both = [8, 4, 2, 1, 0.5]
    assert num_steps_of_first_stage(both, steps=3, stall_tolerance=0, stall_window=1) == 3


def test_a_window_with_a_loss_that_is_not_finite_is_left_out():
    losses = [4, 4, math.nan, 1, math.inf, 1, 3, 3, 3, 3, 0]  # means 4, –, –, 3, 3
    assert num_steps_of_first_stage(losses, stall_tolerance=0.1, stall_window=2) == 10


def test_a_hand_over_writes_one_line(caplog):
    caplog.set_level(logging.INFO, logger="hvpopt")
    w, closure = scripted([2.0] * 6)
    stages = [
        Stage(SGD, steps=2, lr=0),
        Stage(Adam, stall_tolerance=0.1, stall_window=1),
        Stage(SGD),
    ]
    optimizer = Handover([w], stages)
    for _ in range(6):
        optimizer.step(closure)
    assert [record.getMessage() for record in caplog.records] == [
        "Adam takes over from SGD after 2 steps.",
        "SGD takes over from Adam after 2 steps (its loss stalled at 1.999).",
    ]


def test_the_state_of_a_stage_that_is_over_is_freed():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=2), Stage(SGD, lr=0.1, momentum=0.9)])
    run(optimizer, task, 2)
    first = optimizer.optimizer
    assert len(first.state) == len(task.params)
    run(optimizer, task, 1)
    assert len(first.state) == 0
    assert optimizer.state is optimizer.optimizer.state
    assert set(optimizer.state[task.params[0]]) == {"momentum_buffer"}


@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy", "pickle"])
@pytest.mark.parametrize("num_steps", [0, 2, 3, 4, 7, 11])
def test_a_run_resumed_in_any_stage_continues_bit_for_bit(num_steps, how):
    torch.manual_seed(0)
    whole = problem("dropout", torch.float32)
    one = Handover(whole.params, schedule())
    run(one, whole, num_steps)
    random, params = torch.get_rng_state(), [p.detach().clone() for p in whole.params]
    if how == "deepcopy":
        part, two = copy.deepcopy((whole, one))
    elif how == "pickle":
        part = problem("dropout", torch.float32)
        part.net, two = pickle.loads(pickle.dumps((whole.net, one)))
    else:
        part = problem("dropout", torch.float32)
        two = Handover(part.params, schedule())
        saved = copy.deepcopy(one.state_dict())
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        two.load_state_dict(saved)
        with torch.no_grad():
            for p, value in zip(part.params, params, strict=True):
                p.copy_(value)
    torch.set_rng_state(random)
    expected = run(one, whole, 6)
    torch.set_rng_state(random)
    assert run(two, part, 6) == expected
    assert torch.equal(flat(whole.params), flat(part.params))


def test_a_stall_that_was_seen_before_the_checkpoint_counts_after_it():
    stages = [Stage(SGD, lr=0.0, stall_tolerance=0.1, stall_window=2), Stage(SGD, lr=0.0)]
    w, closure = scripted([1.0] * 8)
    whole = Handover([w], stages)
    for num_steps in (1, 2, 3, 4):
        whole.step(closure)
        again = Handover([w], stages)
        again.load_state_dict(copy.deepcopy(whole.state_dict()))
        for step in range(num_steps, 5):
            assert again.optimizer is again._optimizers[0], step
            again.step(closure_of(again, lambda: w.sum() + 1))
        assert again.optimizer is again._optimizers[1]


def test_the_report_is_that_of_the_stage():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=1), Stage(NewtonCG)])
    run(optimizer, task, 1)
    assert optimizer.last_report is None
    assert optimizer.num_products == 0
    run(optimizer, task, 1)
    assert isinstance(optimizer.last_report, NewtonCGReport)
    assert optimizer.num_products == optimizer.last_report.num_products > 0


def test_a_scheduler_acts_on_the_first_stage_alone():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=3, lr=0.1), Stage(SGD, lr=0.5)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    seen = []
    for _ in range(5):
        run(optimizer, task, 1)
        seen.append(optimizer.optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert seen == pytest.approx([0.1, 0.01, 0.001, 0.5, 0.5])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)


def test_one_cycle_finds_the_first_stages_momentum():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=3), Stage(SGD)])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    betas = optimizer.optimizer.param_groups[0]["betas"]
    run(optimizer, task, 1)
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["betas"] != betas


def test_options_of_a_group_go_to_every_stage_but_its_learning_rate_to_the_first():
    task = problem("mlp")
    groups = [
        {"params": task.params[:2], "weight_decay": 0.1, "lr": 0.3},
        {"params": iter(task.params[2:])},
    ]
    optimizer = Handover(groups, [Stage(Adam, steps=1, lr=0.2), Stage(NewtonCG)])
    first, second = optimizer._optimizers
    assert [g["lr"] for g in first.param_groups] == [0.3, 0.2]
    assert [g["lr"] for g in second.param_groups] == [1.0, 1.0]
    assert [g["weight_decay"] for g in first.param_groups] == [0.1, 0]
    assert [g["weight_decay"] for g in second.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups is first.param_groups
    run(optimizer, task, 3)


def test_named_parameters_keep_their_names():
    task = problem("mlp")
    optimizer = Handover(task.net.named_parameters(), [Stage(Adam, steps=1), Stage(SMD)])
    for stage in optimizer._optimizers:
        assert stage.param_groups[0]["param_names"][0] == "0.weight"


def test_a_late_group_trains_in_every_stage_and_a_refused_one_leaves_no_trace():
    task = problem("mlp")
    optimizer = Handover(task.params[:2], [Stage(Adam, steps=2), Stage(SMD, lr=0.01)])
    run(optimizer, task, 1)
    with pytest.raises(TypeError, match=r"Parameter number 0 has dtype torch\.complex64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, dtype=torch.complex64))]})
    assert [len(o.param_groups) for o in optimizer._optimizers] == [1, 1]
    optimizer.add_param_group({"params": iter(task.params[2:]), "lr": 0.05})
    assert [g["lr"] for g in optimizer._optimizers[0].param_groups] == [1e-3, 0.05]
    assert [g["lr"] for g in optimizer._optimizers[1].param_groups] == [0.01, 0.01]
    for _ in range(3):
        before = task.params[-1].detach().clone()
        run(optimizer, task, 1)
        assert not torch.equal(task.params[-1], before)


def test_a_late_group_is_refused_where_lbfgs_would_fail_on_it_later():
    task = problem("mlp")
    optimizer = Handover(task.params[:2], [Stage(Adam, steps=2), Stage(LBFGS)])
    with pytest.raises(ValueError, match="LBFGS, which has one parameter group only"):
        optimizer.add_param_group({"params": task.params[2:]})


def test_zero_grad_clears_every_gradient():
    task = problem("mlp")
    optimizer = Handover(task.params, schedule())
    task.closure()()
    optimizer.zero_grad()
    assert all(p.grad is None for p in task.params)


def test_hooks_of_the_step_are_called_once_in_every_stage():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=1), Stage(NewtonCG)])
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    run(optimizer, task, 2)
    assert called == ["before", "after"] * 2


def test_hooks_of_the_state_are_called():
    task = problem("mlp")
    optimizer = Handover(task.params, schedule())
    called = []
    optimizer.register_state_dict_pre_hook(lambda o: called.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: called.append(s["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda o: called.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["save", 1, "loaded"]


def test_the_state_of_another_schedule_is_refused():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=1), Stage(NewtonCG)])
    other = Handover(task.params, [Stage(Adam, steps=1), Stage(SMD)])
    with pytest.raises(ValueError, match=r"\['Adam', 'SMD'\], and this is a Handover of \['Adam',"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="The state is of no Handover"):
        optimizer.load_state_dict(Adam(task.params).state_dict())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: [], ValueError, r"stages=\[\]: expected at least one"),
        (lambda w: [Adam], TypeError, r"stages\[0\] is a type, expected a hvpopt\.Stage"),
        (lambda w: [Stage(Adam), Stage(SGD)], ValueError, r"stages\[0\] never hands over"),
        (lambda w: [Stage(Adam, steps=3)], ValueError, r"stages\[0\] is the last stage and has"),
        (lambda w: {"a": None}, ValueError, r"stages={'a': None}: expected at least one"),
        (lambda w: {"a": Stage(Adam), "b": Stage(SGD)}, ValueError, r"stages\['a'\] never hands"),
        (lambda w: [Stage(Adam, steps=0)], ValueError, "steps=0 is out of range"),
        (lambda w: [Stage(Adam, stall_tolerance=-1)], ValueError, "stall_tolerance=-1 is out of"),
        (lambda w: [Stage(Adam, stall_window=0)], ValueError, "stall_window=0 is out of range"),
        (lambda w: [Stage(Adam([w]))], TypeError, "got a Adam, expected a class such as"),
        (lambda w: [Stage(lambda groups: groups)], TypeError, "A stage made a list, expected"),
        (lambda w: [Stage(Adam, momentum=1)], TypeError, "unexpected keyword argument 'momentum'"),
        (lambda w: [Stage(Adam, steps=1), Stage(SMD, lr=-1)], ValueError, "lr=-1 is out of range"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_at_once(make, error, message):
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(error, match=message):
        Handover([w], make(w))


def test_a_stage_that_watches_the_loss_needs_a_closure():
    w = nn.Parameter(torch.ones(1))
    optimizer = Handover([w], [Stage(Adam, stall_tolerance=0.1), Stage(SGD)])
    with pytest.raises(TypeError, match="the stage Adam ends when its loss stalls"):
        optimizer.step()
    optimizer = Handover([w], [Stage(Adam, steps=1), Stage(SGD)])
    w.grad = torch.ones(1)
    assert optimizer.step() is None


def test_other_optimizers_of_torch_take_part():
    torch.manual_seed(0)
    net = nn.Linear(3, 2, bias=False)
    optimizer = Handover(net.parameters(), [Stage(Muon, steps=2), Stage(NewtonCG)])
    x = torch.randn(5, 3)
    loss = closure_of(optimizer, lambda: F.mse_loss(net(x), x[:, :2]))
    assert [optimizer.step(loss) for _ in range(4)][-1] < 1e-3


def test_it_says_which_stage_is_current():
    w, closure = scripted([1.0] * 2)
    optimizer = Handover([w], [Stage(Adam, steps=1), Stage(SGD)])
    assert "* Adam (" in repr(optimizer)
    optimizer.step(closure)
    optimizer.step(closure)
    assert "  Adam (" in repr(optimizer)
    assert "* SGD (" in repr(optimizer)


def test_the_configuration_makes_a_schedule():
    config = OmegaConf.load(Path(hvpopt.__file__).parents[1] / "conf/optimizer/handover.yaml")
    task = problem("mlp")
    optimizer = hydra.utils.instantiate(config, _convert_="all")(task.params)
    assert [type(o).__name__ for o in optimizer._optimizers] == ["Adam", "LBFGS", "NewtonCG"]
    assert [stage.steps for stage in optimizer._stages] == [1000, None, None]
    run(optimizer, task, 1)
    config.stages.lbfgs = None
    optimizer = hydra.utils.instantiate(config, _convert_="all")(task.params)
    assert [type(o).__name__ for o in optimizer._optimizers] == ["Adam", "NewtonCG"]


def _steps_before_the_hand_over(rank):
    net = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    script = iter([[1.0] * 7, [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125]][rank])
    stages = [Stage(SGD, lr=0.0, stall_tolerance=0.3, stall_window=1), Stage(SGD, lr=0.0)]
    optimizer = Handover(net.parameters(), stages)
    loss = closure_of(optimizer, lambda: 0 * net(torch.ones(1, 1)).sum() + next(script))
    steps = 0
    while optimizer._position.stage == 0:
        optimizer.step(loss)
        steps += 1
    both = [torch.tensor(0), torch.tensor(0)]
    dist.all_gather(both, torch.tensor(steps))
    return both


@pytest.mark.slow  # two processes that import Lightning
def test_ranks_hand_over_in_the_same_step_by_the_mean_of_their_losses(tmp_path):
    """The means fall by 44, 40, 33 and 25 percent; alone, the first rank's would not fall."""
    assert in_two_processes(_steps_before_the_hand_over, tmp_path) == [6, 6]


class Module(L.LightningModule):
    """An ordinary module."""

    def __init__(self, scheduler=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.scheduler = scheduler
        self.calls = []

    def training_step(self, batch):
        self.calls.append(self.trainer.global_step)
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = Handover(
            self.parameters(),
            [
                Stage(Adam, steps=3, lr=1e-2),
                Stage(LBFGS, steps=2),
                Stage(SophiaG, steps=3, update_every=2),
                Stage(NewtonCG, max_cg_steps=5),
            ],
        )
        return [optimizer], [] if self.scheduler is None else [self.scheduler(optimizer)]


def fit(tmp_path, name, num_epochs=4, *, resume=None, module=None, callbacks=(), **options):
    L.seed_everything(2, verbose=False)
    x = torch.randn(8, 6).repeat(3, 1)  # Lightning begins an interrupted epoch anew
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)
    module = Module() if module is None else module
    checkpoints = ModelCheckpoint(
        tmp_path / name / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=1
    )
    trainer = L.Trainer(
        max_epochs=num_epochs, accelerator="cpu", logger=CSVLogger(tmp_path, name=name),
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[checkpoints, *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=None if resume is None else True)
    return module, trainer


lightning_fit = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:Experiment logs directory",
    "ignore:The dirpath has changed",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)


@lightning_fit
@pytest.mark.parametrize("step", [2, 3, 4, 7, 10])
def test_lightning_resumes_in_every_stage_bit_for_bit(tmp_path, step):
    whole, trainer = fit(tmp_path, "whole")
    assert trainer.global_step == 12
    again, resumed = fit(
        tmp_path, "again", resume=tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
    )
    assert resumed.global_step == 12
    assert min(again.calls) == step
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    position = [t.optimizers[0]._position for t in (trainer, resumed)]
    assert position[0] == position[1]
    assert (position[0].stage, position[0].num_steps) == (3, 4)


@lightning_fit
def test_lightning_runs_the_training_step_as_often_as_each_stage_asks(tmp_path):
    module, trainer = fit(tmp_path, "run", callbacks=[OptimizerMonitor()])
    counts = [module.calls.count(step) for step in range(12)]
    assert counts[:3] == [1, 1, 1]
    assert all(2 <= count <= 5 for count in counts[3:5])
    assert type(trainer.optimizers[0]) is Handover
    assert trainer.progress_bar_metrics["cg_steps"] > 0


@lightning_fit
@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 1.0}])
def test_smoke_the_loss_falls_under_lightnings_options(tmp_path, options):
    _, trainer = fit(tmp_path, "run", 20, **options)
    assert trainer.optimizers[0]._position.stage > 1
    assert trainer.callback_metrics["loss"] < 0.6


@lightning_fit
def test_lightnings_monitor_shows_the_learning_rate_of_the_current_stage(tmp_path):
    scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    monitor = LearningRateMonitor("step")
    fit(tmp_path, "run", module=Module(scheduler), callbacks=[monitor])
    assert monitor.lrs["lr-Handover"][:4] == [0.01, 0.01, 0.01, 0.005]
    assert set(monitor.lrs["lr-LBFGS"]) == {1}
    assert set(monitor.lrs["lr-NewtonCG"]) == {1.0}


def test_a_stage_says_what_it_is():
    assert repr(Stage(torch.optim.Adam, steps=3, lr=0.1)) == "Stage(Adam, steps=3, lr=0.1)"
