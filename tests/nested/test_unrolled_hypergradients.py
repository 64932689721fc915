"""Hypergradients through an optimizer's steps: the ways to them agree, and with closed forms."""

import pytest
import torch
from torch import Tensor

from hvpopt.nested.adjoints import (
    BackOptimization,
    Checkpointed,
    ForwardMode,
    Implicit,
    Neumann,
    Truncated,
    Unrolled,
)
from hvpopt.nested.hypergradients import hypergradient, unrolled_hypergradient

WHOLE = [
    Unrolled(),
    Checkpointed(),
    Checkpointed(num_segments=2),
    BackOptimization(num_tapes=0),
    BackOptimization(num_tapes=3),
    BackOptimization(),
]
EXACT = [*WHOLE, ForwardMode(), Truncated(num_steps=100)]


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def nonlinear(state, hparams, t):
    """Heavy ball on a network's loss, with a step size for each step and noise of its own."""
    x, y = normal(8, 3, seed=100 + t), normal(8, seed=200 + t)

    def loss(w):
        return ((torch.tanh(x @ w["in"]) @ w["out"] - y) ** 2).mean()

    gradient = torch.func.grad(loss)(state["w"])
    momentum = torch.sigmoid(hparams["momentum"])
    moved = {n: momentum * state["m"][n] - hparams["lr"][t] * g for n, g in gradient.items()}
    return {"w": {n: state["w"][n] + m for n, m in moved.items()}, "m": moved}


def start():
    w = {"in": normal(3, 4, seed=0), "out": normal(4, seed=1)}
    return {"w": w, "m": {n: torch.zeros_like(x) for n, x in w.items()}}


def outer(state, hparams):
    return sum((w**2).sum() for w in state["w"].values()) + hparams["momentum"] ** 2


NUM_STEPS = 7


def hyper():
    lr = torch.linspace(0.1, 0.3, NUM_STEPS, dtype=torch.float64)
    return {"lr": lr, "momentum": torch.tensor(0.5, dtype=torch.float64)}


def by_autograd():
    """The plain unroll: one graph from the start to the outer loss."""
    state, hparams = start(), hyper()
    leaves = [*state["w"].values(), *hparams.values()]
    for x in leaves:
        x.requires_grad_()
    for t in range(NUM_STEPS):
        state = nonlinear(state, hparams, t)
    return outer(state, hparams), torch.autograd.grad(outer(state, hparams), leaves)


@pytest.mark.parametrize("adjoint", EXACT, ids=repr)
def test_every_way_gives_what_autograd_gives_through_the_whole_path(adjoint):
    loss, (by_in, by_out, by_lr, by_momentum) = by_autograd()
    found = unrolled_hypergradient(
        nonlinear, outer, start(), hyper(), num_steps=NUM_STEPS, adjoint=adjoint
    )
    tight = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(found.value["lr"], by_lr, **tight)
    torch.testing.assert_close(found.value["momentum"], by_momentum, **tight)
    torch.testing.assert_close(found.outer_loss, loss.detach(), **tight)
    if isinstance(adjoint, ForwardMode):
        assert found.start_gradient is None
    else:
        torch.testing.assert_close(found.start_gradient["w"]["in"], by_in, **tight)
        torch.testing.assert_close(found.start_gradient["w"]["out"], by_out, **tight)


@pytest.mark.parametrize("adjoint", [*EXACT, "unrolled", "forward"], ids=repr)
def test_two_steps_of_gradient_descent_on_a_parabola_are_as_by_hand(adjoint):
    """w₂ = (1 − 2a)² w₀ for f = w²; dw₂/da = −4 (1 − 2a) w₀."""

    def step(w, a, t):
        return w - a * torch.func.grad(lambda w: (w**2).sum())(w)

    a = torch.tensor(0.2, dtype=torch.float64)
    w = torch.tensor([3.0], dtype=torch.float64)
    found = unrolled_hypergradient(step, lambda w, a: w.sum(), w, a, num_steps=2, adjoint=adjoint)
    torch.testing.assert_close(found.params, 0.36 * w)
    torch.testing.assert_close(found.value, torch.tensor(-4 * 0.6 * 3.0, dtype=torch.float64))
    assert torch.equal(w, torch.tensor([3.0], dtype=torch.float64))


class Quadratic:
    """½ wᵀA w − λᵀw, by gradient descent."""

    def __init__(self) -> None:
        root = normal(5, 5, seed=0)
        self.matrix = root @ root.T + torch.eye(5, dtype=torch.float64)
        self.shift = normal(5, seed=1)
        self.step_size = 1 / float(torch.linalg.eigvalsh(self.matrix)[-1])

    def inner(self, w, shift):
        return 0.5 * w @ self.matrix @ w - shift @ w

    def outer(self, w, shift):
        return torch.cos(w).sum()

    def step(self, w, shift, t):
        return w - self.step_size * torch.func.grad(self.inner)(w, shift)


