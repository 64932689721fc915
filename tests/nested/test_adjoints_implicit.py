import logging
import warnings

import pytest
import torch
from nested.smooth_energy import (
    SmoothEnergy,
    dense_derivatives,
    flattened,
    gradients,
    problem,
    relative_error,
)

from hvpopt.nested import (
    Box,
    GradientDescent,
    Implicit,
    InferenceStatus,
    Logits,
    Neumann,
    NewtonDescent,
    Simplex,
    SoftmaxLogits,
    Unconstrained,
    minimize_energy,
)
from hvpopt.solvers import Status

NEWTON = NewtonDescent(60, gtol=1e-13)
SOLVERS = [
    Implicit(rtol=1e-13),
    Implicit(solver="minres", rtol=1e-13),
    Implicit(rtol=1e-13, products="forward_over_reverse"),
    Neumann(num_terms=120, step_size=0.4),
]


def solved(adjoint, domain, method=NEWTON, energy=None):
    """The gradients by θ and x of a squared error at the minimisers, and where these are."""
    given, x, target = problem()
    energy = given if energy is None else energy
    y0 = domain.center((6, 5), dtype=torch.float64)
    found = minimize_energy(energy, x, y0, method=method, domain=domain, adjoint=adjoint)
    ((found.y - target) ** 2).sum().backward()
    return found, energy, x, target


def dense_gradients(energy, x, y, target, free=None, damping=0.0):
    """−C (P H P + λ)⁺ P ∇ℓ by a dense solve for each example; free: orthonormal columns."""
    H, Cx, Ctheta = dense_derivatives(energy, x, y)
    solutions = []
    for i, slope in enumerate(2 * (y.detach() - target)):
        P = torch.eye(5, dtype=torch.float64) if free is None else free(y[i].detach(), i)
        inner = P.T @ H[i] @ P + damping * torch.eye(P.shape[1], dtype=torch.float64)
        solutions.append(P @ torch.linalg.solve(inner, P.T @ slope))
    v = torch.stack(solutions)
    return -torch.einsum("kij,ki->j", Ctheta, v), -torch.einsum("kij,ki->kj", Cx, v)


def check(found, energy, x, target, free=None, damping=0.0, tolerance=1e-8):
    theta, inputs = dense_gradients(energy, x, found.y, target, free, damping)
    ours = gradients(energy, x)
    scale = theta.abs().max()
    assert (flattened(energy, ours) - theta).abs().max() < tolerance * scale
    assert (ours[-1] - inputs).abs().max() < tolerance * inputs.abs().max()


@pytest.mark.parametrize("adjoint", SOLVERS)
def test_the_implicit_gradient_is_that_of_the_dense_solve(adjoint):
    found, energy, x, target = solved(adjoint, Unconstrained())
    assert (found.residuals < 1e-11).all()
    check(found, energy, x, target)


@pytest.mark.parametrize("adjoint", SOLVERS)
def test_on_a_box_only_free_entries_respond(adjoint):
    found, energy, x, target = solved(adjoint, Box(-0.2, 0.2))
    at_bound = found.y.abs() == 0.2
    assert 0 < at_bound.sum() < at_bound.numel()

    def free(y, i):
        return torch.eye(5, dtype=torch.float64)[:, ~at_bound[i]]

    check(found, energy, x, target, free)


@pytest.mark.parametrize("adjoint", SOLVERS)
def test_on_the_simplex_the_face_responds(adjoint):
    method = GradientDescent(0.4, 400, gtol=1e-13)
    found, energy, x, target = solved(adjoint, Simplex(), method)

    def free(y, i):
        support = torch.eye(5, dtype=torch.float64)[:, y > 0]
        centred = support - support.mean(1, keepdim=True)
        left, values, _ = torch.linalg.svd(centred)
        return left[:, : int((values > 1e-10).sum())]

    assert 0 < (found.y == 0).sum() < 24
    check(found, energy, x, target, free)


