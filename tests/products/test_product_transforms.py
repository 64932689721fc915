"""Products inside transforms, gradient modes, compilation, and differentiated again."""

from typing import Any

import pytest
import torch
from functional import Tree, combined, joined, normal, normal_like
from product_problems import EXACT, MODES, exact_hvp, linearized_hvp, problem
from torch import Tensor, nn
from torch.func import functional_call

from hvpopt.products import ggnvp, grad_and_hvp, hvp, jvp, linearize, vjp


def assert_independent_of(context: Any, requires_grad: bool) -> None:
    f, params, x = problem("silu")
    v = normal_like(params)
    expected = joined(hvp(f, params, v, x))
    leaves = {k: p.clone().requires_grad_(requires_grad) for k, p in params.items()}
    with context:
        results = [
            hvp(f, leaves, v, x),
            linearize(f, leaves, x).hvp(v),
            grad_and_hvp(f, leaves, v, x)[2],
        ]
        ggn = ggnvp(lambda p: f(p, x), lambda z: z**2, leaves, v)
    for result in results:
        torch.testing.assert_close(joined(result).detach().clone(), expected)
    torch.testing.assert_close(
        joined(ggn).detach().clone(), joined(ggnvp(lambda p: f(p, x), lambda z: z**2, params, v))
    )
    for k, leaf in leaves.items():
        assert leaf.grad is None
        assert leaf.requires_grad is requires_grad
        assert torch.equal(leaf, params[k])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_grad_mode_and_requires_grad_change_no_result_and_no_parameter(requires_grad):
    assert_independent_of(torch.enable_grad(), requires_grad)
    assert_independent_of(torch.no_grad(), requires_grad)


def test_everything_works_under_inference_mode_with_tensors_made_there():
    f, params, x = problem("silu")
    v, one = normal_like(params), torch.ones((), dtype=torch.float64)

    def results(params: Tree, v: Tree, x: Tensor, one: Tensor) -> list[Tree]:
        return [
            linearize(f, params, x).hvp(v),
            ggnvp(f, torch.exp, params, v, x),
            vjp(f, params, one, x)[1],
            jvp(f, params, v, x)[1],
        ]

    expected = results(params, v, x, one)
    with torch.inference_mode():
        found = results(*combined(torch.clone, (params, v, x, one)))
    for made_there, outside in zip(found, expected, strict=True):
        torch.testing.assert_close(joined(made_there).clone(), joined(outside))


