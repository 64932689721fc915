"""The Kronecker preconditioner on losses of a network's derivatives by its inputs."""

import torch
import torch.nn.functional as F
from kronecker_cases import factors, randn, refreshed
from problems import Problem, flat
from torch import nn

from hvpopt.preconditioners.kronecker import Kronecker


class Derivative(nn.Module):
    """u and ∂u/∂x of a network with one output."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x = x.detach().requires_grad_()
        u = self.net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.cat([u, du], 1)


def test_the_block_of_a_weight_that_only_a_derivative_uses_is_exact():
    net = nn.Linear(3, 1, bias=False).double()
    scales = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    task = Problem(
        Derivative(net),
        randn(8, 3),
        lambda z: F.mse_loss(scales * z[:, 1:], scales * z.new_ones(8, 3)),
    )
    kronecker = Kronecker(num_samples=4000)
    states = refreshed(task, kronecker)

    inverse = [flat(kronecker.solve([e[None]], states, [0.0])) for e in torch.eye(3).double()]

    # the loss is the mean of (sᵢ wᵢ − sᵢ)² over three columns: its matrix is diag(2 sᵢ² / 3)
    expected = torch.diag(3 / (2 * scales**2))
    torch.testing.assert_close(torch.stack(inverse), expected, rtol=0.1, atol=2e-2)


def test_the_blocks_of_a_residual_are_near_those_of_its_jacobian():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)]
        net = nn.Sequential(*layers).double()
    x = 2 * randn(200, 2)
    task = Problem(Derivative(net), x, lambda z: F.mse_loss(z[:, 1] + 40 * z[:, 2], x[:, 0]))
    states = refreshed(task, Kronecker(num_samples=200))

    z = task.net(x)
    residuals = z[:, 1] + 40 * z[:, 2]
    for place, tolerance in ((0, 0.7), (2, 0.2), (4, 0.05)):
        weight = task.params[place]
        rows = [torch.autograd.grad(r, weight, retain_graph=True)[0].flatten() for r in residuals]
        jacobian = torch.stack(rows)
        expected = 2 / 200 * jacobian.T @ jacobian
        R, C = (f[0] for f in factors(states[place]))
        size = weight.shape[1]  # the bias is last

        difference = torch.kron(R, C[:size, :size]) - expected

        assert difference.norm() < tolerance * expected.norm()
