"""Energies whose minima are known in closed form."""

import torch
from torch import nn

from hvpopt.nested import GradientDescent, Unconstrained
from hvpopt.nested.energies import EncodedEnergy
from hvpopt.nested.losses import Minimizer


class LinearScores(nn.Module):
    """s(x) = W x, with a given W."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x):
        return {"scores": x @ self.weight.T}

    def initial(self, encoding):
        return torch.sigmoid(encoding["scores"])


class Bowl(nn.Module):
    """a/2 ‖y − s‖²."""

    def __init__(self, steepness):
        super().__init__()
        self.steepness = steepness

    def forward(self, encoding, y):
        return 0.5 * self.steepness * (y - encoding["scores"]).square().sum(1)


class Slope(nn.Module):
    """−⟨y, s⟩, the local term alone, with an offset to learn."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(0.3))

    def forward(self, encoding, y):
        return self.offset - (y * encoding["scores"]).sum(1)


def toy(head, num_inputs=3, num_labels=4, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_labels, num_inputs, generator=generator, dtype=torch.float64)
    return EncodedEnergy(LinearScores(scale * weight), head).double()


def rows(count=5, num_inputs=3, num_labels=4):
    """Inputs, and right labels of zeros and ones, with a one in each row."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, num_inputs, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 2, (count, num_labels), generator=generator).double()
    target[:, 0] = 1
    return x, target


def descent(step_size=0.2, num_steps=4, **options):
    options = {"domain": Unconstrained(), "start": 0.25} | options
    return Minimizer(method=GradientDescent(step_size, num_steps), **options)


def gradient(loss, energy):
    """By the encoder's matrix."""
    (found,) = torch.autograd.grad(loss, energy.encoder.weight)
    return found
