"""How many tapes back-optimisation keeps, and that the steps which it records are the same."""

import pytest
import torch
from nested.smooth_energy import gradients, problem, relative_error
from torch import nn

from hvpopt.nested import (
    BackOptimization,
    Box,
    Checkpointed,
    GradientDescent,
    InferenceStatus,
    minimize_energy,
)
from hvpopt.nested.problem import InnerProblem


def test_there_are_as_many_tapes_as_32_mib_hold_between_8_and_64():
    number = BackOptimization().num_tapes_of
    assert [number(size) for size in (0, 1, 2**19, 2**20, 2**21, 2**30)] == [64, 64, 64, 32, 16, 8]
    assert BackOptimization(num_tapes=3).num_tapes_of(1) == 3


class Wide(nn.Module):
    """Two layers of 64 units."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(30, 64), nn.Softplus(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 1)
        )

    def forward(self, x, y):
        return self.net(torch.cat([x, y], dim=1)).squeeze(1)


def test_the_size_of_a_tape_is_about_what_autograd_saves():
    torch.manual_seed(0)
    energy, x, y = Wide(), torch.randn(16, 10), torch.randn(16, 20, requires_grad=True)
    parameters = {p.data_ptr() for p in energy.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        g = torch.autograd.grad(energy(x, y).sum(), y, create_graph=True)
    held = sum(saved.values())
    assert g[0].requires_grad
    found = InnerProblem(energy, x, y, allows_captured=False).tape_bytes
    assert held / 2 < found < 2 * held


def evaluations_alive(adjoint, num_steps):
    """The most gradients whose graphs exist at a time."""
    alive, most = 0, 0

    class Note(torch.autograd.Function):
        """The identity, whose backward's graph is counted while it exists."""

        @staticmethod
        def forward(ctx, y):
            return y.view_as(y)

        @staticmethod
        def backward(ctx, g):
            return Counted.apply(g)

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, g):
            nonlocal alive, most
            if torch.is_grad_enabled() or g.requires_grad:
                ctx.token = Token()
            return g.view_as(g)

        @staticmethod
        def backward(ctx, g):
            return g

    class Token:
        def __init__(self):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    weight = torch.ones(3, requires_grad=True)
    found = minimize_energy(
        lambda x, y: (Note.apply(y) ** 2 * weight).sum(1),
        None,
        torch.ones(2, 3),
        method=GradientDescent(0.1, num_steps),
        adjoint=adjoint,
    )
    found.y.sum().backward()
    return most


@pytest.mark.parametrize(
    ("adjoint", "expected"),
    [
        ("unrolled", (40, 80)),
        (BackOptimization(num_tapes=0), (1, 1)),
        (BackOptimization(num_tapes=5), (5, 5)),
        (BackOptimization(), (40, 64)),
        (Checkpointed(10), (4, 8)),
    ],
)
def test_no_more_graphs_exist_at_a_time_than_there_may_be_tapes(adjoint, expected):
    assert tuple(evaluations_alive(adjoint, steps) for steps in (40, 80)) == expected


@pytest.mark.parametrize("num_tapes", [1, 3, 20])
@pytest.mark.parametrize("keep_iterates", [False, True])
def test_examples_that_end_before_or_in_the_recorded_steps_keep_their_gradient(
    num_tapes, keep_iterates
):
    found = []
    for adjoint in ("unrolled", BackOptimization(num_tapes=num_tapes)):
        energy, x, target = problem()
        inference = minimize_energy(
            energy,
            x,
            torch.full((6, 5), 0.5, dtype=torch.float64),
            method=GradientDescent(0.1, 28, rtol=5e-3),
            domain=Box(),
            adjoint=adjoint,
            keep_iterates=keep_iterates,
        )
        loss = ((inference.y - target) ** 2).sum()
        if keep_iterates:
            loss = loss + (inference.iterates**2).sum()
        loss.backward()
        found.append(gradients(energy, x))
    steps = inference.steps.tolist()
    assert min(steps) < 25 < max(steps) == 28  # with a few tapes, before and after they begin
    assert relative_error(found[1], found[0]) < 1e-12


def test_a_diverged_example_has_the_unrolled_gradient_up_to_its_end():
    def gradient(adjoint):
        x = torch.tensor([[0.5], [900.0]], dtype=torch.float64, requires_grad=True)
        found = minimize_energy(
            lambda x, y: (x * y**2 - y).sum(1) + (y**4).sum(1) * (x[:, 0] > 1),
            x,
            torch.full((2, 1), 0.1, dtype=torch.float64),
            method=GradientDescent(0.1, 12),
            adjoint=adjoint,
        )
        assert found.statuses[1] is InferenceStatus.DIVERGED
        assert 0 < found.steps[1] < 12
        found.y[0].sum().backward()
        return x.grad

    expected = gradient("unrolled")
    for adjoint in (BackOptimization(), BackOptimization(num_tapes=1), Checkpointed()):
        assert torch.allclose(gradient(adjoint), expected, rtol=1e-13)