@pytest.mark.parametrize("domain", [Logits(entropy=0.5), SoftmaxLogits(entropy=0.5)])
@pytest.mark.parametrize("solver", ["cg", "minres"])
def test_on_logits_the_entropy_counts(domain, solver):
    """E − τ H over y itself has the Hessian H + τ diag(1/y + 1/(1 − y)), or H + τ diag(1/y)."""
    found, energy, x, target = solved(Implicit(solver=solver, rtol=1e-13), domain)
    y = found.y.detach()
    weight = 1 / y + 1 / (1 - y) if isinstance(domain, Logits) else 1 / y
    H, Cx, Ctheta = dense_derivatives(energy, x, y)
    inner = H + 0.5 * torch.diag_embed(weight)
    slope = 2 * (y - target)
    if isinstance(domain, Logits):
        v = torch.linalg.solve(inner, slope)
    else:
        ones = torch.ones(6, 5, 1, dtype=torch.float64)
        bordered = torch.cat([
            torch.cat([inner, ones], 2),
            torch.cat([ones.mT, torch.zeros(6, 1, 1, dtype=torch.float64)], 2),
        ], 1)  # fmt: skip
        v = torch.linalg.solve(bordered, torch.cat([slope, slope[:, :1] * 0], 1))[:, :5]
    ours = gradients(energy, x)
    theta = -torch.einsum("kij,ki->j", Ctheta, v)
    assert (flattened(energy, ours) - theta).abs().max() < 1e-8 * theta.abs().max()
    assert torch.allclose(ours[-1], -torch.einsum("kij,ki->kj", Cx, v), atol=1e-9)


def test_implicit_and_unrolled_agree_at_the_end_of_a_long_descent():
    method, domain = GradientDescent(0.4, 150), Box(-0.2, 0.2)
    _, energy, x, _ = solved("unrolled", domain, method)
    expected = gradients(energy, x)
    for adjoint in SOLVERS:
        _, energy, x, _ = solved(adjoint, domain, method)
        assert relative_error(gradients(energy, x), expected) < 1e-8


@pytest.mark.parametrize("solver", ["cg", "minres"])
def test_damping_adds_to_the_hessian(solver):
    adjoint = Implicit(solver=solver, damping=0.7, rtol=1e-13)
    found, energy, x, target = solved(adjoint, Unconstrained())
    check(found, energy, x, target, damping=0.7)


def test_a_neumann_series_of_k_terms_is_its_finite_sum():
    found, energy, x, target = solved(
        Neumann(num_terms=3, residual_warning=1.0), Unconstrained(), GradientDescent(0.3, 150)
    )  # fmt: skip
    H, _, Ctheta = dense_derivatives(energy, x, found.y)
    slope = 2 * (found.y.detach() - target)
    eye = torch.eye(5, dtype=torch.float64)
    series = 0.3 * sum(torch.linalg.matrix_power(eye - 0.3 * H, k) for k in range(3))
    expected = -torch.einsum("kij,ki->j", Ctheta, torch.einsum("kij,kj->ki", series, slope))
    assert torch.allclose(flattened(energy, gradients(energy)), expected, rtol=1e-9, atol=1e-11)
    assert found.report.num_products == 3


def test_what_a_cut_series_leaves_is_exposed_and_warned_of_once():
    energy, adjoint = SmoothEnergy(), Neumann(num_terms=3)
    method = GradientDescent(0.3, 150)
    with pytest.warns(
        UserWarning,
        match=r"'neumann' stops after 3 terms with up to 0.\d+ of the cotangent left, above "
        r"residual_warning=0.001 for 6 of 6 examples .* take more num_terms",
    ):
        found, energy, x, target = solved(adjoint, Unconstrained(), method, energy)
    H, *_ = dense_derivatives(energy, x, found.y)
    slope = 2 * (found.y.detach() - target)
    power = torch.linalg.matrix_power(torch.eye(5, dtype=torch.float64) - 0.3 * H, 3)
    left = torch.einsum("kij,kj->ki", power, slope).norm(dim=1) / slope.norm(dim=1)
    assert torch.allclose(found.report.residuals, left, rtol=1e-9)
    assert found.report.steps.tolist() == [3] * 6
    assert found.report.statuses == [Status.STEP_LIMIT] * 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved(adjoint, Unconstrained(), method, energy)


