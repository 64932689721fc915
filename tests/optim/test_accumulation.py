"""Gradients of more data than the curvature is of: micro-batches that cannot fit the problem."""

import pytest
import torch
import torch.nn.functional as F
from test_newton_parts import Opened
from torch import nn

import hvpopt
from hvpopt.optim.objective import Objective
from hvpopt.optim.step import Step

NUM_PARTS = 4


def regression():
    """64 rows for 40 weights, in micro-batches of 16, whose curvature knows 16 directions."""
    torch.manual_seed(0)
    x = torch.randn(64, 40).double()
    y = x @ torch.randn(40).double() + 0.1 * torch.randn(64).double()
    return x.split(16), y.split(16)


def loss_after(optimizer, w, num_steps, *, rotates):
    """The whole data's, after steps with all gradients and the last micro-batch's curvature."""
    x, y = regression()
    loss = lambda i: F.mse_loss(x[i] @ w, y[i])  # noqa: E731
    for step in range(num_steps):
        parts = [(i + step * rotates) % NUM_PARTS for i in range(NUM_PARTS)]
        optimizer.zero_grad()
        for i in parts[:-1]:
            (loss(i) / NUM_PARTS).backward()

        def closure(last=parts[-1]):
            value = loss(last) / NUM_PARTS
            value.backward()
            return value

        optimizer.step(closure)
    with torch.no_grad():
        return float(sum(loss(i) for i in range(NUM_PARTS)) / NUM_PARTS)


MAKE = {
    "newton_cg": lambda w: hvpopt.NewtonCG([w]),
    "newton_cg plain": lambda w: hvpopt.NewtonCG([w], preconditioner=None),
    "trust_region": lambda w: hvpopt.TrustRegionNewtonCG([w]),
    "trust_region ggn": lambda w: hvpopt.TrustRegionNewtonCG([w], curvature="ggn"),
}


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_steps_stay_short_where_the_last_micro_batch_has_no_curvature(name, rotates):
    """Its loss with the others' gradients falls without end there; the sum does not."""
    w = nn.Parameter(torch.zeros(40).double())
    start = loss_after(MAKE[name](w), w, 0, rotates=rotates)
    end = loss_after(MAKE[name](w), w, 40, rotates=rotates)
    assert start > 30
    assert end < 0.05  # the noise is 0.01


def test_the_late_ratio_is_that_of_the_whole_data():
    """On quadratics f of all and q of a part: (f(θ+p) − f(θ)) / (gᵀp + ½ pᵀB p), B of q."""
    torch.manual_seed(0)
    roots = torch.randn(2, 5, 5).double()
    part, whole = (root @ root.T for root in roots)
    w, p = nn.Parameter(torch.randn(5).double()), torch.randn(5).double()
    g = whole @ w.detach()
    predicted = float(g @ p + 0.5 * p @ part @ p)
    actual = float(g @ p + 0.5 * p @ whole @ p)
    states = [{"update": p, "slope": float(g @ p), "predicted": predicted, "objective": 0.0}]
    with torch.no_grad():
        w += p
    with Opened([w], lambda: 0.5 * w @ whole @ w) as objective:
        step = Step(objective, states, None, None)
        assert step.late_ratio() == pytest.approx(actual / predicted)
    assert not objective.is_partial
    assert str(Step(objective, [{}], None, None).late_ratio()) == "nan"


@pytest.mark.parametrize(
    ("change", "is_partial"),
    [
        (lambda g: g, False),
        (lambda g: g * (1 + 1e-9), False),  # rounding, over ranks
        (lambda g: 0.1 * g, False),  # clipped, or a micro-batch alone
        (lambda g: g.clamp(-0.5, 0.5), False),
        (lambda g: g + torch.tensor([1.0, -2.0]).double(), True),
    ],
)
def test_it_is_told_from_clipping_and_rounding(change, is_partial):
    w = nn.Parameter(torch.tensor([1.0, -3.0]).double())

    def closure():
        w.grad = None
        loss = 0.5 * (w**2).sum()
        loss.backward()
        w.grad = change(w.grad)
        return loss

    with hvpopt.ClosureOracle(closure, [w]) as oracle:
        point = oracle.trace("hessian")
        objective = Objective(oracle, point, [w], [w.detach().clone()], [0.0])
    assert objective.is_partial == is_partial
