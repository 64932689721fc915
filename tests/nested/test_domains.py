import math

import pytest
import torch
from scipy.optimize import minimize

from hvpopt.nested import Box, Logits, MirrorDescent, Simplex, SoftmaxLogits, Unconstrained
from hvpopt.nested.logits import mirror_coordinates

LOGITS = [
    Logits(),
    Logits(entropy=0.7),
    Logits(-1.0, 3.0, entropy=0.4),
    SoftmaxLogits(),
    SoftmaxLogits(entropy=0.3),
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def entropy(domain, y):
    if isinstance(domain, SoftmaxLogits):
        return -(y * y.log()).sum()
    t = (y - domain.low) / (domain.high - domain.low)
    return -(t * t.log() + (1 - t) * (1 - t).log()).sum()


@pytest.mark.parametrize("domain", LOGITS)
def test_pull_is_the_derivative_of_energy_minus_entropy_by_the_logits(domain):
    u, center = normal(3, 4).requires_grad_(), normal(3, 4, seed=1)
    y = domain.point(u)
    energy = ((y - center) ** 2).sum()
    (expected,) = torch.autograd.grad(
        energy - domain.entropy_weight * entropy(domain, y), u, retain_graph=True
    )
    (g,) = torch.autograd.grad(energy, y)
    found = domain.pull(u.detach(), y.detach(), g)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
    assert torch.allclose(domain.residuals(u, y, g), expected.norm(dim=1))


@pytest.mark.parametrize("domain", LOGITS)
def test_the_penalty_is_minus_the_weighted_entropy_of_each_example(domain):
    u = normal(3, 4)
    y = domain.point(u)
    penalty = domain.penalty(u, y)
    if not domain.entropy_weight:
        assert penalty is None
        return
    expected = torch.stack([-domain.entropy_weight * entropy(domain, row) for row in y])
    assert torch.allclose(penalty, expected, rtol=1e-12)


@pytest.mark.parametrize("domain", LOGITS)
def test_coordinates_invert_the_map(domain):
    y = domain.point(normal(2, 5))
    assert torch.allclose(domain.point(domain.coordinates(y)), y, rtol=1e-13)


def test_logits_stay_finite_where_sigmoids_do_not():
    domain, u = Logits(entropy=1.0), torch.tensor([[800.0, -800.0]])
    assert torch.equal(domain.penalty(u, domain.point(u)), torch.zeros(1))


def test_the_projection_on_the_simplex_is_the_nearest_point():
    points = torch.cat([normal(4, 5), 3 * normal(2, 5, seed=1), torch.full((1, 5), 0.2)])
    found = Simplex().project(points)
    for x, p in zip(points, found, strict=True):
        nearest = minimize(
            lambda z, x=x: float(((torch.from_numpy(z) - x) ** 2).sum()),
            [0.2] * 5,
            bounds=[(0, 1)] * 5,
            constraints={"type": "eq", "fun": lambda z: z.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14},
        )
        assert torch.allclose(p, torch.from_numpy(nearest.x), atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(7, dtype=torch.float64), atol=1e-14)


def test_projections_are_idempotent_and_have_masks_for_derivatives():
    u = torch.tensor([[-0.5, 0.25, 1.5]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(Box().project(u).sum(), u)
    assert torch.equal(Box().project(u), torch.tensor([[0.0, 0.25, 1.0]], dtype=torch.float64))
    assert slope.tolist() == [[0.0, 1.0, 0.0]]
    p = Simplex().project(normal(3, 4))
    assert torch.allclose(Simplex().project(p), p, atol=1e-15)


def test_free_directions_leave_out_what_presses_against_a_bound():
    y = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5]])
    g = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    free = Box().free(y, y, g)
    assert free(torch.ones(1, 5)).tolist() == [[0.0, 1.0, 1.0, 0.0, 1.0]]
    assert Unconstrained().free(y, y, g) is None


def test_free_directions_of_the_simplex_stay_in_the_face():
    y = torch.tensor([[0.5, 0.5, 0.0]])
    free = Simplex().free(y, y, y)
    assert free(torch.tensor([[3.0, 1.0, 7.0]])).tolist() == [[1.0, -1.0, 0.0]]


def test_residuals_vanish_at_constrained_minimisers_only():
    y, g = torch.tensor([[0.0, 1.0], [0.5, 1.0]]), torch.tensor([[2.0, -3.0], [0.3, -3.0]])
    assert torch.allclose(Box().residuals(y, y, g), torch.tensor([0.0, 0.3]))
    assert torch.allclose(Unconstrained().residuals(y, y, g), g.norm(dim=1))
    vertex = torch.tensor([[1.0, 0.0]])
    assert Simplex().residuals(vertex, vertex, torch.tensor([[-1.0, 0.0]])) == 0


@pytest.mark.parametrize(
    ("domain", "value"),
    [(Unconstrained(), 0.0), (Box(-1, 3), 1.0), (Logits(), 0.5), (Simplex(), 0.25),
     (SoftmaxLogits(), 0.25)],
)  # fmt: skip
def test_the_center_lies_in_the_domain(domain, value):
    center = domain.center((2, 4), dtype=torch.float64)
    assert torch.equal(center, torch.full((2, 4), value, dtype=torch.float64))
    domain.check(center)


@pytest.mark.parametrize(
    ("domain", "y", "message"),
    [
        (Box(), [[0.5, 1.25]], r"y0 lies outside of its domain Box\(.*1 of 2 entries.*0.5 to 1.25"),
        (Logits(), [[0.0, 0.5]], r"strictly between 0.0 and 1.0: 1 of 2 entries.*are infinite"),
        (Simplex(), [[0.5, 0.75]], r"sum to 1.25 … 1.25 with a least one of 0.5; expected"),
        (Simplex(), [[1.5, -0.5]], r"a least one of -0.5; expected non-negative"),
        (Simplex(), [0.5, 0.5], r"has shape \(2,\); Simplex.* needs an axis of its own"),
        (SoftmaxLogits(), [[1.0, 0.0]], r"y0 has 1 entries that are zero, whose logits"),
        (SoftmaxLogits(), [[1.0, 1.0]], r"sum to 2 … 2"),
    ],
)
def test_starts_outside_are_named(domain, y, message):
    with pytest.raises(ValueError, match=message):
        domain.check(torch.tensor(y))


@pytest.mark.parametrize("make", [Box, Logits])
def test_bad_bounds_are_named(make):
    for low, high in ((1.0, 1.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match=r"needs finite bounds low < high, got low="):
            make(low, high)


@pytest.mark.parametrize("make", [Box, Logits, Simplex, SoftmaxLogits])
def test_a_negative_entropy_is_refused(make):
    with pytest.raises(ValueError, match=r"entropy=-1.0 is out of range"):
        make(entropy=-1.0)


def test_mirror_descent_has_coordinates_on_bounded_domains_only():
    assert mirror_coordinates(Box(0, 2, entropy=0.1)) == Logits(0, 2, entropy=0.1)
    assert mirror_coordinates(Simplex()) == SoftmaxLogits()
    for domain in (Unconstrained(), Logits()):
        with pytest.raises(ValueError, match=r"MirrorDescent does not go with .*Box or Simplex"):
            MirrorDescent().coordinates(domain)
