"""Hypergradients at a solved inner problem, against closed forms and dense matrices."""

import warnings

import pytest
import torch
from torch import Tensor

from hvpopt.minimization import minimize
from hvpopt.nested.adjoints import Implicit, Neumann
from hvpopt.nested.hypergradients import hypergradient
from hvpopt.solvers import Status


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Ridge:
    """½‖X w − y‖² + ½ Σ exp(λⱼ) wⱼ² inside, the validation error and a term of λ outside."""

    def __init__(self) -> None:
        self.x, self.y = normal(30, 6, seed=0), normal(30, seed=1)
        self.xv, self.yv = normal(20, 6, seed=2), normal(20, seed=3)
        self.penalties = normal(6, seed=4)

    def inner(self, w: Tensor, penalties: Tensor) -> Tensor:
        return 0.5 * ((self.x @ w - self.y) ** 2).sum() + 0.5 * (penalties.exp() * w**2).sum()

    def outer(self, w: Tensor, penalties: Tensor) -> Tensor:
        return 0.5 * ((self.xv @ w - self.yv) ** 2).mean() + 0.1 * (penalties**2).sum()

    def hessian(self) -> Tensor:
        return self.x.T @ self.x + torch.diag(self.penalties.exp())

    def solution(self) -> Tensor:
        return torch.linalg.solve(self.hessian(), self.x.T @ self.y)

    def adjoint(self) -> Tensor:
        slope = self.xv.T @ (self.xv @ self.solution() - self.yv) / len(self.yv)
        return torch.linalg.solve(self.hessian(), slope)

    def closed_form(self) -> Tensor:
        direct = 0.2 * self.penalties
        return direct - self.penalties.exp() * self.solution() * self.adjoint()

    def step_size(self) -> float:
        return 1 / float(torch.linalg.eigvalsh(self.hessian())[-1])


