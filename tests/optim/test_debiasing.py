"""Steps from the curvature of a part of the batch, at a length that the rest of it decides."""

import copy

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of
from torch import nn

import hvpopt
from hvpopt.closure.rows import Rows
from hvpopt.optim.probes import seed_of_step
from hvpopt.optim.report import Outcome
from hvpopt.solvers.stopping import ResidualNorm

EXACT = {
    "cg_stop": ResidualNorm(rtol=1e-13),
    "warm_start": 0.0,
    "preconditioner": None,
    "scale_gain": 0.0,
}


def regression(num_rows=40, n=5):
    torch.manual_seed(0)
    x, y = torch.randn(num_rows, n).double(), torch.randn(num_rows).double()
    return x, y, nn.Parameter(torch.randn(n).double())


def normal_equations(x, y, w, rows):
    """The GGN and the gradient of the mean of squares."""
    x, residual = x[rows], x[rows] @ w.detach() - y[rows]
    return 2 * x.T @ x / len(x), 2 * x.T @ residual / len(x)


def rows_of_step(optimizer, num_steps, num_rows, which, fraction=0.5):
    seed = seed_of_step(optimizer._seed, num_steps)
    return Rows(fraction, seed).indices(num_rows, which)


def test_a_step_with_a_part_of_the_curvature_solves_its_system_for_the_whole_gradient():
    x, y, w = regression()
    start = w.detach().clone()
    optimizer = hvpopt.NewtonCG([w], damping=0.3, curvature_fraction=0.5, **EXACT)
    eye = torch.eye(5).double()
    chosen, last = [], 0.0
    for step in range(2):
        w.data.copy_(start)
        _, grad = normal_equations(x, y, w, slice(None))
        optimizer.step(closure_of(optimizer, lambda: F.mse_loss(x @ w, y)))
        damping = optimizer.last_report.damping
        chosen.append(rows_of_step(optimizer, step, 40, "part"))
        matrix, _ = normal_equations(x, y, start, chosen[-1])
        last = torch.linalg.solve(matrix + damping * eye, 0.9 * damping * last - grad)
        assert optimizer.last_report.step_length == 1
        torch.testing.assert_close(w.detach(), start + last)
    assert not torch.equal(chosen[0].sort().values, chosen[1].sort().values)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_a_debiased_step_goes_from_one_part_as_far_as_the_other_says(decay):
    x, y, w = regression()
    start = w.detach().clone()
    optimizer = hvpopt.NewtonCG(
        [w], damping=0.3, weight_decay=decay, curvature_fraction=0.6, debiased=True, **EXACT
    )
    eye, last = torch.eye(5).double(), torch.zeros(5).double()
    for step in range(2):
        w.data.copy_(start)
        optimizer.step(closure_of(optimizer, lambda: F.mse_loss(x @ w, y)))
        damping = optimizer.last_report.damping
        halves = {}
        for which in ("part", "rest"):
            rows = rows_of_step(optimizer, step, 40, which, 0.6)
            matrix, grad = normal_equations(x, y, start, rows)
            grad = grad + decay * start - 0.9 * damping * last
            halves[which] = matrix + (decay + damping) * eye, grad
        matrix, grad = halves["part"]
        d = -torch.linalg.solve(matrix, grad)
        matrix, grad = halves["rest"]
        last = d * float(-grad @ d / (d @ matrix @ d))
        assert optimizer.last_report.step_length == 1
        torch.testing.assert_close(w.detach(), start + last)
        # the reduction ratio is of the whole batch's model, which is exact
        assert optimizer.last_report.reduction_ratio == pytest.approx(1.0)
        torch.testing.assert_close(w.grad, normal_equations(x, y, start, slice(None))[1])


def test_a_direction_that_the_rest_does_not_confirm_is_not_taken():
    """Two rows with opposite targets: what lowers the loss of one raises the other's."""
    w = nn.Parameter(torch.ones(1).double())
    optimizer = hvpopt.NewtonCG([w], damping=0.1, curvature_fraction=0.5, debiased=True, **EXACT)
    targets = torch.tensor([3.0, -3.0]).double()
    optimizer.step(closure_of(optimizer, lambda: F.mse_loss(w.expand(2), targets)))
    assert optimizer.last_report.outcome is Outcome.REJECTED
    assert w.item() == 1.0


