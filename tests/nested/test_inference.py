import math

import pytest
import torch
from nested.smooth_energy import SmoothEnergy, problem
from torch import nn

from hvpopt.nested import (
    Backtracking,
    Box,
    GradientDescent,
    HeavyBall,
    InferenceStatus,
    Logits,
    MirrorDescent,
    NewtonDescent,
    Simplex,
    SoftmaxLogits,
    minimize_energy,
)


def quadratic(x, y):
    """½ Σ aⱼ (yⱼ − cⱼ)², with x = (a, c)."""
    a, c = x
    return 0.5 * (a * (y - c) ** 2).sum(1)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


A, C = rows([1.0, 4.0], [2.0, 0.5], [1.0, 1.0]), rows([1.0, -1.0], [0.5, 2.0], [3.0, 0.0])


def test_gradient_descent_takes_the_steps_of_the_closed_form():
    found = minimize_energy(quadratic, (A, C), torch.zeros_like(C), method=GradientDescent(0.1, 7))
    expected = C * (1 - (1 - 0.1 * A) ** 7)
    assert torch.allclose(found.y, expected, rtol=1e-13)
    assert torch.allclose(found.energies, quadratic((A, C), expected), rtol=1e-13)
    assert torch.allclose(found.residuals, (A * (expected - C)).norm(dim=1), rtol=1e-12)
    assert found.steps.tolist() == [7, 7, 7]
    assert found.statuses == [InferenceStatus.STEP_LIMIT] * 3
    assert found.iterates is None
    assert (found.num_gradients, found.num_rows) == (8, 24)


def test_heavy_ball_is_the_trace_computed_by_hand():
    # E = ½ y², y0 = 1, α = ½, μ = ½: p = −½, y = ½; p = −¼ − ¼ = −½, y = 0; p = −¼, y = −¼
    found = minimize_energy(
        lambda x, y: 0.5 * (y**2).sum(1), None, torch.ones(1, 1),
        method=HeavyBall(0.5, 3, momentum=0.5), keep_iterates=True, adjoint="unrolled",
    )  # fmt: skip
    assert found.iterates.flatten().tolist() == [1.0, 0.5, 0.0, -0.25]
    assert found.energy_path.flatten().tolist() == [0.5, 0.125, 0.0, 0.03125]


def test_mirror_descent_multiplies_by_exponentials():
    b = rows([1.0, -2.0, 0.5])
    y0 = rows([0.2, 0.5, 0.3])
    on_simplex = minimize_energy(
        lambda x, y: (y * x).sum(1), b, y0, method=MirrorDescent(0.3, 4), domain=Simplex()
    )
    weights = y0 * (-4 * 0.3 * b).exp()
    assert torch.allclose(on_simplex.y, weights / weights.sum(), rtol=1e-12)
    on_box = minimize_energy(
        lambda x, y: (y * x).sum(1), b, y0, method=MirrorDescent(0.3, 4), domain=Box()
    )
    assert torch.allclose(on_box.y, torch.sigmoid(torch.logit(y0) - 4 * 0.3 * b), rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "domain"),
    [
        (GradientDescent(2.0, 400, gtol=1e-10), Logits(entropy=1.0)),
        (MirrorDescent(0.5, 400, gtol=1e-10), Box(entropy=1.0)),
        (NewtonDescent(20, gtol=1e-10), Logits(entropy=1.0)),
    ],
)
def test_a_linear_energy_with_entropy_has_the_sigmoid_for_minimiser(method, domain):
    b = rows([1.0, -2.0, 0.5], [0.0, 3.0, -1.0])
    found = minimize_energy(
        lambda x, y: -(y * x).sum(1), b, domain.center((2, 3), dtype=torch.float64),
        method=method, domain=domain,
    )  # fmt: skip
    assert torch.allclose(found.y, b.sigmoid(), atol=1e-9)
    assert found.count(InferenceStatus.CONVERGED) == 2


@pytest.mark.parametrize("domain", [Simplex(entropy=0.5), SoftmaxLogits(entropy=0.5)])
def test_a_linear_energy_with_entropy_has_the_softmax_for_minimiser(domain):
    b = rows([1.0, -2.0, 0.5], [0.0, 3.0, -1.0])
    method = MirrorDescent(0.5, 120) if isinstance(domain, Simplex) else NewtonDescent(30)
    found = minimize_energy(
        lambda x, y: -(y * x).sum(1), b, domain.center((2, 3), dtype=torch.float64),
        method=method, domain=domain,
    )  # fmt: skip
    assert torch.allclose(found.y, (b / 0.5).softmax(1), atol=1e-8)


