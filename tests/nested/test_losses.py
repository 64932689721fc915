"""Losses of energies against closed forms and loops written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from toy_energies import Bowl, Slope, descent, gradient, rows, toy

from hvpopt.nested import Box, MirrorDescent
from hvpopt.nested.energies import spen
from hvpopt.nested.losses import (
    Contrastive,
    DeepValue,
    EndToEnd,
    LabelByLabel,
    Minimizer,
    Ranking,
    StructuredHinge,
    log_loss,
    soft_f1,
    soft_f1_loss,
    squared_loss,
)

# --- task losses


def test_soft_f1_of_labels_is_scikit_learns_f1():
    y, target = (torch.rand(2, 30, 5, generator=torch.Generator().manual_seed(0)) > 0.6).double()
    expected = [
        f1_score(t, p, zero_division=1.0) for p, t in zip(y.numpy(), target.numpy(), strict=True)
    ]
    torch.testing.assert_close(soft_f1(y, target), torch.tensor(expected, dtype=torch.float64))


def test_soft_f1_between_labels_is_the_relaxation_by_the_smaller_and_the_larger():
    y, target = torch.tensor([[0.5, 0.2, 0.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    overlap, union = 0.5, 1.0 + 0.2 + 1.0
    assert soft_f1(y, target).item() == pytest.approx(2 * overlap / (overlap + union))
    assert soft_f1_loss(y, target).item() == pytest.approx(1 - 2 * overlap / (overlap + union))


def test_outputs_without_labels_are_right_where_none_was_wanted():
    y = torch.tensor([[0.0, 0.0], [0.0, 0.4]])
    assert soft_f1(y, torch.zeros(2, 2)).tolist() == [1.0, 0.0]


def test_squared_and_log_loss_by_hand():
    y, target = torch.tensor([[0.25, 0.5]]), torch.tensor([[1.0, 0.0]])
    assert squared_loss(y, target).item() == pytest.approx(0.75**2 + 0.5**2)
    assert log_loss(y, target).item() == pytest.approx(-math.log(0.25) - math.log(0.5))
    wrong = log_loss(torch.tensor([[0.0]], dtype=torch.float64), torch.ones(1, 1))
    assert wrong.item() == pytest.approx(-math.log(1e-6))


# --- classification


def test_label_by_label_is_the_binary_cross_entropy_of_the_scores():
    energy, (x, target) = toy(Slope()), rows()
    p = torch.sigmoid(energy.encoder(x)["scores"])
    for smoothing in (0.0, 0.2):
        t = target * (1 - smoothing) + smoothing / 2
        expected = -(t * p.log() + (1 - t) * (1 - p).log()).sum() / len(x)
        value = LabelByLabel(smoothing=smoothing)(energy, x, target, None)
        torch.testing.assert_close(value.loss, expected)
        assert value.inference is None


# --- end to end


@pytest.mark.parametrize("adjoint", ["unrolled", "back_optimization"])
def test_the_last_iterate_has_the_closed_form_of_gradient_descent(adjoint):
    energy, (x, target) = toy(Bowl(1.0)), rows()
    value = EndToEnd(task_loss="squared")(energy, x, target, descent(adjoint=adjoint))
    s, left = energy.encoder(x)["scores"], 0.8**4
    y = s + left * (0.25 - s)
    expected = (y - target).square().sum(1).mean()
    torch.testing.assert_close(value.loss, expected)
    torch.testing.assert_close(gradient(value.loss, energy), gradient(expected, energy))
    torch.testing.assert_close(value.figures["task_loss"], expected.detach())


def test_all_iterates_count_the_more_the_later():
    energy, (x, target) = toy(Bowl(1.0)), rows()
    value = EndToEnd(task_loss="squared", iterates="all")(energy, x, target, descent(num_steps=3))
    s = energy.encoder(x)["scores"]
    terms = [
        (s + 0.8**t * (0.25 - s) - target).square().sum(1).mean() / (3 - t + 1) for t in (1, 2, 3)
    ]
    expected = sum(terms) / (1 + 1 / 2 + 1 / 3)
    torch.testing.assert_close(value.loss, expected)
    torch.testing.assert_close(gradient(value.loss, energy), gradient(expected, energy))


def test_inference_may_start_at_the_first_guess_or_in_the_middle():
    energy, (x, target) = toy(Bowl(1.0)), rows()
    initial = energy.initial(energy.encoder(x)).detach()
    for start, expected in (("initial", initial), ("center", torch.full_like(initial, 0.5))):
        minimizer = descent(1e-9, 1, start=start, domain=Box())
        value = EndToEnd()(energy, x, target, minimizer)
        torch.testing.assert_close(value.inference.y, expected)


# --- hinge


def test_the_hinge_is_of_the_most_offending_output():
    # E − w Δ = a/2 ‖y − s‖² − w ‖y − y*‖² is smallest at (a s − 2 w y*) / (a − 2 w).
    energy, (x, target) = toy(Bowl(3.0)), rows()
    value = StructuredHinge(scale=0.5)(energy, x, target, descent(0.3, 200))
    s = energy.encoder(x)["scores"].detach()
    y = (3 * s - target) / 2
    torch.testing.assert_close(value.inference.y, y)
    gaps = 0.5 * (y - target).square().sum(1) - 1.5 * (y - s).square().sum(1)
    gaps += 1.5 * (target - s).square().sum(1)
    assert (gaps > 0).all()
    torch.testing.assert_close(value.loss.detach(), gaps.mean())
    by_scores = 3 * (y - target) / len(x)  # of −E(ŷ) + E(y*), with ŷ held
    torch.testing.assert_close(gradient(value.loss, energy), by_scores.T @ x)
    assert value.figures["violated"] == 1


def test_a_right_output_that_lies_low_enough_costs_nothing():
    energy, (x, target) = toy(Bowl(8.0)), rows()
    x = torch.linalg.lstsq(energy.encoder.weight.detach(), target.T).solution.T  # s(x) near y*
    scores = energy.encoder(x)["scores"]
    value = StructuredHinge(scale=0.1)(energy, x, scores.detach(), descent(0.1, 100))
    assert value.loss.item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("task_loss", ["squared", "log"])
def test_the_hinge_counts_the_entropy_of_the_domain_as_energy(task_loss):
    energy, (x, target) = toy(Slope(), scale=0.2), rows()
    minimizer = Minimizer(method=MirrorDescent(0.3, 100), domain=Box(entropy=2.0))
    value = StructuredHinge(task_loss=task_loss, scale=0.2)(energy, x, target, minimizer)
    y, s = value.inference.y, energy.encoder(x)["scores"].detach()
    if task_loss == "squared":
        wrong, slope = (y - target).square().sum(1), 2 * (y - target)
    else:
        wrong = F.binary_cross_entropy(y, target, reduction="none").sum(1)
        slope = (y - target) / (y * (1 - y))
    # stationary: −s + 2 logit(y) − 0.2 ∂Δ/∂y = 0
    torch.testing.assert_close(2 * torch.logit(y), s + 0.2 * slope, rtol=1e-5, atol=1e-5)
    entropy = (torch.special.entr(y) + torch.special.entr(1 - y)).sum(1)
    gaps = 0.2 * wrong + ((y - target) * s).sum(1) + 2 * entropy
    torch.testing.assert_close(value.loss.detach(), gaps.clamp_min(0).mean())


# --- a network, refusals


@pytest.mark.parametrize(
    "loss",
    [
        EndToEnd(),
        EndToEnd(iterates="all"),
        StructuredHinge(),
        DeepValue(),
        Ranking(),
        Contrastive(),
    ],
)
def test_every_loss_trains_both_parts_of_a_network(loss):
    torch.manual_seed(0)
    energy, (x, target) = spen(3, 4, widths=[5], conditional=True).double(), rows()
    minimizer = Minimizer(method=MirrorDescent(0.3, 5), domain=Box(entropy=1.0))
    assert loss.needs_inference
    for step in range(4):
        loss(energy, x, target, minimizer, step=step).loss.backward()
    for name, p in energy.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EndToEnd(task_loss="cubic"), "task_loss='cubic' is unknown; expected one of squ"),
        (lambda: EndToEnd(iterates="first"), "iterates='first' is unknown"),
        (lambda: StructuredHinge(task_loss="soft_f1"), "expected one of squared, log"),
        (lambda: StructuredHinge(scale=0), "scale=0 is out of range"),
        (lambda: LabelByLabel(smoothing=2), "smoothing=2 is out of range"),
        (lambda: DeepValue(adversarial=2), "adversarial=2 is out of range"),
        (lambda: DeepValue(from_truth=-1), "from_truth=-1 is out of range"),
        (lambda: DeepValue(step_size=-1), "step_size=-1 is out of range"),
        (lambda: DeepValue(num_samples=0), "num_samples=0 is out of range"),
        (lambda: DeepValue(num_adversarial_steps=0), "num_adversarial_steps=0"),
        (lambda: Ranking(num_corrupted=0), "num_corrupted=0 is out of range"),
        (lambda: Ranking(flip=1.5), "flip=1.5 is out of range"),
        (lambda: Ranking(margin=-1), "margin=-1 is out of range"),
        (lambda: Contrastive(temperature=0), "temperature=0 is out of range"),
        (lambda: Minimizer(start="top"), "start='top' is unknown; expected 'center', 'initial'"),
    ],
)
def test_arguments_out_of_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
