"""Feed-forward networks as energies, and the loss that trains them."""

import numpy as np
import pytest
import torch
from torch import nn

from hvpopt.nested import GradientDescent, Unconstrained, minimize_energy
from hvpopt.nested.energies import feedforward, spen
from hvpopt.nested.losses import FirstGuess


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_energy_of_a_network_is_half_the_squared_distance_to_its_output():
    net = nn.Linear(3, 2)
    energy, x, y = feedforward(net), torch.randn(4, 3), torch.randn(4, 2)
    guess = x.numpy() @ net.weight.detach().numpy().T + net.bias.detach().numpy()
    expected = 0.5 * ((y.numpy() - guess) ** 2).sum(1)
    np.testing.assert_allclose(energy(x, y).detach().numpy(), expected, rtol=1e-12)
    assert [name for name, _ in energy.named_parameters()] == [
        "encoder.net.weight",
        "encoder.net.bias",
    ]


def test_a_step_of_length_one_from_anywhere_finds_the_networks_output():
    net = nn.Conv2d(1, 1, 3, padding=1)
    energy, x = feedforward(net), torch.randn(2, 1, 4, 4)
    encoding = energy.encoder(x)
    assert torch.equal(energy.initial(encoding), net(x))
    found = minimize_energy(
        energy.head,
        encoding,
        torch.randn(2, 1, 4, 4),
        method=GradientDescent(1.0, 1),
        domain=Unconstrained(),
        adjoint="unrolled",
    )
    torch.testing.assert_close(found.y, net(x))
    (slope,) = torch.autograd.grad(found.y.sum(), net.bias)
    assert float(slope) == pytest.approx(32)  # as of the output itself


def squared(y, target):
    return ((y - target) ** 2).sum(1).mean()


def log(y, target):
    return -(target * np.log(y) + (1 - target) * np.log(1 - y)).sum(1).mean()


def soft_f1(y, target):
    return (1 - 2 * np.minimum(y, target).sum(1) / (y + target).sum(1)).mean()


@pytest.mark.parametrize("formula", [squared, log, soft_f1])
def test_the_loss_is_the_task_loss_of_the_first_guess(formula):
    energy, x = spen(3, 2, widths=[]), torch.randn(5, 3)
    target = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 1], [1, 0]])
    loss = FirstGuess(task_loss=formula.__name__)
    value = loss(energy, x, target, None)
    scores = energy.encoder(x)["scores"].detach().numpy()
    expected = formula(1 / (1 + np.exp(-scores)), target.numpy())
    assert float(value.loss.detach()) == pytest.approx(expected, rel=1e-12)
    assert value.inference is None
    assert not loss.needs_inference
    value.loss.backward()
    assert energy.encoder.scores.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in energy.head.parameters())


def test_targets_of_another_shape_and_unknown_losses_are_refused():
    energy = feedforward(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="target has shape"):
        FirstGuess(task_loss="squared")(energy, torch.randn(4, 3), torch.randn(4, 1), None)
    with pytest.raises(ValueError, match="task_loss='l1' is unknown"):
        FirstGuess(task_loss="l1")
