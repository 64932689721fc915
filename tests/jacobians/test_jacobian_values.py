"""Dense Jacobians against torch.autograd.functional, closed forms and each other."""

from typing import Any

import pytest
import torch
from functional import normal, on_joined, params_of
from jacobian_cases import NETWORKS, SIX, close, close_trees, every_way, matrix, network, output_at
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvpopt.jacobians import jacobian


@every_way
def test_the_jacobian_of_a_linear_map_is_its_matrix(mode):
    a = normal(3, 5)
    close(jacobian(lambda x: a @ x, normal(5), mode=mode), a)


@every_way
def test_the_jacobian_of_softmax_is_its_covariance(mode):
    z = normal(6)
    p = z.softmax(0)
    close(jacobian(lambda z: z.softmax(0), z, mode=mode), torch.diag(p) - torch.outer(p, p))


@every_way
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_jacobians_are_those_of_autograd_functional(name, mode):
    net, x = network(name)
    f, params = output_at(net, x), params_of(net)
    g, flat = on_joined(f, params)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.jacobian(g, flat)
    found = jacobian(f, params, mode=mode)
    assert list(found) == list(params)
    shape = f(params).shape
    for key, p in params.items():
        assert found[key].shape == (*shape, *p.shape)
        assert not found[key].requires_grad
    close(matrix(found, shape.numel()), expected.reshape(shape.numel(), -1))


@every_way
@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_jacobians_are_those_of_autograd_functional(name, mode):
    net, x = network(name)
    f = net.eval()
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.jacobian(f, x)
    close(jacobian(f, x, mode=mode), expected)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("mode", SIX)
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_change_nothing(mode, chunk_size):
    w, x = normal(7, 5), normal(5, seed=1)

    def f(x: Tensor) -> dict[str, Tensor]:
        y = torch.tanh(w @ x)
        return {"first": y[:3].reshape(3, 1), "rest": y[3:].sum() * y}

    expected = torch.func.jacrev(f)(x)
    found = jacobian(f, x, mode=mode, chunk_size=chunk_size)
    close(found["first"], expected["first"])
    close(found["rest"], expected["rest"])


@every_way
def test_several_arguments_and_outputs_nest_as_in_torch_func(mode):
    tree, x, scale = {"a": normal(2), "b": [normal(2, 3, seed=1)]}, normal(3, seed=2), normal()

    def f(p: Any, n: int, x: Tensor, s: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = p["b"][0] @ x * n
        return y.sum(), {"y": torch.sin(y) * s + p["a"]}

    args = (tree, 2, x, scale)
    for argnums in (0, 2, -1, (2, 0), (3,)):
        found = jacobian(f, *args, argnums=argnums, mode=mode)
        positive = 3 if argnums == -1 else argnums
        expected = torch.func.jacrev(f, argnums=positive)(*args)
        close_trees(found, expected)


@every_way
def test_what_f_does_not_depend_on_has_zeros(mode):
    x, y = normal(3), normal(2)
    constant = normal(4)
    found = jacobian(lambda x, y: (constant, x.exp()), x, y, argnums=(0, 1), mode=mode)
    expected = [[(4, 3), (4, 2)], [(3, 3), (3, 2)]]
    assert [[tuple(b.shape) for b in row] for row in found] == expected
    close(found[1][0], torch.diag(x.exp()))
    assert not any(b.any() for b in (found[0][0], found[0][1], found[1][1]))


@every_way
def test_the_identity_scalars_and_empty_tensors_have_jacobians(mode):
    close(jacobian(lambda x: x, normal(3), mode=mode), torch.eye(3, dtype=torch.float64))
    close(jacobian(torch.sin, normal(), mode=mode), normal().cos())
    assert jacobian(lambda x: x[:0], normal(3), mode=mode).shape == (0, 3)
    assert jacobian(torch.sum, normal(0, 2), mode=mode).shape == (0, 2)


@every_way
def test_the_result_has_the_dtype_of_the_input(mode):
    found = jacobian(lambda x: (2 * x).double(), torch.ones(2), mode=mode)
    torch.testing.assert_close(found, 2 * torch.eye(2))


@every_way
def test_neither_recording_nor_inference_mode_outside_matter(mode):
    net = nn.Linear(3, 2).double()
    x = normal(3)
    with torch.inference_mode():
        inside = jacobian(net, x.clone(), mode=mode)
    with torch.no_grad():
        close(jacobian(net, x, mode=mode), net.weight)
    close(inside, net.weight.detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NETWORKS)
def test_all_ways_agree_on_a_gpu(name):
    net, x = network(name)
    net, x = net.cuda().eval(), x.cuda()
    f, params = output_at(net, x), params_of(net)
    expected = jacobian(f, params, mode="vjp_loop")
    for mode in [*SIX[1:], "auto"]:
        found = jacobian(f, params, mode=mode)
        for key in params:
            assert found[key].device == x.device
            torch.testing.assert_close(found[key], expected[key], rtol=1e-8, atol=1e-9)
    jacobian(net, x, batched=True)