@pytest.mark.parametrize(
    "method", [GradientDescent(0.2, 200), HeavyBall(0.1, 300, momentum=0.8), NewtonDescent(20)]
)
def test_a_box_clamps_a_separable_quadratic(method):
    found = minimize_energy(quadratic, (A, C), torch.full_like(C, 0.5), method=method, domain=Box())
    assert torch.allclose(found.y, C.clamp(0, 1), atol=1e-10)
    assert (found.residuals < 1e-9).all()


def test_newton_takes_one_step_to_the_minimiser_of_a_quadratic():
    found = minimize_energy(
        quadratic, (A, C), torch.zeros_like(C), method=NewtonDescent(5, gtol=1e-12, cg_rtol=0.0)
    )
    assert torch.allclose(found.y, C, rtol=1e-12)
    assert found.steps.tolist() == [1, 1, 1]


def test_newton_converges_quadratically_on_a_smooth_energy():
    energy, x, _ = problem()
    start = torch.zeros(6, 5, dtype=torch.float64)
    with torch.no_grad():
        newton = minimize_energy(energy, x, start, method=NewtonDescent(10, gtol=1e-10))
        plain = minimize_energy(energy, x, start, method=GradientDescent(0.4, 500, gtol=1e-11))
    assert (newton.steps <= 6).all()
    assert newton.count(InferenceStatus.CONVERGED) == 6
    assert torch.allclose(newton.y, plain.y, atol=1e-9)


def test_newton_leaves_a_place_of_negative_curvature():
    # E = y⁴/4 − y²/2 has its minimum at 1 and curvature −1 + 3 y² at y
    found = minimize_energy(
        lambda x, y: (y**4 / 4 - y**2 / 2).sum(1), None, rows([0.1]),
        method=NewtonDescent(30, gtol=1e-10),
    )  # fmt: skip
    assert float(found.y) == pytest.approx(1.0, abs=1e-9)


def test_each_example_is_what_it_is_alone_whatever_the_others_do():
    energy, x, _ = problem()
    method = GradientDescent(3.0, 60, rtol=1e-6, line_search=Backtracking())
    start = torch.zeros(6, 5, dtype=torch.float64)
    with torch.no_grad():
        together = minimize_energy(energy, x, start, method=method, domain=Box(-1, 1))
        alone = [
            minimize_energy(energy, x[i : i + 1], start[:1], method=method, domain=Box(-1, 1))
            for i in range(6)
        ]
    assert len(set(together.steps.tolist())) > 1
    assert together.steps.tolist() == [int(one.steps) for one in alone]
    assert torch.allclose(together.y, torch.cat([one.y for one in alone]), rtol=1e-12, atol=1e-13)
    assert torch.allclose(together.residuals, torch.cat([r.residuals for r in alone]), atol=1e-12)


def test_examples_that_have_finished_cost_nothing_more():
    seen = []

    def energy(x, y):
        seen.append(len(y))
        return quadratic(x, y)

    a = rows([1.0, 1.0], [0.02, 1.0], [1.0, 1.0])
    found = minimize_energy(energy, (a, C), C * 0 + 4, method=GradientDescent(1.0, 30, gtol=1e-8))
    assert found.steps.tolist() == [1, 30, 1]
    assert [s.name for s in found.statuses] == ["CONVERGED", "STEP_LIMIT", "CONVERGED"]
    assert seen == [3, 3, 3] + [1] * 29  # the first is the probe
    assert found.num_rows == 3 + 3 + 29
    assert found.energy_path.shape == (31, 3)
    assert torch.equal(found.energy_path[1:, 0], found.energies[:1].expand(30))


def test_an_example_that_starts_at_its_minimiser_takes_no_step():
    found = minimize_energy(quadratic, (A, C), C, method=GradientDescent(0.1, 9, gtol=1e-9))
    assert found.steps.tolist() == [0, 0, 0]
    assert torch.equal(found.y, C)
    assert found.energy_path.shape == (1, 3)


def test_relative_change_ends_an_example():
    found = minimize_energy(quadratic, (A[2:], C[2:]), C[2:] * 0, method=GradientDescent(0.5, 99,
                            rtol=1e-3), keep_iterates=True, adjoint="unrolled")  # fmt: skip
    path, last = found.iterates[:, 0], int(found.steps)
    changes = (path[1:] - path[:-1]).norm(dim=1) / path[1:].norm(dim=1)
    assert (changes[:-1] > 1e-3).all()
    assert changes[-1] <= 1e-3
    assert len(path) == last + 1
    assert last == math.ceil(math.log2(1001)) == 10


