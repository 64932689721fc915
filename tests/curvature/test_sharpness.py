"""Limits of stability against what torch's optimizers do on quadratics; the sharpness too."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from spectra import like, product, seeded, with_eigenvalues

from hvpopt.curvature import StabilityLimit, gradient_descent_limit, optimizer_limit, sharpness


def growth(make, curvature: float, steps: int = 400) -> float:
    """How the distance from the minimum of ½ c w² has changed after so many steps."""
    start = 1e-60  # so that what Adam adds to its frozen second moments is nothing
    w = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = make([w])
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * curvature * w**2).sum().backward()
        optimizer.step()
    return float(w.detach().abs()) / start


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.3, "dampening": 0.8},
    ],
)
def test_torchs_sgd_converges_below_the_limit_and_diverges_above(options):
    limit = gradient_descent_limit(0.1, **options)

    def make(params):
        return torch.optim.SGD(params, lr=0.1, **options)

    assert growth(make, 0.97 * limit.threshold) < 1e-2
    assert growth(make, 1.03 * limit.threshold) > 1e2
    w = torch.nn.Parameter(torch.ones(2))
    assert optimizer_limit(make([w]), [w]) == limit


def frozen_adam(params, second, beta1=0.9):
    """Adam whose second moments stay as they are: β₂ = 1 up to rounding."""
    optimizer = torch.optim.Adam(params, lr=0.01, betas=(beta1, 1 - 1e-15), eps=1e-12)
    for p in params:
        optimizer.state[p] = {
            "step": torch.tensor(1e5),
            "exp_avg": torch.zeros_like(p),
            # the bias correction divides by 1 − β₂ᵗ
            "exp_avg_sq": torch.full_like(p, second * (1 - (1 - 1e-15) ** 1e5)),
        }
    return optimizer


@pytest.mark.parametrize("beta1", [0.9, 0.5])
def test_adams_limit_is_that_of_its_preconditioned_problem(beta1):
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = frozen_adam([w], second=4.0, beta1=beta1)
    limit = optimizer_limit(optimizer, [w])
    assert limit.threshold == pytest.approx((2 + 2 * beta1) / ((1 - beta1) * 0.01))
    torch.testing.assert_close(limit.preconditioner[0], torch.full_like(w, 2.0).detach())
    edge = limit.threshold * float(limit.preconditioner[0][0])

    def make(params):
        return frozen_adam(params, second=4.0, beta1=beta1)

    assert growth(make, 0.97 * edge) < 1e-1
    assert growth(make, 1.03 * edge) > 1e1


def test_adams_limit_at_its_default_momentum_is_38_over_lr():
    w = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    optimizer = torch.optim.Adam([w], lr=0.5)
    (w**2).sum().backward()
    optimizer.step()
    limit = optimizer_limit(optimizer, [w])
    assert limit.threshold == pytest.approx(38 / 0.5)
    # after one step v̂ = g² and 1 − β₁ = 0.1
    torch.testing.assert_close(limit.preconditioner[0], 0.1 * torch.tensor([6.0, 2.0]))
    amsgrad = torch.optim.AdamW([w], lr=0.5, amsgrad=True, weight_decay=0.3)
    amsgrad.step()
    limit = optimizer_limit(amsgrad, [w])
    torch.testing.assert_close(limit.preconditioner[0], 0.1 * torch.tensor([6.0, 2.0]))
    assert limit.weight_decay is None


def test_groups_of_smaller_learning_rates_are_less_curved_in_their_own_scale():
    a, b = (torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (2, 3))
    groups = [{"params": [a], "lr": 0.5}, {"params": [b], "lr": 0.1, "weight_decay": 2.0}]
    limit = optimizer_limit(torch.optim.SGD(groups, lr=1.0), [a, b])
    assert (limit.threshold, limit.lr) == (4.0, 0.5)
    scale = torch.tensor([1.0, 3.0, 20.0, 5.0, 0.0], dtype=torch.float64)
    found = sharpness(
        lambda v: [scale[:2] * v[0], scale[2:] * v[1]], [a, b], limit=limit, generator=seeded()
    )
    # of b's 20 + 2 the lr leaves a fifth
    assert found.value == pytest.approx(22 / 5, rel=1e-2)
    assert found.ratio == pytest.approx(1.1, rel=1e-2)
    # with (0.5, 0.1) / 1.1 the second group is at 2 / lr = 22
    assert found.largest_stable_lr == pytest.approx(0.5 / 1.1, rel=1e-2)


def test_a_group_that_does_not_learn_does_not_count():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [a], "lr": 0.5}, {"params": [b], "lr": 0.0}]
    limit = optimizer_limit(torch.optim.SGD(groups, lr=1.0), [a, b])
    found = sharpness(lambda v: [1.0 * v[0], 1e6 * v[1]], [a, b], limit=limit, generator=seeded())
    assert found.value == pytest.approx(1.0, rel=1e-2)


def test_the_sharpness_is_the_top_eigenvalue_and_starts_warm():
    a = with_eigenvalues([*np.linspace(-1, 1, 150), 3.0, 12.0])
    found = sharpness(product(a), like(152), rtol=1e-6, generator=seeded())
    assert found.value == pytest.approx(12.0, rel=1e-6)
    assert found.error < 12e-6
    assert found.limit is None
    assert math.isnan(found.ratio)
    assert math.isnan(found.largest_stable_lr)
    again = sharpness(product(a), like(152), rtol=1e-6, generator=seeded(), start=found.eigenpairs)
    assert again.num_products < found.num_products


def test_the_sharpness_of_a_preconditioned_matrix_is_that_of_the_generalized_problem():
    a = with_eigenvalues(np.linspace(-1, 5, 20))
    diagonal = torch.rand(20, generator=seeded(), dtype=torch.float64) + 0.1
    limit = StabilityLimit(10.0, 0.2, "2 / lr", [diagonal], (0.5,))
    found = sharpness(product(a), like(20), limit=limit, rtol=1e-9, generator=seeded())
    shifted = a + 0.5 * torch.eye(20, dtype=torch.float64)
    expected = scipy.linalg.eigh(shifted.numpy(), np.diag(diagonal.numpy()), eigvals_only=True)[-1]
    assert found.value == pytest.approx(expected)
    assert found.ratio == pytest.approx(expected / 10)


def test_without_upward_curvature_any_learning_rate_is_stable():
    limit = gradient_descent_limit(0.1)
    found = sharpness(lambda v: [-x for x in v], like(3), limit=limit)
    assert found.largest_stable_lr == math.inf
    assert found.ratio < 0


def test_bad_limits_are_answered_by_name():
    for lr in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="lr="):
            gradient_descent_limit(lr)
    with pytest.raises(
        ValueError, match=r"momentum=1.0 is out of range: expected a number in \[0, 1\)"
    ):
        gradient_descent_limit(0.1, momentum=1.0)
    with pytest.raises(ValueError, match="Nesterov's momentum needs momentum > 0"):
        gradient_descent_limit(0.1, nesterov=True)
    w, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(TypeError, match="No limit of stability is known for RMSprop"):
        optimizer_limit(torch.optim.RMSprop([w]), [w])
    with pytest.raises(ValueError, match=r"params\[1\], of shape \(2,\), is in no group"):
        optimizer_limit(torch.optim.SGD([w]), [w, other])
    with pytest.raises(ValueError, match="params is empty"):
        optimizer_limit(torch.optim.SGD([w]), [])
    with pytest.raises(ValueError, match="no second moments yet: take a step"):
        optimizer_limit(torch.optim.AdamW([w]), [w])
    groups = [{"params": [w], "momentum": 0.9}, {"params": [other]}]
    with pytest.raises(ValueError, match="groups differ in momentum"):
        optimizer_limit(torch.optim.SGD(groups, lr=0.1), [w, other])
    with pytest.raises(ValueError, match="lr=0 has no limit"):
        optimizer_limit(torch.optim.SGD([w], lr=0.0), [w])
    for diagonal, message in (
        ([torch.zeros(2)], "entries that are not positive"),
        ([torch.ones(3)], "limit's preconditioner has the shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            sharpness(lambda v: v, [w], limit=StabilityLimit(1.0, 1.0, "", diagonal))
