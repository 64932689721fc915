"""Slices of losses against closed forms; the parameters stay as they are."""

import math

import pytest
import torch
from spectra import seeded, with_eigenvalues

from hvpopt.curvature import filter_normalized, loss_slice, top_eigenpairs
from hvpopt.operators import HessianOperator


def quadratic(matrix: torch.Tensor):
    return lambda p: p[0] @ matrix @ p[0] / 2


def test_slices_along_eigenvectors_are_the_parabolas_of_their_eigenvalues():
    a = with_eigenvalues([1.0, 2.0, 5.0, 9.0])
    point = [torch.zeros(4, dtype=torch.float64)]
    top = top_eigenpairs(lambda v: [a @ v[0]], point, 2, rtol=1e-12, generator=seeded())
    line = loss_slice(quadratic(a), point, top.vectors[0], radius=2.0, num_points=9)
    steps = torch.linspace(-2, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(line.distances, (steps,))
    torch.testing.assert_close(line.values, 4.5 * steps**2)
    plane = loss_slice(quadratic(a), point, top.vectors, radius=2.0, num_points=9)
    expected = 4.5 * steps[:, None] ** 2 + 2.5 * steps**2
    torch.testing.assert_close(plane.values, expected)
    assert (line.num_evaluations, plane.num_evaluations) == (9, 81)


def test_distances_of_each_direction_may_differ():
    point = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    u = [torch.tensor([1.0, 0.0]), torch.tensor(0.0)]
    v = [torch.tensor([0.0, 0.0]), torch.tensor(2.0)]
    found = loss_slice(
        lambda p: 100 * p[0][0] + p[1],
        point,
        [u, v],
        distances=(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-1.0, 0.5])),
    )
    assert found.values.tolist() == [[101.0, 104.0], [201.0, 204.0], [301.0, 304.0]]
    assert [x.tolist() for x in found.distances] == [[0.0, 1.0, 2.0], [-1.0, 0.5]]
    same = loss_slice(lambda p: p[1], point, [u, v], distances=[0.0, 1.0])
    assert same.values.tolist() == [[3.0, 5.0], [3.0, 5.0]]


def test_values_that_are_not_finite_stay():
    found = loss_slice(
        lambda p: float(p[0].log()),
        [torch.tensor(1.0)],
        [torch.tensor(1.0)],
        distances=[-2.0, -1.0, 0.0],
    )
    assert math.isnan(found.values[0])
    assert found.values.tolist()[1:] == [-math.inf, 0.0]


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_moved_in_place_are_put_back_exactly(fails):
    net = torch.nn.Linear(3, 1)
    params = list(net.parameters())
    before = [p.detach().clone() for p in params]
    x = torch.randn(5, 3, generator=seeded())
    seen = []

    def loss(given):
        assert all(a is b for a, b in zip(given, params, strict=True))
        seen.append([p.detach().clone() for p in params])
        if fails and len(seen) == 3:
            raise RuntimeError("out of luck")
        return net(x).square().mean()

    direction = [torch.ones_like(p) for p in params]
    if fails:
        with pytest.raises(RuntimeError, match="out of luck"):
            loss_slice(loss, params, direction, num_points=5, in_place=True)
    else:
        found = loss_slice(loss, params, direction, num_points=5, in_place=True)
        apart = loss_slice(
            lambda p: (x @ p[0].T + p[1]).square().mean(), params, direction, num_points=5
        )
        torch.testing.assert_close(found.values, apart.values, rtol=1e-6, atol=1e-7)
    assert not all(torch.equal(p, q) for p, q in zip(seen[0], before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(p.requires_grad and p.grad is None for p in params)


def test_filters_get_the_lengths_of_the_parameters_filters():
    weight = torch.randn(4, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    bias = torch.ones(4, dtype=torch.float64)
    direction = [torch.randn(4, 3, 2, 2, generator=seeded(1), dtype=torch.float64), 2 * bias]
    scaled, zero = filter_normalized(direction, [weight, bias])
    torch.testing.assert_close(scaled.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
    ratios = (scaled / direction[0]).flatten(1)
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios))
    assert torch.equal(zero, torch.zeros_like(bias))
    with pytest.raises(ValueError, match="direction has the shapes"):
        filter_normalized([weight], [bias])


def test_bad_slices_are_answered_by_name():
    w, u = [torch.ones(2)], [torch.ones(2)]
    for directions in ([], [u, u, u]):
        with pytest.raises(ValueError, match=f"one or two directions, got {len(directions)}"):
            loss_slice(sum, w, directions)
    with pytest.raises(ValueError, match="A direction has the shapes"):
        loss_slice(sum, w, [torch.ones(3)])
    with pytest.raises(ValueError, match="radius=0 leaves no slice"):
        loss_slice(sum, w, u, radius=0)
    with pytest.raises(ValueError, match="num_points=0 is out of range"):
        loss_slice(sum, w, u, num_points=0)
    with pytest.raises(ValueError, match="distances have the shapes"):
        loss_slice(sum, w, u, distances=(torch.ones(2), torch.ones(2)))
    with pytest.raises(ValueError, match="distances have the shapes"):
        loss_slice(sum, w, u, distances=[])
    with pytest.raises(TypeError, match="params"):
        loss_slice(sum, [torch.ones(2, dtype=torch.int64)], u)


def test_a_networks_loss_along_its_hessians_eigenvector_is_its_parabola():
    """The loss of a linear network is quadratic, so that nothing is left out."""
    net = torch.nn.Linear(3, 2, dtype=torch.float64)
    x = torch.randn(20, 3, generator=seeded(), dtype=torch.float64)
    batches = [(x[:12], x[:12, :2].exp()), (x[12:], x[12:, :2].exp())]
    with HessianOperator(
        lambda b: torch.nn.functional.mse_loss(net(b[0]), b[1]), net.parameters(), batches
    ) as operator:
        top = top_eigenpairs(operator, rtol=1e-10, generator=seeded())
        center, slope = operator.loss(), operator.gradient()
        along = sum(float((g * v).sum()) for g, v in zip(slope, top.vectors[0], strict=True))
        found = loss_slice(
            lambda _: operator.loss(), operator.params, top.vectors[0], num_points=5, in_place=True
        )
    (steps,) = found.distances
    expected = float(center) + along * steps + top.values[0] / 2 * steps**2
    torch.testing.assert_close(found.values, expected)
