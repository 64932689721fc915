import logging

import pytest
import torch
from nested.smooth_energy import dense_derivatives, flattened, problem
from torch import nn

from hvpopt.nested import Box, Logits, Simplex, SoftmaxLogits, Unconstrained
from hvpopt.nested.hessian import InnerHessian
from hvpopt.nested.joint import Tape, joint_product, taped
from hvpopt.nested.problem import InnerProblem

WAYS = ["reverse_over_reverse", "forward_over_reverse"]


def point(seed=5, batch=6):
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(batch, 5, generator=generator, dtype=torch.float64)
    return y, torch.randn(batch, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("products", WAYS)
def test_one_pass_gives_both_products_of_the_dense_derivatives(products):
    energy, x, _ = problem()
    y, v = point()
    inner = InnerProblem(energy, x, y, allows_captured=False)
    hv, (cx, *ctheta) = joint_product(inner, y, v, products=products)
    dense_h, dense_x, dense_theta = dense_derivatives(energy, x, y)
    assert torch.allclose(hv, torch.einsum("kij,kj->ki", dense_h, v), rtol=1e-12, atol=1e-13)
    assert torch.allclose(cx, torch.einsum("kij,ki->kj", dense_x, v), rtol=1e-12, atol=1e-13)
    by_name = {id(t): c for t, c in zip(inner.theta, ctheta, strict=True)}
    found = flattened(
        energy,
        [
            torch.zeros_like(p) if by_name[id(p)] is None else by_name[id(p)]
            for p in energy.parameters()
        ],
    )
    expected = torch.einsum("kij,ki->j", dense_theta, v)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("products", WAYS)
def test_products_of_some_rows_are_those_rows_of_all(products):
    energy, x, _ = problem()
    y, v = point()
    inner = InnerProblem(energy, x, y, allows_captured=False)
    rows = torch.tensor([1, 4])
    some = joint_product(inner, y[rows], v[rows], rows, products=products)
    every = joint_product(inner, y, v, products=products)
    assert torch.allclose(some.Hv, every.Hv[rows], rtol=1e-13)
    assert torch.allclose(some.Cv[0], every.Cv[0][rows], rtol=1e-13)


class Grouped(nn.Module):
    """Its GroupNorm's backward has no forward-mode formula."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4, dtype=torch.float64)

    def forward(self, x, y):
        return nn.functional.mish(self.norm(y)).square().sum(1) + (y * x).sum(1)


def test_what_forward_mode_lacks_is_computed_by_double_backward_and_logged_once(caplog):
    torch.manual_seed(0)
    energy = Grouped()
    x = torch.randn(3, 4, dtype=torch.float64)
    y, v = torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    inner = InnerProblem(energy, x, y, allows_captured=False)
    expected = joint_product(inner, y, v)
    with caplog.at_level(logging.INFO, logger="hvpopt"):
        for _ in range(2):
            found = joint_product(inner, y, v, products="forward_over_reverse")
            assert torch.allclose(found.Hv, expected.Hv, rtol=1e-12)
    notes = [r.message for r in caplog.records if "double backward" in r.message]
    assert len(notes) == 1
    assert "Products of the energy by double backward (forward mode:" in notes[0]


def test_a_linear_energy_has_zero_products():
    weight = nn.Parameter(torch.ones(3))
    inner = InnerProblem(lambda x, y: y.sum(1), None, torch.zeros(2, 3), allows_captured=False)
    assert torch.equal(
        taped(inner, torch.zeros(2, 3), None).hvp(torch.ones(2, 3)), torch.zeros(2, 3)
    )
    inner = InnerProblem(lambda x, y: y @ weight, None, torch.zeros(2, 3), allows_captured=False)
    joint = joint_product(inner, torch.zeros(2, 3), torch.ones(2, 3))
    assert torch.equal(joint.Hv, torch.zeros(2, 3))
    assert torch.equal(joint.Cv[0], torch.full((3,), 2.0))


def dense_hessian(energy, x, domain, u):
    """By differentiating E(y(u)) minus its entropy twice, example by example."""

    def objective(ui, xi):
        y = domain.point(ui[None])
        value = energy(xi[None], y).sum()
        penalty = domain.penalty(ui[None], y)
        return value if penalty is None else value + penalty.sum()

    return torch.stack([
        torch.autograd.functional.hessian(lambda z, xi=xi: objective(z, xi), ui)
        for ui, xi in zip(u, x.detach(), strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("products", WAYS)
@pytest.mark.parametrize(
    "domain",
    [Unconstrained(), Logits(), Logits(-1.0, 2.0, entropy=0.5), SoftmaxLogits(entropy=0.2)],
)
def test_the_hessian_in_the_moving_coordinates_is_the_dense_one(domain, products):
    energy, x, _ = problem()
    u, v = point()
    inner = InnerProblem(energy, x, domain.point(u), allows_captured=False)
    hessian = InnerHessian(inner, domain, u, products=products)
    dense = dense_hessian(energy, x, domain, u)
    found = hessian(v)
    assert torch.allclose(found, torch.einsum("kij,kj->ki", dense, v), rtol=1e-10, atol=1e-11)
    for places in ([0, 1, 3, 5], [1, 5], [5], [1, 2, 3, 4]):  # with and without a new graph
        rows = torch.tensor(places)
        assert torch.allclose(hessian(v[rows], rows), found[rows], rtol=1e-10, atol=1e-12)
    assert hessian.num_products == 5


def test_without_the_curved_map_the_hessian_is_that_of_the_solution():
    energy, x, _ = problem()
    domain, (u, v) = Logits(-1.0, 2.0, entropy=0.5), point()
    y = domain.point(u)
    inner = InnerProblem(energy, x, y, allows_captured=False)
    hessian = InnerHessian(inner, domain, u, drops_curved_map=True)
    width, t = 3.0, u.sigmoid()
    slope = t * (1 - t)
    dense, _, _ = dense_derivatives(energy, x, y)
    inner_product = torch.einsum("kij,kj->ki", dense, width * slope * v)
    expected = slope * (width * inner_product + 0.5 * v)
    assert torch.allclose(hessian(v), expected, rtol=1e-12)


def test_active_bounds_are_projected_out_on_both_sides():
    energy, x, _ = problem()
    y = torch.tensor([[0.0, 1.0, 0.3, 0.0, 1.0]], dtype=torch.float64).repeat(6, 1)
    _, v = point()
    for domain in (Box(), Simplex()):
        at = y if isinstance(domain, Box) else y / y.sum(1, keepdim=True)
        inner = InnerProblem(energy, x, at, allows_captured=False)
        tape = taped(inner, at, None)
        project = domain.free(at, at, tape.g.detach())
        dense, _, _ = dense_derivatives(energy, x, at)
        expected = project(torch.einsum("kij,kj->ki", dense, project(v)))
        hessian = InnerHessian(inner, domain, at)
        assert torch.allclose(hessian(v), expected, rtol=1e-12, atol=1e-13)
        rows = torch.tensor([2, 3])
        assert torch.allclose(hessian(v[rows], rows), expected[rows], rtol=1e-12, atol=1e-13)
        assert torch.allclose(hessian.grad, project(tape.g.detach()))


def test_a_tape_is_of_the_rows_it_was_made_for():
    energy, x, _ = problem()
    y, _ = point()
    inner = InnerProblem(energy, x, y, allows_captured=False)
    tape = taped(inner, y[2:4], torch.tensor([2, 3]))
    assert isinstance(tape, Tape)
    assert torch.allclose(tape.g, taped(inner, y, None).g[2:4])
    assert torch.equal(tape.xs[0], x[2:4])
