"""J v and uᵀJ in every mode against dense Jacobians and each other."""

import pytest
import torch
import torch.nn.functional as F
from cubes import Cube
from functional import Tree, inner, normal, normal_like
from product_problems import problem
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt.products import ggnvp, hvp, jvp, vjp


def test_forward_and_reverse_products_are_those_of_the_dense_jacobian():
    weight = normal(4, 3)
    p, v, u = normal(3, seed=1), normal(3, seed=2), normal(4, seed=3)
    jacobian = (1 - (weight @ p).tanh() ** 2)[:, None] * weight

    def f(q: Tensor, w: Tensor) -> Tensor:
        return (w @ q).tanh()

    out, tangent = jvp(f, p, v, weight)
    torch.testing.assert_close(out, (weight @ p).tanh())
    torch.testing.assert_close(tangent, jacobian @ v)
    out, cotangent = vjp(f, p, u, weight)
    torch.testing.assert_close(out, (weight @ p).tanh())
    torch.testing.assert_close(cotangent, jacobian.T @ u)


def test_values_may_be_pytrees_and_the_two_modes_are_adjoint():
    f, params, x = problem("attention")

    def outputs(p: Tree, y: Tensor) -> Tree:
        return {"loss": f(p, y), "weights": (p["out.weight"].sin(), p["out.bias"] ** 2)}

    v = normal_like(params)
    out, tangent = jvp(outputs, params, v, x)
    u = normal_like(out, seed=3)
    same, cotangent = vjp(outputs, params, u, x)
    assert pytree.tree_structure(out) == pytree.tree_structure(same)
    assert inner(u, tangent) == pytest.approx(inner(cotangent, v), rel=1e-10)


@pytest.mark.parametrize("mode", ["double_reverse", "finite_difference"])
def test_every_mode_of_jvp_gives_forward_modes_tangent(mode):
    f, params, x = problem("attention")

    def outputs(p: Tree, y: Tensor) -> Tree:
        return {"loss": f(p, y), "weights": (p["out.weight"].sin(), p["out.bias"] ** 2)}

    v = normal_like(params)
    out, tangent = jvp(outputs, params, v, x, mode=mode)
    expected_out, expected = jvp(outputs, params, v, x)
    torch.testing.assert_close(out, expected_out)
    exactly = mode == "double_reverse"
    torch.testing.assert_close(
        tangent, expected, rtol=1e-12 if exactly else 1e-7, atol=1e-12 if exactly else 1e-8
    )


def test_the_pullback_is_adjoint_to_every_mode_of_jvp():
    f, params, x = problem("mlp")
    v, one = normal_like(params), torch.ones((), dtype=torch.float64)
    cotangent = vjp(f, params, one, x)[1]
    for mode in ("forward", "double_reverse"):
        assert float(jvp(f, params, v, x, mode=mode)[1]) == pytest.approx(inner(cotangent, v))


def test_double_reverse_needs_no_forward_mode_formula():
    p, v = normal(4), normal(4, seed=1)
    with pytest.raises(RuntimeError, match="must override the setup_context"):
        jvp(Cube.apply, p, v)
    out, tangent = jvp(Cube.apply, p, v, mode="double_reverse")
    torch.testing.assert_close(out, p**3)
    torch.testing.assert_close(tangent, 3 * p**2 * v)
    product = ggnvp(Cube.apply, lambda z: (z**2).sum(), p, v, mode="double_reverse")
    torch.testing.assert_close(product, 18 * p**4 * v)
    torch.testing.assert_close(hvp(lambda q: Cube.apply(q).sum(), p, v), 6 * p * v)


def test_a_differenced_jvp_has_the_value_s_dropout_mask_and_one_run_s_random_numbers():
    p = torch.ones(200, dtype=torch.float64)

    def f(p: Tensor) -> Tensor:
        return F.dropout(p, 0.5)

    torch.manual_seed(1)
    expected, after = f(p), torch.rand(3)
    torch.manual_seed(1)
    out, tangent = jvp(f, p, p, mode="finite_difference")
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(out, expected)
    torch.testing.assert_close(tangent, expected)
