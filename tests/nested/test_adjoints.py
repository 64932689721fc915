import pytest
import torch
from nested.smooth_energy import few_parameters, gradients, problem, relative_error
from torch import nn

from hvpopt.nested import (
    BackOptimization,
    Backtracking,
    Box,
    Checkpointed,
    ForwardMode,
    GradientDescent,
    HeavyBall,
    Logits,
    MirrorDescent,
    Simplex,
    SoftmaxLogits,
    Truncated,
    Unconstrained,
    minimize_energy,
)

FOLLOWING = [
    BackOptimization(),
    BackOptimization(num_tapes=0),
    BackOptimization(num_tapes=2, products="reverse_over_reverse"),
    BackOptimization(products="forward_over_reverse"),
    Checkpointed(),
    Checkpointed(1),
    Checkpointed(4),
]
WAYS = {
    "descent": (GradientDescent(0.2, 8), Unconstrained()),
    "descent on a box, stopping": (GradientDescent(0.3, 30, rtol=1e-3), Box()),
    "descent on the simplex": (GradientDescent(0.3, 8, rtol=1e-2), Simplex()),
    "descent on logits": (GradientDescent(0.5, 8), Logits(-1.0, 2.0, entropy=0.3)),
    "heavy ball": (HeavyBall(0.1, 8, momentum=0.9), Unconstrained()),
    "heavy ball on a box": (HeavyBall(0.1, 8, momentum=0.9), Box(-0.2, 0.2)),
    "mirror descent": (MirrorDescent(0.3, 8), Box(entropy=0.2)),
    "mirror descent on the simplex": (MirrorDescent(0.3, 8, rtol=1e-2), Simplex(entropy=0.2)),
    "line search": (
        GradientDescent(30.0, 6, line_search=Backtracking(), rtol=1e-3),
        SoftmaxLogits(entropy=0.2),
    ),
}


def loss_gradients(adjoint, method, domain, *, keep_iterates=False, few=False):
    """The gradients by θ, x, y0 and the step size, of a loss on the last or on every iterate."""
    energy, x, target = problem()
    energy = few_parameters(energy) if few else energy
    y0 = domain.center((6, 5), dtype=torch.float64).requires_grad_()
    found = minimize_energy(
        energy, x, y0, method=method, domain=domain, adjoint=adjoint, keep_iterates=keep_iterates
    )
    loss = ((found.y - target) ** 2).sum()
    if keep_iterates:
        weights = torch.arange(1.0, len(found.iterates) + 1, dtype=torch.float64)
        loss = loss + (weights[:, None, None] * found.iterates**2).sum()
    loss.backward()
    sizes = [method.step_size] if isinstance(method.step_size, torch.Tensor) else []
    return gradients(energy, x, y0, *sizes)