@pytest.mark.parametrize("solver", ["cg", "minres"])
def test_ridge_with_a_penalty_for_each_feature_has_its_closed_form(solver):
    ridge = Ridge()
    found = hypergradient(
        ridge.inner,
        ridge.outer,
        ridge.solution(),
        ridge.penalties,
        adjoint=Implicit(solver=solver, rtol=1e-12),
    )
    torch.testing.assert_close(found.value, ridge.closed_form(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.adjoint, ridge.adjoint(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.outer_loss, ridge.outer(ridge.solution(), ridge.penalties))
    torch.testing.assert_close(found.inner_loss, ridge.inner(ridge.solution(), ridge.penalties))
    assert found.status is Status.CONVERGED
    assert found.residual < 1e-12
    assert found.adjoint_residual < 1e-12
    assert found.num_products <= 6 + 2  # exact in n steps, but for rounding, and one for the value


@pytest.mark.parametrize("solver", ["cg", "minres"])
def test_forward_over_reverse_gives_the_same_products(solver):
    ridge = Ridge()
    adjoint = Implicit(solver=solver, rtol=1e-12, products="forward_over_reverse")
    found = hypergradient(
        ridge.inner, ridge.outer, ridge.solution(), ridge.penalties, adjoint=adjoint
    )
    torch.testing.assert_close(found.value, ridge.closed_form(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("products", ["reverse_over_reverse", "forward_over_reverse"])
def test_all_products_are_of_one_draw_of_the_inner_loss(products):
    """With dropout: the system has a solution that CG finds, and torch's generator moves once."""
    w, h = torch.full((8,), 0.1), torch.tensor(1.0)
    x = normal(16, 8, seed=0).float()

    def inner(w, h):
        return ((torch.dropout(x, 0.5, True) @ w) ** 2).mean() + h * (w**2).sum()

    adjoint = Implicit(rtol=1e-6, residual_warning=float("inf"), products=products)
    torch.manual_seed(0)
    found = hypergradient(inner, lambda w, h: w.sum(), w, h, adjoint=adjoint)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    hessian = torch.autograd.functional.hessian(lambda w: inner(w, h), w)
    assert torch.equal(torch.get_rng_state(), after)
    expected = torch.linalg.solve(hessian, torch.ones(8))
    torch.testing.assert_close(found.adjoint, expected, rtol=1e-4, atol=1e-5)


def test_the_neumann_series_reaches_the_closed_form():
    ridge = Ridge()
    adjoint = Neumann(num_terms=400, step_size=ridge.step_size())
    found = hypergradient(
        ridge.inner, ridge.outer, ridge.solution(), ridge.penalties, adjoint=adjoint
    )
    torch.testing.assert_close(found.value, ridge.closed_form(), rtol=0, atol=1e-10)
    assert found.num_products == 400  # the first term needs none


def test_a_cut_neumann_series_is_the_sum_of_its_terms():
    ridge = Ridge()
    alpha, hessian = ridge.step_size(), ridge.hessian()
    slope = hessian @ ridge.adjoint()
    terms = [
        alpha * torch.linalg.matrix_power(torch.eye(6) - alpha * hessian, k) @ slope
        for k in range(3)
    ]
    found = hypergradient(
        ridge.inner,
        ridge.outer,
        ridge.solution(),
        ridge.penalties,
        adjoint=Neumann(num_terms=3, step_size=alpha),
    )
    torch.testing.assert_close(found.adjoint, sum(terms))
    left = (slope - hessian @ sum(terms)).norm() / slope.norm()
    assert found.adjoint_residual == pytest.approx(float(left), rel=1e-9)


@pytest.mark.parametrize("solver", ["cg", "minres"])
def test_damping_is_added_to_the_hessian_in_its_own_units(solver):
    ridge = Ridge()
    slope = ridge.hessian() @ ridge.adjoint()
    damped = ridge.hessian() + 3.0 * torch.eye(6, dtype=torch.float64)
    found = hypergradient(
        ridge.inner,
        ridge.outer,
        ridge.solution(),
        ridge.penalties,
        adjoint=Implicit(solver=solver, damping=3.0, rtol=1e-12),
    )
    torch.testing.assert_close(found.adjoint, torch.linalg.solve(damped, slope))
    assert found.adjoint_residual < 1e-12


@pytest.mark.parametrize(
    "adjoint",
    [Implicit(rtol=1e-4), Implicit(solver="minres", rtol=1e-4), "neumann"],
)
def test_a_warm_start_takes_fewer_products_or_leaves_less(adjoint):
    ridge = Ridge()
    if adjoint == "neumann":
        adjoint = Neumann(num_terms=5, step_size=ridge.step_size())
    problem = ridge.inner, ridge.outer, ridge.solution(), ridge.penalties
    near = ridge.adjoint() * (1 + 1e-6 * normal(6, seed=5))
    cold = hypergradient(*problem, adjoint=adjoint)
    warm = hypergradient(*problem, adjoint=adjoint, start=near)
    if isinstance(adjoint, Neumann):
        assert warm.adjoint_residual < 1e-4 * cold.adjoint_residual
    else:
        assert warm.num_products <= 3 < cold.num_products
        assert warm.adjoint_residual < 1e-4


def test_a_network_in_a_pytree_has_the_hypergradient_of_the_dense_hessian():
    x, y = normal(12, 3, seed=0), normal(12, seed=1)
    hparams = [torch.tensor(-2.0, dtype=torch.float64), {"out": normal(2, seed=3) - 2}]

    def inner(params, hparams):
        out = torch.tanh(x @ params["in"]) @ params["out"][0]
        decay = hparams[0].exp() * (params["in"] ** 2).sum()
        return (
            ((out - y) ** 2).mean()
            + decay
            + (hparams[1]["out"].exp() * params["out"][0] ** 2).sum()
        )

    def outer(params, hparams):
        return (params["in"] ** 2).sum() + torch.sin(params["out"][0]).sum() * hparams[0]

    start = {"in": normal(3, 2, seed=4), "out": [normal(2, seed=5)]}
    params = minimize(inner, start, args=(hparams,), gtol=1e-12).x
    found = hypergradient(inner, outer, params, hparams, adjoint=Implicit(rtol=1e-13))

    def unflat(v):
        return {"in": v[:6].reshape(3, 2), "out": [v[6:8]]}, [v[8], {"out": v[9:]}]

    at = torch.cat(
        [params["in"].reshape(-1), params["out"][0], hparams[0][None], hparams[1]["out"]]
    )
    full = torch.autograd.functional.hessian(lambda v: inner(*unflat(v)), at)
    slope = torch.autograd.functional.jacobian(lambda v: outer(*unflat(v)), at)
    expected = slope[8:] - full[8:, :8] @ torch.linalg.solve(full[:8, :8], slope[:8])
    value = torch.cat([found.value[0][None], found.value[1]["out"]])
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-8)
    assert found.adjoint["out"][0].shape == (2,)
    assert all(x.grad is None and not x.requires_grad for x in (found.value[0], params["in"]))


def saddle(w: Tensor, shift: Tensor) -> Tensor:
    return 0.5 * (torch.tensor([2.0, -1.0], dtype=torch.float64) * w**2).sum() - shift @ w


def test_minres_serves_an_indefinite_inner_hessian_and_cg_says_that_it_does_not():
    shift = torch.tensor([1.0, 3.0], dtype=torch.float64)
    w = shift / torch.tensor([2.0, -1.0], dtype=torch.float64)
    outer = lambda w, shift: w[0] + 2 * w[1]  # noqa: E731
    found = hypergradient(saddle, outer, w, shift, adjoint=Implicit(solver="minres"))
    torch.testing.assert_close(found.value, torch.tensor([0.5, -2.0], dtype=torch.float64))
    with pytest.warns(UserWarning, match="not solved .*zero or negative curvature.*raise the damp"):
        found = hypergradient(saddle, outer, w, shift)
    assert found.status is Status.NEGATIVE_CURVATURE
    assert found.adjoint_residual > 0.1


def test_a_step_size_that_is_too_large_for_neumann_is_said():
    ridge = Ridge()
    adjoint = Neumann(num_terms=10, step_size=4 * ridge.step_size())
    with pytest.warns(UserWarning, match="not solved .*a step_size above 2 / λ_max"):
        hypergradient(ridge.inner, ridge.outer, ridge.solution(), ridge.penalties, adjoint=adjoint)


def test_an_unsolved_inner_problem_has_its_residual_exposed_and_one_warning():
    ridge = Ridge()
    w = ridge.solution() + 0.1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            found = hypergradient(ridge.inner, ridge.outer, w, ridge.penalties)
    assert [str(c.message).partition(":")[0] for c in caught] == ["The inner problem is not solved"]
    expected = float((ridge.hessian() @ torch.full((6,), 0.1, dtype=torch.float64)).norm())
    assert found.residual == pytest.approx(expected, rel=1e-9)
    loose = Implicit(residual_warning=float("inf"))
    hypergradient(ridge.inner, ridge.outer, w, ridge.penalties, adjoint=loose)  # says nothing


def test_hyperparameters_that_only_the_outer_loss_uses_have_their_own_derivative():
    found = hypergradient(
        lambda w, h: ((w - 1) ** 2).sum(),
        lambda w, h: (h["a"] ** 2).sum() + w.sum(),
        torch.ones(2),
        {"a": torch.tensor([3.0]), "unused": torch.ones(2)},
    )
    torch.testing.assert_close(found.value["a"], torch.tensor([6.0]))
    torch.testing.assert_close(found.value["unused"], torch.zeros(2))


def test_an_outer_loss_without_the_parameters_needs_no_solve():
    w, h = torch.ones(2), torch.tensor(2.0)
    found = hypergradient(lambda w, h: (h * (w - 1) ** 2).sum(), lambda w, h: h**2, w, h)
    assert float(found.value) == 4.0
    assert (found.status, found.adjoint_residual) == (Status.CONVERGED, 0.0)


def test_it_works_under_no_grad_and_inference_mode_and_leaves_parameters_alone():
    ridge = Ridge()
    w, penalties = ridge.solution().requires_grad_(), ridge.penalties.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = hypergradient(ridge.inner, ridge.outer, w, penalties)
        torch.testing.assert_close(found.value, ridge.closed_form().detach())
        assert not found.value.requires_grad
    assert w.grad is None
    assert penalties.grad is None