def test_a_line_search_finds_armijos_step_for_each_example():
    # E = ½ a y², from y = 1 with α₀ = 1: the first 2⁻ᵏ with (1 − α a)² ≤ 1 − 2 c α a
    a = rows([1.0], [3.0], [9.0], [40.0])
    found = minimize_energy(
        lambda x, y: 0.5 * (x * y**2).sum(1), a, torch.ones_like(a),
        method=GradientDescent(1.0, 1, line_search=Backtracking(sufficient_decrease=0.3)),
    )  # fmt: skip

    def passes(alpha, a):
        return (1 - alpha * a) ** 2 <= 1 - 2 * 0.3 * alpha * a

    steps = [next(2.0**-k for k in range(20) if passes(2.0**-k, float(v))) for v in a]
    assert torch.allclose(found.y, 1 - torch.tensor(steps, dtype=torch.float64)[:, None] * a)


def test_a_line_search_without_success_is_a_status():
    # |y| from 0.1: no step of length 2⁻ᵏ, k < 2, lowers it
    found = minimize_energy(
        lambda x, y: (y**2 + 1e-12).sqrt().sum(1), None, rows([0.1], [0.9]),
        method=GradientDescent(1.0, 5, line_search=Backtracking(max_trials=1)),
    )  # fmt: skip
    assert found.statuses[0] is InferenceStatus.LINE_SEARCH_FAILED
    assert int(found.steps[0]) == 0
    assert float(found.y[0]) == pytest.approx(0.1)
    assert int(found.steps[1]) == 1


@pytest.mark.parametrize("adjoint", ["unrolled", "back_optimization", "truncated", "implicit"])
@pytest.mark.filterwarnings("ignore:adjoint='implicit' differentiates:UserWarning")
def test_a_batch_may_end_as_a_whole(adjoint):
    x = rows([1.0], [1.0]).requires_grad_()
    failing = minimize_energy(
        lambda x, y: (x * y**2 + 1e-12).sqrt().sum(1), x, rows([0.1], [0.2]), adjoint=adjoint,
        method=GradientDescent(1.0, 5, line_search=Backtracking(max_trials=1)), domain=Box(-9, 9),
    )  # fmt: skip
    assert failing.count(InferenceStatus.LINE_SEARCH_FAILED) == 2
    assert failing.y.flatten().tolist() == [0.1, 0.2]
    diverging = minimize_energy(
        lambda x, y: (x * y**4).sum(1), x, rows([9e50], [-9e50]), adjoint=adjoint,
        method=GradientDescent(1.0, 5), max_diverged=1.0,
    )  # fmt: skip
    assert diverging.count(InferenceStatus.DIVERGED) == 2
    assert diverging.steps.tolist() == [0, 0]
    (failing.y.sum() + diverging.y.sum()).backward()
    arriving = minimize_energy(quadratic, (A, C), C, method=GradientDescent(0.1, 9, gtol=1e-9))
    assert arriving.count(InferenceStatus.CONVERGED) == 3


def test_step_sizes_may_differ_by_example_and_by_step():
    sizes = rows([0.1, 0.2, 0.3], [0.3, 0.1, 0.2])
    found = minimize_energy(quadratic, (A, C), C * 0, method=GradientDescent(sizes, 2))
    expected = C * (1 - (1 - sizes[0][:, None] * A) * (1 - sizes[1][:, None] * A))
    assert torch.allclose(found.y, expected)
    by_step = minimize_energy(quadratic, (A, C), C * 0, method=GradientDescent(sizes[:, :1], 2))
    expected = C * (1 - (1 - 0.1 * A) * (1 - 0.3 * A))
    assert torch.allclose(by_step.y, expected)


def test_images_and_trees_keep_their_shapes():
    x = {"noisy": torch.rand(2, 1, 4, 4), "scale": torch.tensor([1.0, 2.0]), "name": "kept"}

    def energy(x, y):
        assert x["name"] == "kept"
        return x["scale"] * ((y - x["noisy"]) ** 2).flatten(1).sum(1)

    found = minimize_energy(energy, x, torch.zeros(2, 1, 4, 4), method=GradientDescent(0.2, 60))
    assert torch.allclose(found.y, x["noisy"], atol=1e-5)


def test_single_precision_and_modules_work_under_no_grad():
    energy = SmoothEnergy().float()
    with torch.no_grad():
        found = minimize_energy(
            energy,
            torch.randn(3, 4),
            torch.zeros(3, 5),
            method=GradientDescent(0.3, 200, gtol=1e-5),
        )
    assert found.y.dtype == torch.float32
    assert not found.y.requires_grad
    assert all(p.grad is None for p in energy.parameters())
    assert found.fraction(InferenceStatus.CONVERGED) == 1.0
    assert isinstance(energy, nn.Module)
