"""Energies made of operations that need other kernels, other precisions, and their memory."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from nested.smooth_energy import gradients, relative_error
from torch import nn

from hvpopt.nested import (
    BackOptimization,
    Checkpointed,
    GradientDescent,
    Truncated,
    minimize_energy,
)

DESCENT = GradientDescent(0.1, 5)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.Softplus(), nn.Conv2d(3, 2, 3), nn.SiLU()
        ).double()

    def forward(self, x, y):
        image = y.view(-1, 1, 4, 4)
        return ((y - x) ** 2).sum(1) + self.net(image).flatten(1).sum(1)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12, dtype=torch.float64)

    def forward(self, x, y):
        q, k, v = self.qkv(y.view(-1, 4, 4)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).flatten(1).square().sum(1) + (
            y - x
        ).square().sum(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 3, batch_first=True, dtype=torch.float64)

    def forward(self, x, y):
        return self.gru(y.view(-1, 4, 4))[0].flatten(1).sum(1) + (y - x).square().sum(1)


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        inner = nn.Linear(16, 3, dtype=torch.float64)
        self.inner = nn.utils.parametrizations.weight_norm(inner)
        self.norm = nn.LayerNorm(16, dtype=torch.float64)

    def forward(self, x, y):
        return F.softplus(self.inner(self.norm(y))).sum(1) + (y - x).square().sum(1)


@pytest.mark.parametrize("make", [Images, Attending, Recurrent, Normalised])
def test_gradients_through_awkward_operations_are_those_of_differences(make):
    torch.manual_seed(0)
    energy = make()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    y0, target = torch.zeros(3, 16, dtype=torch.float64) + 0.1 * x.detach(), torch.rand(3, 16)

    def loss(adjoint):
        y = minimize_energy(energy, x, y0, method=DESCENT, adjoint=adjoint).y
        return ((y - target) ** 2).sum()

    of = [*energy.parameters(), x]
    generator, h = torch.Generator().manual_seed(1), 1e-5
    v = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in of]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(of, v, strict=True):
                p += sign * h * d
            values.append(float(loss("back_optimization")))
            for p, d in zip(of, v, strict=True):
                p -= sign * h * d
    slope = (values[0] - values[1]) / (2 * h)
    found = []
    for adjoint in (
        BackOptimization(num_tapes=2),
        BackOptimization(products="forward_over_reverse"),
        Checkpointed(2),
        "unrolled",
    ):
        loss(adjoint).backward()
        found.append(gradients(energy, x))
        along = sum(float((g * d).sum()) for g, d in zip(found[-1], v, strict=True))
        assert along == pytest.approx(slope, rel=1e-6)
    for other in found[:3]:
        assert relative_error(other, found[3]) < 1e-10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")  # dynamo's own
def test_a_compiled_energy_runs_eagerly_where_it_is_differentiated_twice():
    torch.manual_seed(0)
    energy = Normalised()
    x = torch.randn(3, 16, dtype=torch.float64)
    y0 = torch.zeros(3, 16, dtype=torch.float64)
    expected = minimize_energy(energy, x, y0, method=DESCENT)
    expected.y.square().sum().backward()
    theta = gradients(energy)
    found = minimize_energy(torch.compile(energy, backend="aot_eager"), x, y0, method=DESCENT)
    found.y.square().sum().backward()
    assert torch.allclose(found.y, expected.y)
    assert relative_error(gradients(energy), theta) < 1e-12


def test_the_backward_pass_runs_under_the_autocast_of_the_inference():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 1))
    seen = []

    def energy(x, y):
        inner = net[0](y)
        seen.append(inner.dtype)
        return net[2](net[1](inner)).squeeze(1).float() + ((y - x) ** 2).sum(1)

    x, y0 = torch.randn(3, 4), torch.zeros(3, 4)
    results = []
    for adjoint in (BackOptimization(num_tapes=0), "unrolled"):
        with torch.autocast("cpu", torch.bfloat16):
            y = minimize_energy(energy, x, y0, method=DESCENT, adjoint=adjoint).y
        y.square().sum().backward()
        results.append(gradients(net))
    assert set(seen) == {torch.bfloat16}
    assert relative_error(*results) < 1e-2  # bfloat16 has three digits


class _Counted(torch.autograd.Function):
    """The identity, whose graph node is counted while it lives."""

    @staticmethod
    def forward(ctx, y, nodes):
        ctx.nodes = nodes
        nodes.add(ctx)
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


def most_nodes_alive(adjoint, num_steps):
    """The most energy graphs that live at a time, in the inference and its backward pass."""
    nodes, most = weakref.WeakSet(), 0
    weight = torch.ones(2, requires_grad=True)

    def energy(x, y):
        nonlocal most
        value = (weight * _Counted.apply(y, nodes) ** 2).sum(1)
        most = max(most, len(nodes))
        return value

    found = minimize_energy(
        energy, None, torch.ones(1, 2), method=GradientDescent(0.01, num_steps), adjoint=adjoint
    )
    found.y.sum().backward()
    return most


@pytest.mark.parametrize(
    ("adjoint", "limit"),
    [(BackOptimization(num_tapes=0), 3), (BackOptimization(num_tapes=4), 7), (Truncated(2), 3)],
)
def test_the_tapes_that_are_kept_do_not_grow_with_the_number_of_steps(adjoint, limit):
    counts = [most_nodes_alive(adjoint, n) for n in (10, 30)]
    assert counts[0] == counts[1] <= limit
    assert most_nodes_alive("unrolled", 30) >= 30


def test_checkpointing_keeps_the_tape_of_one_segment():
    assert most_nodes_alive(Checkpointed(6), 36) <= 9
    assert most_nodes_alive(Checkpointed(3), 36) >= 12


def test_results_that_are_dropped_free_their_memory():
    energy, x = Normalised(), torch.randn(3, 16, dtype=torch.float64)
    found = minimize_energy(energy, x, torch.zeros(3, 16, dtype=torch.float64), method=DESCENT)
    y = weakref.ref(found.y)
    gc.disable()
    try:
        del found
        assert y() is None  # without the collector: there is no cycle
    finally:
        gc.enable()