@pytest.mark.parametrize(
    "adjoint", [Unrolled(), Checkpointed(), BackOptimization(), ForwardMode()], ids=repr
)
def test_at_convergence_all_agree_with_implicit_and_neumann_and_the_closed_form(adjoint):
    q = Quadratic()
    w = torch.linalg.solve(q.matrix, q.shift)
    expected = torch.linalg.solve(q.matrix, -torch.sin(w))
    found = unrolled_hypergradient(
        q.step, q.outer, torch.zeros_like(w), q.shift, num_steps=600, adjoint=adjoint
    )
    torch.testing.assert_close(found.params, w, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-8)
    for solved in (
        Implicit(rtol=1e-12),
        Implicit(solver="minres", rtol=1e-12),
        Neumann(num_terms=600, step_size=q.step_size),
    ):
        implicit = hypergradient(q.inner, q.outer, found.params, q.shift, adjoint=solved)
        torch.testing.assert_close(implicit.value, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_truncation_at_a_solution_is_the_cut_neumann_series(num_steps):
    q = Quadratic()
    w = torch.linalg.solve(q.matrix, q.shift)
    cut = Truncated(num_steps=num_steps)
    found = unrolled_hypergradient(q.step, q.outer, w, q.shift, num_steps=10, adjoint=cut)
    series = Neumann(num_terms=num_steps, step_size=q.step_size)
    expected = hypergradient(q.inner, q.outer, w, q.shift, adjoint=series)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-12)
    assert found.start_gradient is None


@pytest.mark.parametrize(
    ("adjoint", "runs"),
    [
        (Unrolled(), 9),
        (Truncated(num_steps=4), 9),
        (ForwardMode(), 9),
        (BackOptimization(num_tapes=0), 9 + 8),  # all but the last step run again
        (BackOptimization(num_tapes=1), 9 + 8),
        (BackOptimization(num_tapes=4), 9 + 5),
        (BackOptimization(num_tapes=9), 9),
        (BackOptimization(num_tapes=50), 9),
        (Checkpointed(), 9 + 6),  # all but the last of three tapes
        (Checkpointed(num_segments=9), 9 + 8),
        (Checkpointed(num_segments=50), 9 + 8),
    ],
    ids=repr,
)
def test_steps_run_as_often_as_the_memory_saved_costs(adjoint, runs):
    calls = []

    def step(w, h, t):
        calls.append(t)
        return w * h

    w, h = torch.ones(2, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    found = unrolled_hypergradient(step, lambda w, h: w.sum(), w, h, num_steps=9, adjoint=adjoint)
    assert len(calls) == found.num_step_runs == runs
    expected = 2 * 9 * h**8
    if not isinstance(adjoint, Truncated):
        torch.testing.assert_close(found.value, expected)


def test_at_most_one_tape_of_the_steps_is_alive_at_a_time():
    """Counts the tensors that the tapes hold by a node that each step leaves in its graph."""
    alive, most = set(), [0]

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = Token()
            most[0] = max(most[0], len(alive))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Token:
        def __init__(self):
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    def largest(adjoint):
        most[0] = 0
        w, h = torch.ones(2), torch.tensor(0.9)
        unrolled_hypergradient(
            lambda w, h, t: Noted.apply(w * h),
            lambda w, h: w.sum(),
            w,
            h,
            num_steps=16,
            adjoint=adjoint,
        )
        return most[0]

    assert largest(Unrolled()) == 16
    assert largest(Checkpointed()) <= 5
    assert largest(BackOptimization(num_tapes=0)) <= 2
    assert largest(BackOptimization(num_tapes=3)) <= 4


def test_steps_by_plain_autograd_and_under_inference_mode_work_too():
    def step(w, a, t):
        return w - a * torch.autograd.grad((w**2).sum(), w, create_graph=True)[0]

    w, a = torch.tensor([3.0]), torch.tensor(0.25)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = unrolled_hypergradient(step, lambda w, a: w.sum(), w, a, num_steps=2)
            torch.testing.assert_close(found.value, torch.tensor(-6.0))
        assert not found.params.requires_grad


GOOD = {
    "step": lambda w, h, t: w * h,
    "outer_loss": lambda w, h: w.sum(),
    "params": torch.ones(2),
    "hparams": torch.ones(2),
    "num_steps": 3,
}


@pytest.mark.parametrize("adjoint", [BackOptimization(num_tapes=2), Checkpointed()], ids=repr)
def test_steps_that_run_again_meet_the_same_dropout_masks(adjoint):
    def step(w, h, t):
        return w * (1 + h * torch.nn.functional.dropout(torch.ones(2), 0.5))

    given = {**GOOD, "step": step, "num_steps": 6}
    torch.manual_seed(0)
    expected = unrolled_hypergradient(**given, adjoint=Unrolled())
    after = torch.get_rng_state()
    torch.manual_seed(0)
    found = unrolled_hypergradient(**given, adjoint=adjoint)
    torch.testing.assert_close(found.value, expected.value)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("adjoint", [BackOptimization(num_tapes=2), Checkpointed()], ids=repr)
def test_a_step_that_draws_anew_when_it_runs_again_is_found_out(adjoint):
    generator = torch.Generator().manual_seed(0)
    given = {**GOOD, "step": lambda w, h, t: w * h + torch.randn(2, generator=generator)}
    with pytest.raises(ValueError, match=r"draw its random numbers from a generator .* seeded"):
        unrolled_hypergradient(**given, adjoint=adjoint)
    unrolled_hypergradient(**given, adjoint=Unrolled())  # runs once
