"""Dense Hessians against torch.autograd.functional, torch.func and closed forms."""

import pytest
import torch
from functional import normal, on_joined, params_of
from jacobian_cases import NETWORKS, close, close_trees, every_hessian, matrix, network, output_at
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvpopt.jacobians import hessian


@every_hessian
def test_the_hessian_of_a_quadratic_is_its_matrix(mode):
    a = normal(5, 5)
    close(hessian(lambda x: 0.5 * x @ a @ x, normal(5, seed=1), mode=mode), (a + a.T) / 2)


@every_hessian
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_hessians_are_those_of_autograd_functional(name, mode):
    net, x = network(name)
    f, params = output_at(net, x), params_of(net)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return (f(params) + 1).square().mean()

    g, flat = on_joined(loss, params)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.hessian(g, flat)
    found = hessian(loss, params, mode=mode)
    assert list(found) == list(params)
    rows = [matrix(found[name], p.numel()) for name, p in params.items()]
    for name_, p in params.items():
        for other, q in params.items():
            assert found[name_][other].shape == (*p.shape, *q.shape)
    close(torch.cat(rows), expected)


@every_hessian
@pytest.mark.parametrize("argnums", [0, 1, (0, 1), (1,)])
def test_hessians_nest_as_in_torch_func(argnums, mode):
    x, y = normal(3), {"a": normal(2), "b": normal(2, 3, seed=1)}

    def f(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return (torch.tanh(y["b"] @ x) * y["a"].exp()).sum()

    found = hessian(f, x, y, argnums=argnums, mode=mode, chunk_size=2)
    expected = torch.func.hessian(f, argnums=argnums)(x, y)
    close_trees(found, expected)


@every_hessian
def test_functions_without_curvature_have_a_zero_hessian(mode):
    for f in (torch.sum, lambda x: torch.zeros((), dtype=torch.float64)):
        found = hessian(f, normal(2, 2), mode=mode)
        assert found.shape == (2, 2, 2, 2)
        assert not found.any()


@every_hessian
def test_hessians_are_of_scalars(mode):
    with pytest.raises(ValueError, match=r"f returned a tensor of shape \(3,\); expected a scalar"):
        hessian(torch.sin, normal(3), mode=mode)
    with pytest.raises(TypeError, match="f returned a float; expected a scalar tensor"):
        hessian(lambda x: 1.0, normal(3), mode=mode)