def test_accumulated_gradients_shift_the_gradients_of_both_parts():
    x, y, w = regression()
    start, extra = w.detach().clone(), torch.linspace(-1, 1, 5).double()
    optimizer = hvpopt.NewtonCG([w], damping=0.3, curvature_fraction=0.5, debiased=True, **EXACT)
    w.grad = extra.clone()

    def closure():
        loss = F.mse_loss(x @ w, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = []
    for which in ("part", "rest"):
        matrix, grad = normal_equations(x, y, start, rows_of_step(optimizer, 0, 40, which))
        found += [matrix + 0.3 * torch.eye(5).double(), grad + extra]
    d = -torch.linalg.solve(found[0], found[1])
    length = float(-found[3] @ d / (d @ found[2] @ d))
    torch.testing.assert_close(w.detach(), start + length * d)


def test_clipped_gradients_of_both_parts_are_clipped_as_much():
    x, y, w = regression()
    start = w.detach().clone()
    optimizer = hvpopt.NewtonCG([w], damping=0.3, curvature_fraction=0.5, debiased=True, **EXACT)
    _, whole = normal_equations(x, y, start, slice(None))
    scale = 0.01 / float(whole.norm())

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(x @ w, y)
        loss.backward()
        nn.utils.clip_grad_norm_([w], 0.01)
        return loss

    optimizer.step(closure)
    found = []
    for which in ("part", "rest"):
        matrix, grad = normal_equations(x, y, start, rows_of_step(optimizer, 0, 40, which))
        found += [matrix + 0.3 * torch.eye(5).double(), scale * grad]
    d = -torch.linalg.solve(found[0], found[1])
    length = float(-found[3] @ d / (d @ found[2] @ d))
    torch.testing.assert_close(w.detach(), start + length * d, rtol=1e-5, atol=1e-7)


def test_debiased_steps_on_noisy_batches_end_nearer_to_the_truth():
    errors = {}
    for debiased in (False, True):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: B023, E731
        scales = torch.logspace(-1.5, 0, 30).double()
        truth, w = draw(30) / scales, nn.Parameter(torch.zeros(30).double())
        options = {"curvature_fraction": 0.5, "debiased": True} if debiased else {}
        optimizer = hvpopt.NewtonCG([w], damping=1e-3, damping_factor=1.0, **EXACT, **options)
        losses = []
        for _ in range(40):
            x = draw(120, 30) * scales
            y = x @ truth + 3 * draw(120)
            optimizer.step(closure_of(optimizer, lambda: F.mse_loss(x @ w, y)))  # noqa: B023
            losses.append(float((scales * (w.detach() - truth)).square().sum()))
        errors[debiased] = sum(losses[-20:]) / 20
    assert errors[True] < 0.5 * errors[False]


def test_a_resumed_run_goes_on_with_the_same_rows():
    x, y, w = regression()
    options = {"curvature_fraction": 0.5, "debiased": True, "seed": 5}

    def run(w, optimizer, num_steps):
        for _ in range(num_steps):
            optimizer.step(closure_of(optimizer, lambda: F.mse_loss(torch.tanh(x @ w), y)))

    one = hvpopt.NewtonCG([w], **options)
    run(w, one, 3)
    other = nn.Parameter(w.detach().clone())
    two = hvpopt.NewtonCG([other], **options)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    run(w, one, 3)
    run(other, two, 3)
    assert torch.equal(w, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature_fraction": 0.0}, r"curvature_fraction=0\.0 is out of range"),
        ({"curvature_fraction": 1.5}, r"curvature_fraction=1\.5 is out of range"),
        ({"curvature_fraction": 0.5, "curvature": "hessian"}, "the Hessian has not: choose"),
        ({"debiased": True}, "choose curvature_fraction below 1, such as 0.5"),
        ({"debiased": 1}, "debiased=1: expected True or False"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hvpopt.NewtonCG([nn.Parameter(torch.ones(2))], **options)