@pytest.mark.parametrize("mode", MODES)
def test_modes_work_under_inference_mode_and_no_grad(mode):
    f, params, x = problem("silu")
    v = normal_like(params)
    expected = exact_hvp("silu", v)
    with torch.inference_mode():
        made = [combined(torch.clone, t) for t in (params, v, x)]
        inside = joined(hvp(f, made[0], made[1], made[2], mode=mode)).clone()
    with torch.no_grad():
        without = joined(hvp(f, combined(lambda p: p.requires_grad_(), params), v, x, mode=mode))
    torch.testing.assert_close(inside.clone(), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(without, expected, rtol=1e-7, atol=1e-9)


def test_a_batch_of_directions_by_vmap():
    f, params, x = problem("attention")
    vs = combined(lambda p: torch.stack([normal_like(p, seed=s) for s in range(3)]), params)
    one_shot = torch.vmap(lambda v: hvp(f, params, v, x))(vs)
    linearized = torch.vmap(linearize(f, params, x).hvp)(vs)
    ggn = torch.vmap(lambda v: ggnvp(lambda p: f(p, x), lambda z: z.exp(), params, v))(vs)
    for i in range(3):
        v = combined(lambda t, i=i: t[i], vs)
        expected = joined(hvp(f, params, v, x))
        for batch in (one_shot, linearized):
            torch.testing.assert_close(joined(combined(lambda t, i=i: t[i], batch)), expected)
        torch.testing.assert_close(
            joined(combined(lambda t, i=i: t[i], ggn)),
            joined(ggnvp(lambda p: f(p, x), lambda z: z.exp(), params, v)),
        )


def test_the_gauss_newton_product_can_be_differentiated_again():
    """Of z = p² and ½ z²: d/dp vᵀG v = d/dp 4 p² v² = 8 p v²."""
    p, v = normal(4), normal(4, seed=1)

    def curvature(q: Tensor) -> Tensor:
        return v @ ggnvp(torch.square, lambda z: 0.5 * (z**2).sum(), q, v)

    torch.testing.assert_close(torch.func.grad(curvature)(p), 8 * p * v**2)
    leaf = p.clone().requires_grad_()
    curvature(leaf).backward()
    torch.testing.assert_close(leaf.grad, 8 * p * v**2)


@pytest.mark.parametrize("mode", EXACT)
def test_every_exact_mode_composes_with_transforms_and_backward(mode):
    p, vs = normal(4), normal(3, 4, seed=1)

    def product(q: Tensor, v: Tensor) -> Tensor:
        return hvp(lambda r: (r**4).sum(), q, v, mode=mode)

    torch.testing.assert_close(torch.vmap(product, (None, 0))(p, vs), 12 * p**2 * vs)
    torch.testing.assert_close(torch.vmap(product, (0, None))(vs, p), 12 * vs**2 * p)

    def curvature(q: Tensor) -> Tensor:
        return vs[0] @ product(q, vs[0])

    expected = 24 * p * vs[0] ** 2
    torch.testing.assert_close(torch.func.grad(curvature)(p), expected)
    torch.testing.assert_close(torch.func.jacfwd(curvature)(p), expected)
    leaf = p.clone().requires_grad_()
    curvature(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("mode", EXACT)
def test_a_product_of_a_product_is_the_fourth_derivative(mode):
    """For Σ p⁶ along v: d²/dp² of vᵀ∇²f v = 30 p⁴ v² is 360 p² v²."""
    p, v, u = normal(3), normal(3, seed=1), normal(3, seed=2)

    def curvature(q: Tensor) -> Tensor:
        return v @ hvp(lambda r: (r**6).sum(), q, v, mode=mode)

    torch.testing.assert_close(hvp(curvature, p, u, mode=mode), 360 * p**2 * v**2 * u)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("how", ["captured", "argument", "direction"])
def test_results_are_differentiable_by_whatever_requires_a_gradient(mode, how):
    """For f = s Σ p³: ∇²f v = 6 s p v."""
    p, v = normal(4), normal(4, seed=1)
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    if how == "captured":
        hv, expected = hvp(lambda q: s * (q**3).sum(), p, v, mode=mode), (6 * p * v).sum()
    elif how == "argument":
        hv, expected = hvp(lambda q, t: t * (q**3).sum(), p, v, s, mode=mode), (6 * p * v).sum()
    else:
        hv, expected = hvp(lambda q: (q**3).sum(), p, v * s, mode=mode), (6 * p * v).sum()
    hv.sum().backward()
    torch.testing.assert_close(s.grad, expected)
    with torch.no_grad():
        assert not hvp(lambda q: s * (q**3).sum(), p, v, mode=mode).requires_grad


def test_double_reverse_composes():
    p, vs = normal(4), normal(3, 4, seed=1)

    def pushed(q: Tensor, v: Tensor) -> Tensor:
        return jvp(lambda r: r**3, q, v, mode="double_reverse")[1]

    def gauss_newton(q: Tensor, v: Tensor) -> Tensor:
        return ggnvp(torch.square, lambda z: 0.5 * (z**2).sum(), q, v, mode="double_reverse")

    torch.testing.assert_close(torch.vmap(pushed, (None, 0))(p, vs), 3 * p**2 * vs)
    torch.testing.assert_close(torch.vmap(gauss_newton, (None, 0))(p, vs), 4 * p**2 * vs)
    for function, expected in ((pushed, 6 * p * vs[0]), (gauss_newton, 8 * p * vs[0])):
        leaf = p.clone().requires_grad_()
        function(leaf, vs[0]).sum().backward()
        torch.testing.assert_close(leaf.grad, expected)
        torch.testing.assert_close(
            torch.func.grad(lambda q, g=function: g(q, vs[0]).sum())(p), expected
        )
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for mode in ("forward", "double_reverse"):
        jvp(lambda q: s * q**3, p, vs[0], mode=mode)[1].sum().backward()
        ggnvp(lambda q: s * q, lambda z: 0.5 * (z**2).sum(), p, vs[0], mode=mode).sum().backward()
    torch.testing.assert_close(s.grad, 2 * (3 * p**2 * vs[0] + 2 * s.detach() * vs[0]).sum())


def test_several_directions_compose_with_transforms():
    p, vs = normal(4), normal(3, 4, seed=1)

    def curvature(q: Tensor) -> Tensor:
        return (vs * hvp(lambda r: (r**4).sum(), q, vs)).sum()

    torch.testing.assert_close(torch.func.grad(curvature)(p), (24 * p * vs**2).sum(0))
    leaf = p.clone().requires_grad_()
    curvature(leaf).backward()
    torch.testing.assert_close(leaf.grad, (24 * p * vs**2).sum(0))


def test_the_product_can_be_compiled():
    f, params, x = problem("attention")
    v = normal_like(params)
    compiled = torch.compile(
        lambda p, t: hvp(f, p, t, x), fullgraph=True, backend="aot_eager", dynamic=False
    )
    torch.testing.assert_close(joined(compiled(params, v)), joined(hvp(f, params, v, x)))


def test_a_compiled_module_inside_the_function_runs_eagerly():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 1)).double()
    compiled = torch.compile(net, backend="aot_eager")
    x = normal(3, 6)
    compiled(x)
    params = {k: p.detach() for k, p in compiled.named_parameters()}
    v = normal_like(params)

    def f(p: Tree, module: nn.Module) -> Tensor:
        return functional_call(module, p, (x,)).square().mean()

    plain, plain_v = (
        {k.removeprefix("_orig_mod."): t for k, t in tree.items()} for tree in (params, v)
    )
    for product in (hvp, linearized_hvp):
        torch.testing.assert_close(
            joined(product(f, params, v, compiled)), joined(product(f, plain, plain_v, net))
        )
