"""Gauss-Newton products of a loss that passes through inference."""

import pytest
import torch
import torch.nn.functional as F
from nested.smooth_energy import problem
from torch import nn

from hvpopt.engines.split import SplitNotFoundError
from hvpopt.nested import GradientDescent, Logits
from hvpopt.nested.energies import EncodedEnergy
from hvpopt.nested.losses import EndToEnd, Minimizer, StructuredHinge
from hvpopt.operators import GGNOperator

METHOD = GradientDescent(0.5, 6)


class Features(nn.Module):
    """The encoding of x."""

    def forward(self, x):
        return {"x": x}

    def initial(self, encoding):
        return Logits().center((len(encoding["x"]), 5), dtype=torch.float64)


class Head(nn.Module):
    """An energy of an encoding."""

    def __init__(self, energy):
        super().__init__()
        self.energy = energy

    def forward(self, encoding, y):
        return self.energy(encoding["x"], y)


class HeadWithLoss(Head):
    """An energy with a loss function of torch inside, whose input is no output of the network."""

    def __init__(self, energy):
        super().__init__(energy)
        self.centre = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def forward(self, encoding, y):
        pull = F.mse_loss(y, self.centre.expand_as(y), reduction="none")
        return super().forward(encoding, y) + pull.sum(1)


def setting(adjoint="unrolled", head=Head):
    energy, x, target = problem()
    network = EncodedEnergy(Features(), head(energy))
    minimizer = Minimizer(method=METHOD, domain=Logits(), adjoint=adjoint)
    return network, x.detach(), target, minimizer


def operator_of(loss, adjoint="unrolled", head=Head):
    network, x, target, minimizer = setting(adjoint, head)
    batch = (x, target)
    return GGNOperator(
        lambda batch: loss(network, *batch, minimizer).loss, network.parameters(), [batch]
    )


def curvature_of_error(task_loss, y, target):
    """The second derivatives of Δ by the entries of y, which it sums over."""
    if task_loss == "squared":
        return torch.full_like(y, 2.0)
    return target / y**2 + (1 - target) / (1 - y) ** 2


@pytest.mark.parametrize("head", [Head, HeadWithLoss])
@pytest.mark.parametrize("task_loss", ["squared", "log"])
@pytest.mark.parametrize("iterates", ["last", "all"])
def test_the_product_is_that_of_the_dense_jacobian_of_inference(task_loss, iterates, head):
    network, x, target, minimizer = setting(head=head)
    params = list(network.parameters())
    encoding = network.encoder(x)
    found = minimizer(network.head, encoding, network.initial(encoding), keep_iterates=True)
    if iterates == "last":
        outputs, weights = [found.y], [1.0]
    else:
        outputs = list(found.iterates[1:])
        total = sum(1 / k for k in range(1, 7))
        weights = [1 / (6 - t) / total for t in range(6)]
    size = sum(p.numel() for p in params)
    dense = torch.zeros(size, size, dtype=torch.float64)
    for y, weight in zip(outputs, weights, strict=True):
        J = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=True)])
            for v in y.flatten()
        ])  # fmt: skip
        h = curvature_of_error(task_loss, y.detach(), target).flatten() / len(y)
        dense += weight * J.T @ (h.unsqueeze(1) * J)
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    with operator_of(EndToEnd(task_loss=task_loss, iterates=iterates), head=head) as ggn:
        product = torch.cat([u.flatten() for u in ggn(v)])
    expected = dense @ torch.cat([u.flatten() for u in v])
    assert (product - expected).abs().max() < 1e-10 * expected.abs().max()


def test_an_adjoint_without_second_derivatives_is_refused():
    with (
        pytest.raises(RuntimeError, match=r"Gauss-Newton matrix goes with adjoint='unrolled'"),
        operator_of(EndToEnd(), "back_optimization") as ggn,
    ):
        ggn([torch.zeros_like(p) for p in ggn.params])


def test_a_loss_of_energies_has_no_gauss_newton_matrix():
    with (
        pytest.raises(SplitNotFoundError, match=r"or choose curvature='hessian'"),
        operator_of(StructuredHinge()) as ggn,
    ):
        ggn([torch.zeros_like(p) for p in ggn.params])