@pytest.mark.parametrize(
    "domain", [Box(-0.2, 0.2), Logits(entropy=0.5), SoftmaxLogits(entropy=0.5)]
)
def test_the_residual_of_a_series_is_that_of_its_value_in_the_moving_coordinates(domain):
    adjoint = Neumann(num_terms=4, step_size=0.1, residual_warning=1e9)
    with_four, *_ = solved(adjoint, domain)
    # the sum of 5 terms has a term more, α (I − α H)⁴ b: what 4 terms leave, times α
    seen = []

    class Watched(Neumann):
        def inverse(self, system):
            seen.append((system.b, super().inverse(system)))
            return seen[-1][1]

    for num_terms in (4, 5):
        solved(Watched(num_terms, 0.1, residual_warning=1e9), domain)
    (b, four), (_, five) = seen
    left = (five - four).norm(dim=1) / (0.1 * b.norm(dim=1)).clamp(min=1e-300)
    assert torch.allclose(with_four.report.residuals, left, rtol=1e-9)


def test_a_series_that_grows_is_said_to():
    adjoint = Neumann(num_terms=30, step_size=3.0)
    with pytest.warns(UserWarning, match=r"the series grows: give Neumann a step_size below 2 / λ"):
        found, *_ = solved(adjoint, Unconstrained(), energy=SmoothEnergy())
    assert (found.report.residuals > 1).all()


def test_an_implicit_gradient_away_from_a_stationary_point_warns_once_and_exposes_residuals():
    energy = SmoothEnergy()
    method = GradientDescent(0.1, 3)
    with pytest.warns(
        UserWarning, match=r"'implicit' differentiates a stationary point, and for 6"
    ):
        found, *_ = solved("implicit", Unconstrained(), method, energy)
    assert (found.residuals > 1e-2).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved("implicit", Unconstrained(), method, energy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved(Implicit(residual_warning=1e9), Unconstrained(), method, SmoothEnergy())


def test_the_report_says_how_each_system_was_solved():
    found, *_ = solved(Implicit(rtol=1e-10), Unconstrained())
    report = found.report
    assert report.name == "implicit"
    assert report.statuses == [Status.CONVERGED] * 6
    assert (report.residuals <= 1e-10).all()
    assert report.num_products == int(report.steps.max()) + 1


def test_cg_notes_an_indefinite_hessian_once_and_minres_solves_it(caplog):
    # E = ½ y² − y₁² + x y has its stationary point at (−x₀, x₁), where GradientDescent is put
    def energy(x, y):
        return 0.5 * y[:, 0] ** 2 - 0.5 * y[:, 1] ** 2 + (x * y).sum(1)

    x = torch.tensor([[0.5, -0.25]], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[-0.5, -0.25]], dtype=torch.float64)
    method = GradientDescent(0.1, 5, gtol=1e-12)
    with caplog.at_level(logging.WARNING, logger="hvpopt"):
        for _ in range(2):
            found = minimize_energy(energy, x, start, method=method, adjoint="implicit")
            found.y.sum().backward()
    assert found.report.statuses == [Status.NEGATIVE_CURVATURE]
    assert len([r for r in caplog.records if "not positive definite" in r.message]) == 1
    x.grad = None
    found = minimize_energy(energy, x, start, method=method, adjoint=Implicit(solver="minres"))
    found.y.sum().backward()
    assert torch.allclose(x.grad, torch.tensor([[-1.0, 1.0]], dtype=torch.float64))


def test_examples_that_diverged_have_no_implicit_gradient():
    # E = x y² diverges for x = 900 by steps of 1, and is solved for x = ½
    x = torch.tensor([[0.5], [900.0]], requires_grad=True)
    found = minimize_energy(
        lambda x, y: (x * y**2 - y).sum(1), x, torch.ones(2, 1), method=GradientDescent(1.0, 40),
        adjoint=Implicit(residual_warning=1e9),
    )  # fmt: skip
    assert found.statuses[1] is InferenceStatus.DIVERGED
    found.y.sum().backward()
    assert x.grad[1] == 0.0
    assert x.grad[0] == pytest.approx(-2.0)  # y = 1 / 2x
