"""How the losses of batches combine, where torch's loss function says it and where it does not."""

import pytest
import torch
import torch.nn.functional as F
from spectrum_modules import Points, Regression

from hvpopt.lightning.spectrum import Label, Settings, measure
from hvpopt.operators import UnknownReductionError

FEW = {"slice_points": 3, "plane_points": 0, "num_probes": 2, "density_steps": 2}


class Other(Regression):
    """The regression's first layer with a loss of its own, of outputs and targets in rows."""

    def __init__(self, loss):
        super().__init__()
        del self.second
        self.loss = loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.first(batch[0][:, :3]), batch[1][:, None])


def measured(loss, data=None, **options):
    data = data or Points()
    chosen = Settings(accelerator="cpu", progress=False, rtol=1e-10, num_top=2, **FEW, **options)
    loader = data.train_dataloader()
    return measure(Other(loss), loader, Label(name="x"), chosen, datamodule=data)


def whole(loss):
    """The loss of all points as one batch, and the extreme eigenvalues of its Hessian."""
    x, y = Points().points

    def of(w):
        return loss(x[:, :3] @ w[:, None], y[:, None])

    w = Other(loss).first.weight.detach()[0]
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(of, w))
    return of(w).item(), values.flip(0)[:2].tolist()


def squares(z, y):
    return (z - y) ** 4


LOSSES = {
    "torch's mean": (lambda z, y: F.mse_loss(z, y), "that torch's loss function averages"),
    "labels summed": (
        lambda z, y: F.binary_cross_entropy_with_logits(z, (y > 0).to(z), reduction="sum") / len(y),
        "weighed by their examples, over which they are means",
    ),
    "a mean by hand": (lambda z, y: squares(z, y).mean(), "examples, over which they are means"),
    "parts": (
        lambda z, y: F.mse_loss(z, y) + F.mse_loss(z.repeat(1, 2), 2 * y.repeat(1, 2)),
        "examples, over which they are means",
    ),
    "a sum by hand": (lambda z, y: squares(z, y).sum(), "added up, as they are sums over examples"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_batches_of_unequal_size_give_the_loss_of_the_joined_batch(kind):
    loss, text = LOSSES[kind]
    report = measured(loss)
    value, eigenvalues = whole(loss)
    assert report.weights.endswith(text)
    assert report.loss == pytest.approx(value, rel=1e-10)
    assert [e.value for e in report.top] == pytest.approx(eigenvalues, rel=1e-8)
    for line in report.slices:
        assert line.losses[1] == pytest.approx(value, rel=1e-10)


def test_what_is_no_mean_over_examples_is_weighed_by_them_and_the_report_says_so():
    report = measured(lambda z, y: squares(z, y).mean().sqrt())
    assert report.weights == ("weighed by their examples, though they are no plain means over them")
    again = measured(lambda z, y: squares(z, y).mean().sqrt(), weights="examples")
    assert again.weights == "weighed by their examples"
    assert again.top == report.top


def test_a_choice_goes_before_what_the_call_says():
    mean, summed = (measured(LOSSES["torch's mean"][0], weights=w) for w in ("auto", "sum"))
    assert summed.weights == "added up"
    assert summed.loss == pytest.approx(5 * mean.loss, rel=0.3)  # five batches, of unequal size


def test_one_batch_needs_no_weight():
    report = measured(lambda z, y: squares(z, y).mean().sqrt(), num_batches=1)
    assert report.weights == ""


def test_losses_that_cannot_be_taken_apart_are_weighed_by_their_examples():
    sizes = []

    def whole_batches_only(z, y):
        sizes.append(len(z))
        if len(z) == 4:
            raise ValueError("no batch of four")
        return squares(z, y).mean()

    report = measured(whole_batches_only)
    assert 4 in sizes
    assert report.weights == "weighed by their examples"


def test_batches_without_rows_are_refused_with_what_to_do():
    class Scalars(Points):
        def train_dataloader(self):
            return [torch.tensor(1.0).double(), torch.tensor(2.0).double()]

    def measured_with(**options):
        module = Other(None)
        module.training_step = lambda batch: (module.first.weight * batch).square().sum()
        return measure(
            module, Scalars().train_dataloader(), Label(name="x"),
            Settings(accelerator="cpu", progress=False, **FEW, **options),
        )  # fmt: skip

    with pytest.raises(UnknownReductionError, match="give num_terms="):
        measured_with()
    with pytest.raises(UnknownReductionError, match=r"choose weights='sum' \(task.weights=sum\)"):
        measured_with(weights="examples")
    weight = Other(None).first.weight.detach()
    assert measured_with(weights="sum").loss == pytest.approx(5 * weight.square().sum().item())