@pytest.mark.parametrize("keep_iterates", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_adjoint_that_follows_the_steps_gives_the_unrolled_gradient(way, keep_iterates):
    method, domain = WAYS[way]
    expected = loss_gradients("unrolled", method, domain, keep_iterates=keep_iterates)
    assert all(e.abs().max() > 0 for e in expected)
    for adjoint in FOLLOWING:
        found = loss_gradients(adjoint, method, domain, keep_iterates=keep_iterates)
        assert relative_error(found, expected) < 1e-12, adjoint


@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_gives_the_unrolled_gradient(way):
    method, domain = WAYS[way]
    expected = loss_gradients("unrolled", method, domain, few=True)
    found = loss_gradients(ForwardMode(), method, domain, few=True)
    assert relative_error(found, expected) < 1e-11


@pytest.mark.parametrize("shape", [(), (6,), (8, 1), (8, 6)])
@pytest.mark.parametrize("domain", [Unconstrained(), Logits()])
def test_gradients_flow_into_step_sizes_of_every_shape(shape, domain):
    def method():
        return GradientDescent(torch.full(shape, 0.2, dtype=torch.float64).requires_grad_(), 8)

    expected = loss_gradients("unrolled", method(), domain, few=True)
    assert expected[-1].abs().min() > 0
    for adjoint in (*FOLLOWING, ForwardMode()):
        found = loss_gradients(adjoint, method(), domain, few=True)
        assert relative_error(found, expected) < 1e-11, adjoint


def test_a_searched_step_is_its_factor_times_a_step_size_that_is_learned():
    def method():
        size = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        return GradientDescent(size, 5, line_search=Backtracking())

    expected = loss_gradients("unrolled", method(), Unconstrained(), few=True)
    for adjoint in (*FOLLOWING, ForwardMode()):
        found = loss_gradients(adjoint, method(), Unconstrained(), few=True)
        assert relative_error(found, expected) < 1e-11


@pytest.mark.parametrize("way", ["descent", "descent on logits", "heavy ball"])
def test_the_unrolled_gradient_is_that_of_differences(way):
    method, domain = WAYS[way]
    energy, x, target = problem()
    y0 = domain.center((6, 5), dtype=torch.float64)

    def loss():
        with torch.no_grad():
            y = minimize_energy(energy, x, y0, method=method, domain=domain).y
        return float(((y - target) ** 2).sum())

    found = minimize_energy(energy, x, y0, method=method, domain=domain, adjoint="unrolled")
    ((found.y - target) ** 2).sum().backward()
    generator, h = torch.Generator().manual_seed(3), 1e-6
    for p in (*energy.parameters(), x):
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            p += h * direction
            above = loss()
            p -= 2 * h * direction
            below = loss()
            p += h * direction
        slope = (above - below) / (2 * h)  # with an error of about h² + 1e-16 / h
        assert float((p.grad * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_one_truncated_step_is_the_derivative_of_the_last_step_alone():
    energy, x, target = problem()
    alpha = 0.2
    found = minimize_energy(
        energy, x, torch.zeros(6, 5, dtype=torch.float64), method=GradientDescent(alpha, 9),
        adjoint="truncated",
    )  # fmt: skip
    ((found.y - target) ** 2).sum().backward()
    one = gradients(energy, x)
    with torch.no_grad():
        before = minimize_energy(energy, x, torch.zeros(6, 5, dtype=torch.float64),
                                 method=GradientDescent(alpha, 8)).y  # fmt: skip
    before.requires_grad_()
    (g,) = torch.autograd.grad(energy(x, before).sum(), before, create_graph=True)
    ((before.detach() - alpha * g - target) ** 2).sum().backward()
    assert relative_error(one, gradients(energy, x)) < 1e-12
    assert found.report.num_products == 1


def test_truncation_counts_back_from_each_examples_own_end():
    method, domain = WAYS["descent on a box, stopping"]
    energy, x, target = problem()
    y0 = torch.full((6, 5), 0.5, dtype=torch.float64)
    together = minimize_energy(energy, x, y0, method=method, domain=domain, adjoint=Truncated(3))
    assert len(set(together.steps.tolist())) > 2
    ((together.y - target) ** 2).sum().backward()
    found = gradients(energy, x)
    for i in range(6):
        one = minimize_energy(
            energy, x[i : i + 1], y0[:1], method=method, domain=domain, adjoint=Truncated(3)
        )
        ((one.y - target[i : i + 1]) ** 2).sum().backward()
    assert relative_error(found, gradients(energy, x)) < 1e-12


def test_truncation_to_all_steps_is_back_optimisation_but_for_the_start():
    method, domain = WAYS["heavy ball"]
    expected = loss_gradients("back_optimization", method, domain)
    found = loss_gradients(Truncated(8), method, domain)
    assert relative_error([*found[:-1]], [*expected[:-1]]) < 1e-13
    assert not found[-1].any()


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()

    def forward(self, z):
        return self.net(z)


@pytest.mark.parametrize("adjoint", ["unrolled", *FOLLOWING, ForwardMode()])
def test_gradients_reach_the_network_that_computed_x(adjoint):
    energy, _, target = problem()
    few_parameters(energy)
    torch.manual_seed(1)
    net, z = Features(), torch.randn(6, 3, dtype=torch.float64)
    y0 = torch.zeros(6, 5, dtype=torch.float64)
    loss = []
    for way in (adjoint, "unrolled"):
        y = minimize_energy(energy, net(z), y0, method=GradientDescent(0.2, 6), adjoint=way).y
        ((y - target) ** 2).sum().backward()
        loss.append(gradients(net) + gradients(energy))
    assert loss[0][0].abs().max() > 0
    assert relative_error(loss[0], loss[1]) < 1e-12


def test_products_are_counted_and_iterates_need_no_tape():
    energy, x, target = problem()
    y0 = torch.zeros(6, 5, dtype=torch.float64)
    for adjoint in (BackOptimization(num_tapes=0), BackOptimization()):
        found = minimize_energy(energy, x, y0, method=GradientDescent(0.2, 7), adjoint=adjoint)
        assert (found.num_gradients, found.report.num_products) == (8, 0)
        ((found.y - target) ** 2).sum().backward()
        assert found.report.num_products == 7
        assert found.report.name == "back_optimization"
        assert found.report.statuses == []


def test_a_second_backward_gives_the_same_gradient():
    energy, x, target = problem()
    few_parameters(energy)
    y0 = torch.zeros(6, 5, dtype=torch.float64)
    for adjoint in ("back_optimization", "checkpointed", "truncated", "forward"):
        y = minimize_energy(energy, x, y0, method=GradientDescent(0.2, 5), adjoint=adjoint).y
        loss = ((y - target) ** 2).sum()
        loss.backward(retain_graph=True)
        first = gradients(energy, x)
        loss.backward()
        assert relative_error(gradients(energy, x), first) < 1e-13


def test_nothing_is_computed_for_what_needs_no_gradient():
    energy, x, _ = problem()
    energy.requires_grad_(False)
    y0 = torch.zeros(6, 5, dtype=torch.float64)
    assert not minimize_energy(energy, x.detach(), y0).y.requires_grad
    found = minimize_energy(energy, x, y0)
    found.y.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in energy.parameters())
