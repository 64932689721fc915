"""The losses of slices are those of the operator, and cost one run of the network a batch."""

import pytest
import torch
import torch.nn.functional as F
from spectrum_modules import Noisy, Points
from torch import nn

from hvpopt.lightning.spectrum import Label, Settings, measure
from hvpopt.lightning.spectrum.losses import Losses
from hvpopt.lightning.spectrum.retention import fits
from hvpopt.operators import HessianOperator


def loss_of(module, calls=None):
    def loss(batch):
        if calls is not None:
            calls.append(len(batch[0]))
        return module.training_step(batch, 0)

    return loss


def pair(module, data):
    """The losses and the operator, made in the same random state."""
    state = torch.get_rng_state()
    losses = Losses(loss_of(module), list(module.parameters()), data, None)
    torch.set_rng_state(state)
    return losses, HessianOperator(loss_of(module), list(module.parameters()), data)


class Drifting(nn.Module):
    """Counts its runs in a buffer, and lets the loss depend on it."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return self.forward(batch[0], batch[1])

    def forward(self, x, y):
        self.count += 1
        return F.mse_loss(x[:, :2] @ self.w * (1 + 0.1 * self.count), y)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_they_are_the_operators_with_dropout_and_batch_norm_as_they_are(mode):
    module = Noisy().train(mode == "train")
    losses, operator = pair(module, Points().train_dataloader())
    buffers = [b.clone() for b in module.buffers()]
    state = torch.get_rng_state()
    for scale in (1.0, 0.9, 1.1):
        with torch.no_grad():
            module.net[0].weight.mul_(scale)
        for _ in range(2):  # the first call decides how the next ones run
            assert losses().item() == pytest.approx(operator.loss().item(), rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_counts_its_runs_starts_each_batch_anew():
    module = Drifting()

    def loss(batch):
        return module(*batch)

    data = list(Points().train_dataloader())
    losses = Losses(loss, [module.w], data, None)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    expected = F.mse_loss(x[:, :2] @ module.w.detach() * 1.1, y).item()
    for _ in range(3):
        assert losses().item() == pytest.approx(expected, rel=1e-12)
    assert module.count == 0


def test_each_further_loss_is_one_run_a_batch():
    module, calls = Noisy().eval(), []
    data = Points().train_dataloader()
    losses = Losses(loss_of(module, calls), list(module.parameters()), data, None)
    losses()
    calls.clear()
    losses()
    assert calls == [5, 5, 5, 5, 3]


@pytest.mark.parametrize(("limit", "expected"), [(2**30, True), (2**12, False), (2**6, False)])
def test_graphs_are_kept_where_those_of_all_batches_are_small(monkeypatch, limit, expected):
    monkeypatch.setattr("hvpopt.lightning.spectrum.retention.MOST_BYTES", limit)
    module, data = Noisy().eval(), Points().train_dataloader()
    params = list(module.parameters())

    class WithoutLength:
        def __iter__(self):
            return iter(data)

    def make(batches):
        return HessianOperator(loss_of(module), params, batches)

    assert fits(make, params, data) is expected
    assert not fits(make, params, WithoutLength())


def test_a_report_does_not_depend_on_whether_graphs_are_kept():
    options = {"accelerator": "cpu", "progress": False, "num_probes": 2, "density_steps": 2}
    found = []
    for keep in (None, True, False):
        torch.manual_seed(0)
        settings = Settings(retain_graphs=keep, slice_points=3, plane_points=0, **options)
        data = Points()
        found.append(measure(Noisy(), data.train_dataloader(), Label(name="x"), settings))
    values = [[e.value for e in report.top] for report in found]
    assert values[1] == pytest.approx(values[0], rel=1e-9)
    assert values[2] == pytest.approx(values[0], rel=1e-9)
