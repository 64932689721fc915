"""What Lightning hands an optimizer in the place of a closure that trains."""

import lightning as L
import pytest
import torch
from fits import Ordinary, fit
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from test_faults import OPTIMIZERS

import hvpopt
from hvpopt.optim.report import Outcome

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]
NAMES = ["newton_cg", "trust_region", "smd", "sophia_g", "adahessian"]
some = pytest.mark.parametrize("name", NAMES)


class Watch(L.Callback):
    """The outcomes of the steps, and the parameters before and after a pass without backward."""

    def __init__(self):
        self.outcomes, self.before, self.after = [], None, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop._skip_backward and self.before is None:
            self.before = [p.detach().clone() for p in module.parameters()]

    def on_train_batch_end(self, trainer, module, *_):
        report = trainer.optimizers[0].last_report
        self.outcomes.append(None if report is None else report.outcome)
        self.after = [p.detach().clone() for p in module.parameters()]


@some
def test_weights_averaged_at_the_end_stay_in_the_pass_for_batch_norm(name, tmp_path):
    watch = Watch()
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    net, _, _ = fit(OPTIMIZERS[name], tmp_path, callbacks=[average, watch], epochs=2)
    assert watch.before is not None
    assert all(map(torch.equal, watch.before, watch.after))
    assert watch.outcomes[-1] is Outcome.SKIPPED
    assert net.num_calls == 12  # the training step ran once for each batch of that pass
    assert int(net.net[1].num_batches_tracked) == 4  # counted from that pass on


@some
def test_a_moving_average_of_the_weights_is_that_of_the_weights(name, tmp_path):
    seen = []

    class Weights(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(module.net[0].weight.detach().clone())

    average = EMAWeightAveraging(decay=0.5)
    net, _, _ = fit(OPTIMIZERS[name], tmp_path, callbacks=[average, Weights()], epochs=1)
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(net.net[0].weight.detach(), expected, rtol=1e-5, atol=1e-6)


class SkipsNearlyAll(Ordinary):
    def training_step(self, batch, batch_idx):
        return None if batch_idx > 0 else super().training_step(batch, batch_idx)


@some
def test_a_training_step_may_skip_as_many_batches_as_it_likes(name, tmp_path):
    def make(params):
        optimizer = OPTIMIZERS[name](params)
        optimizer._max_failures = 2
        return optimizer

    watch = Watch()
    net, _, _ = fit(make, tmp_path, module=SkipsNearlyAll, callbacks=[watch], epochs=2)
    assert net.num_calls == 2
    assert [o is Outcome.SKIPPED for o in watch.outcomes] == [False, True, True, True] * 2


class WithoutClosure(Ordinary):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)["loss"]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize("name", [*NAMES, "handover"])
def test_a_manual_step_without_a_closure_is_explained_at_once(name, tmp_path):
    message = r"step\(\) was called without a closure.*Under manual optimization.*closure=closure"
    with pytest.raises(TypeError, match=message):
        fit(OPTIMIZERS[name], tmp_path, module=WithoutClosure)


def test_a_schedule_of_torchs_own_optimizers_goes_without(tmp_path):
    stages = [hvpopt.Stage(torch.optim.Adam, steps=3), hvpopt.Stage(torch.optim.SGD, lr=0.1)]
    net, _, _ = fit(lambda p: hvpopt.Handover(p, stages), tmp_path, module=WithoutClosure)
    assert net.num_calls == 8
