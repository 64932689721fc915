"""Modes, several directions, finite differences and memory of the products on pytrees."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hvpopt.experiments.benchmarks.timing import peak_bytes
from test_products import (
    NETWORKS,
    combined,
    dense_hessian,
    flat,
    inner,
    normal,
    normal_like,
    problem,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hvpopt.products import (
    ggnvp,
    grad_and_hvp,
    hvp,
    hvp_finite_difference,
    jvp,
    linearize,
    vjp,
)
from hvpopt.products.directions import log_fall_back

Tree = Any
EXACT = ["auto", "forward_over_reverse", "reverse_over_forward", "reverse_over_reverse"]
MODES = [*EXACT, "finite_difference"]


def stacked(params: Tree, k: int = 3) -> Tree:
    return combined(lambda p: torch.stack([normal_like(p, seed=s) for s in range(k)]), params)


def each(tree: Tree, i: int) -> Tree:
    return combined(lambda t: t[i], tree)


def exact_hvp(name: str, v: Tree) -> Tensor:
    f, params, x = problem(name)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return dense_hessian(lambda p: f(p, x), params) @ flat(v)


class OldStyle(torch.autograd.Function):
    """p³, as functions were written before torch.func: no forward mode, no functorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("name", [*NETWORKS, "layer norm", "instance norm", "silu"])
def test_every_exact_mode_gives_the_dense_hessian(name, mode, monkeypatch):
    monkeypatch.setitem(NETWORKS, "layer norm", lambda: nn.LayerNorm(6))
    monkeypatch.setitem(
        NETWORKS,
        "instance norm",
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    )
    f, params, x = problem(name)
    v = normal_like(params)
    loss, grad, hv = grad_and_hvp(f, params, v, x, mode=mode)
    torch.testing.assert_close(flat(hv), exact_hvp(name, v), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, f(params, x))
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    f(leaves, x).backward()
    torch.testing.assert_close(flat(grad), flat(combined(lambda p: p.grad, leaves)))
    assert not loss.requires_grad
    assert not any(t.requires_grad for t in (*grad.values(), *hv.values()))
    torch.testing.assert_close(flat(hvp(f, params, v, x, mode=mode)), flat(hv))


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


@pytest.mark.parametrize("mode", MODES)
def test_modes_work_under_inference_mode_and_no_grad(mode):
    f, params, x = problem("silu")
    v = normal_like(params)
    expected = exact_hvp("silu", v)
    with torch.inference_mode():
        made = [combined(torch.clone, t) for t in (params, v, x)]
        inside = flat(hvp(f, made[0], made[1], made[2], mode=mode)).clone()
    with torch.no_grad():
        without = flat(hvp(f, combined(lambda p: p.requires_grad_(), params), v, x, mode=mode))
    torch.testing.assert_close(inside.clone(), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(without, expected, rtol=1e-7, atol=1e-9)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


@pytest.mark.parametrize("mode", EXACT)
def test_what_is_once_differentiable_is_an_error_but_for_differences(mode):
    p, v = normal(4), normal(4, seed=1)
    for product in (lambda f: hvp(f, p, v, mode=mode), lambda f: linearize(f, p).hvp(v)):
        with pytest.raises(RuntimeError):
            product(lambda q: Once.apply(q).sum())
    for product in (
        lambda: hvp(lambda q: Once.apply(q).sum(), p, v),
        lambda: jvp(Once.apply, p, v, mode="double_reverse"),
    ):
        with pytest.raises(RuntimeError, match=r"marked once_differentiable: write it"):
            product()
    found = hvp_finite_difference(lambda q: Once.apply(q).sum(), p, v)
    torch.testing.assert_close(found.value, 6 * p * v)


def test_reverse_over_forward_refuses_what_it_would_get_wrong():
    p = normal(3, 3)
    for function in (torch.linalg.det, Tensor.det, torch.logdet):
        with pytest.raises(RuntimeError, match=r"Reverse over forward mode is wrong through .*det"):
            hvp(function, p @ p.T, p, mode="reverse_over_forward")
    with pytest.raises(RuntimeError, match=r"through torch's layer_norm.*mode='forward_over"):
        hvp(lambda q: torch.layer_norm(q, (3,)).sum(), p, p, mode="reverse_over_forward")


def test_reverse_over_forward_updates_running_statistics_once():
    x = normal(5, 4, 6)

    def f(p: Tensor, norm: nn.Module, buffers: dict[str, Tensor]) -> Tensor:
        buffers.update({k: b.clone() for k, b in norm.named_buffers()})
        return functional_call(norm, buffers, (x * p.detach() + 0 * p,)).sin().sum()

    for norm in (nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)):
        norm, results = norm.double(), []
        for mode in ("reverse_over_reverse", "reverse_over_forward"):
            buffers: dict[str, Tensor] = {}
            hvp(f, normal(6), normal(6, seed=1), norm, buffers, mode=mode)
            results.append(buffers)
        assert results[0]["running_mean"].any()
        for key in results[0]:
            torch.testing.assert_close(results[1][key], results[0][key])


def test_double_reverse_needs_no_forward_mode_formula():
    p, v = normal(4), normal(4, seed=1)
    with pytest.raises(RuntimeError):
        jvp(OldStyle.apply, p, v)
    out, tangent = jvp(OldStyle.apply, p, v, mode="double_reverse")
    torch.testing.assert_close(out, p**3)
    torch.testing.assert_close(tangent, 3 * p**2 * v)
    product = ggnvp(OldStyle.apply, lambda z: (z**2).sum(), p, v, mode="double_reverse")
    torch.testing.assert_close(product, 18 * p**4 * v)
    torch.testing.assert_close(hvp(lambda q: OldStyle.apply(q).sum(), p, v), 6 * p * v)


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


@pytest.mark.parametrize("name", NETWORKS)
def test_double_reverse_gives_the_same_gauss_newton_product(name):
    f, params, x = problem(name)
    v = normal_like(params)
    products = [
        ggnvp(f, torch.exp, params, v, x, mode=mode) for mode in ("forward", "double_reverse")
    ]
    torch.testing.assert_close(flat(products[0]), flat(products[1]))


@pytest.mark.parametrize("loss", [F.huber_loss, F.soft_margin_loss, F.smooth_l1_loss])
def test_the_ggn_takes_losses_whose_backward_has_no_forward_mode(loss):
    p, y = normal(5), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]).double()
    expected = dense_hessian(lambda z: loss(z, y), p) @ p
    torch.testing.assert_close(ggnvp(lambda q: 1.0 * q, lambda z: loss(z, y), p, p), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["mlp", "silu", "attention", "lstm"])
def test_the_estimated_error_of_a_difference_is_of_the_true_ones_size(name, dtype):
    f, params, x = problem(name)
    v = normal_like(params)
    exact = exact_hvp(name, v)
    params, v, x = (combined(lambda t: t.to(dtype), tree) for tree in (params, v, x))
    found = hvp_finite_difference(f, params, v, x)
    true = float((flat(found.value).double() - exact).norm() / exact.norm())
    assert true <= 2 * found.error
    assert found.error <= 100 * max(true, torch.finfo(dtype).eps ** (2 / 3))
    assert found.error < (1e-6 if dtype == torch.float64 else 1e-2)
    extrapolated = hvp_finite_difference(f, params, v, x, extrapolate=True)
    better = float((flat(extrapolated.value).double() - exact).norm() / exact.norm())
    assert better < true
    assert better <= 2 * extrapolated.error
    assert extrapolated.error < (1e-8 if dtype == torch.float64 else 1e-2)
    torch.testing.assert_close(
        flat(hvp(f, params, v, x, mode="finite_difference")), flat(found.value)
    )


def test_differences_of_a_quadratic_are_its_matrix_and_of_a_line_zero():
    a = normal(6, 6)
    found = hvp_finite_difference(lambda p: 0.5 * p @ (a + a.T) @ p, normal(6), a[0])
    torch.testing.assert_close(found.value, (a + a.T) @ a[0], rtol=1e-9, atol=1e-9)
    assert found.error < 1e-9
    assert hvp_finite_difference(lambda p: p.sum(), a[0], a[1]).value.tolist() == [0.0] * 6
    zero = hvp_finite_difference(lambda p: (p**3).sum(), a[0], torch.zeros(6).double())
    assert zero.value.tolist() == [0.0] * 6
    assert zero.error == 0.0


def test_differences_see_one_dropout_mask_and_leave_one_runs_random_state():
    p, v = normal(50), normal(50, seed=1)

    def f(q: Tensor) -> Tensor:
        return (F.dropout(q, 0.5) ** 3).sum()

    torch.manual_seed(4)
    mask = F.dropout(torch.ones(50, dtype=torch.float64), 0.5)
    after = torch.get_rng_state()
    for product in (
        lambda: hvp_finite_difference(f, p, v).value,
        lambda: hvp(f, p, v, mode="finite_difference"),
        lambda: hvp(f, p, torch.stack([v] * 2), mode="finite_difference")[1],
        lambda: hvp(f, p, torch.stack([v] * 2), mode="forward_over_reverse", chunk_size=1)[1],
        lambda: hvp(f, p, torch.stack([v] * 2), mode="forward_over_reverse", chunk_size=2)[1],
        lambda: hvp(lambda q: f(q) + F.silu(q).sum(), p, v, mode="forward_over_reverse"),
    ):
        torch.manual_seed(4)
        found = product()
        if found is not None and product.__code__.co_names[0] == "hvp_finite_difference":
            torch.testing.assert_close(found, 6 * mask**3 * p * v, rtol=1e-6, atol=1e-6)
        assert torch.equal(torch.get_rng_state(), after)


def test_differences_refuse_transforms():
    p = normal(3)
    with pytest.raises(ValueError, match=r"inside a torch.func transform.*choose another mode"):
        torch.vmap(lambda v: hvp(lambda q: (q**2).sum(), p, v, mode="finite_difference"))(
            p.expand(2, 3)
        )


@pytest.mark.parametrize("name", ["mlp", "silu", "group norm", "batch norm", "attention", "lstm"])
@pytest.mark.parametrize("mode", MODES)
def test_several_directions_give_the_products_of_each(name, mode):
    f, params, x = problem(name)
    vs = stacked(params)
    loss, grad, hvs = grad_and_hvp(f, params, vs, x, mode=mode)
    for i in range(3):
        torch.testing.assert_close(
            flat(each(hvs, i)), exact_hvp(name, each(vs, i)), rtol=1e-6, atol=1e-8
        )
    torch.testing.assert_close(loss, f(params, x))
    torch.testing.assert_close(flat(grad), flat(torch.func.grad(f)(params, x)))


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 1}, {"chunk_size": 2}, {"memory_budget": 1}]
)
def test_chunks_change_no_result(options):
    f, params, x = problem("attention")
    vs = stacked(params, 5)
    point = linearize(f, params, x)
    found = {
        "linearize": (point.hvp(vs, **options), point.hvp),
        "hvp": (hvp(f, params, vs, x, **options), lambda v: hvp(f, params, v, x)),
        "forward": (
            hvp(f, params, vs, x, mode="forward_over_reverse", **options),
            lambda v: hvp(f, params, v, x),
        ),
        "ggnvp": (
            ggnvp(f, torch.exp, params, vs, x, **options),
            lambda v: ggnvp(f, torch.exp, params, v, x),
        ),
        "double ggnvp": (
            ggnvp(f, torch.exp, params, vs, x, mode="double_reverse", **options),
            lambda v: ggnvp(f, torch.exp, params, v, x),
        ),
        "jvp": (jvp(f, params, vs, x, **options)[1], lambda v: jvp(f, params, v, x)[1]),
        "double jvp": (
            jvp(f, params, vs, x, mode="double_reverse", **options)[1],
            lambda v: jvp(f, params, v, x)[1],
        ),
    }
    for together, alone in found.values():
        for i in range(5):
            torch.testing.assert_close(flat(each(together, i)), flat(alone(each(vs, i))))


def test_several_directions_compose_with_transforms():
    p, vs = normal(4), normal(3, 4, seed=1)

    def curvature(q: Tensor) -> Tensor:
        return (vs * hvp(lambda r: (r**4).sum(), q, vs)).sum()

    torch.testing.assert_close(torch.func.grad(curvature)(p), (24 * p * vs**2).sum(0))
    leaf = p.clone().requires_grad_()
    curvature(leaf).backward()
    torch.testing.assert_close(leaf.grad, (24 * p * vs**2).sum(0))


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes, plain = [], torch.vmap

    def counting(function: Callable[..., Any], **options: Any) -> Callable[[Tree], Any]:
        def run(piece: Tree) -> Any:
            sizes.append(len(next(iter(piece.values()))))
            return plain(function, **options)(piece)

        return run

    monkeypatch.setattr(torch, "vmap", counting)
    return sizes


def test_a_budget_of_memory_limits_how_many_directions_go_at_once(monkeypatch):
    f, params, x = problem("mlp")
    vs = stacked(params, 6)
    sizes = count_batches(monkeypatch)
    for product in (hvp, linearize_and_apply, forward_over_reverse, jvp):
        sizes.clear()
        product(f, params, vs, x)
        assert sizes == [6]
        sizes.clear()
        product(f, params, vs, x, memory_budget=1)
        assert sizes == []
        product(f, params, vs, x, memory_budget=4 * graph_bytes(f, params, x))
        assert sizes == [4, 2]


def linearize_and_apply(f, params, vs, x, **options):
    return linearize(f, params, x).hvp(vs, **options)


def forward_over_reverse(f, params, vs, x, **options):
    return hvp(f, params, vs, x, mode="forward_over_reverse", **options)


def graph_bytes(f, params, x) -> int:
    """Every value that the network, its loss and their views compute, in float64."""
    total, loss = 0, f(combined(lambda p: p.clone().requires_grad_(), params), x)
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        total += sum(8 * torch.Size(m.shape).numel() for m in node._input_metadata)
        nodes += [n for n, _ in node.next_functions]
    return total


def test_what_vmap_cannot_do_goes_one_by_one_and_is_logged(caplog):
    log_fall_back.cache_clear()
    p, vs = normal(4), normal(3, 4, seed=1)

    def f(q: Tensor) -> Tensor:
        return OldStyle.apply(q).sum()

    with caplog.at_level(logging.WARNING, logger="hvpopt"):
        torch.testing.assert_close(hvp(f, p, vs), 6 * p * vs)
        torch.testing.assert_close(linearize(f, p).hvp(vs), 6 * p * vs)

    def counting(q: Tensor) -> Tensor:
        buffer = torch.zeros((), dtype=torch.float64)
        buffer += q.detach().sum()
        return (q**3).sum() + 0 * buffer

    with caplog.at_level(logging.WARNING, logger="hvpopt"):
        for mode in EXACT:
            torch.testing.assert_close(hvp(counting, p, vs, mode=mode), 6 * p * vs)
        jvps = jvp(lambda q: bool(q.detach().sum() > 9) * q**3 + q**3, p, vs)[1]
    torch.testing.assert_close(jvps, 3 * p**2 * vs)


def test_malformed_directions_are_named():
    params = {"a": torch.ones(3), "b": torch.ones(2, 2), "c": torch.ones(())}
    vs = combined(lambda p: torch.ones(4, *p.shape), params)

    def f(p: Tree) -> Tensor:
        return (p["a"] ** 2).sum() + (p["b"] ** 2).sum() + p["c"] ** 2

    found = hvp(f, params, vs)
    assert {k: tuple(t.shape) for k, t in found.items()} == {"a": (4, 3), "b": (4, 2, 2), "c": (4,)}
    for product in (
        lambda v: hvp(f, params, v),
        lambda v: jvp(f, params, v),
        lambda v: ggnvp(f, torch.exp, params, v),
        linearize(f, params).hvp,
    ):
        with pytest.raises(
            ValueError, match=r"v\['b'\] holds 5 directions .* v\['a'\] 4; expected"
        ):
            product({**vs, "b": torch.ones(5, 2, 2)})
        with pytest.raises(ValueError, match="holds no direction"):
            product(combined(lambda p: torch.ones(0, *p.shape), params))
        with pytest.raises(ValueError, match=r"v\['b'\] has dtype torch.float64; expected"):
            product({**vs, "b": vs["b"].double()})
        with pytest.raises(
            ValueError,
            match=r"v\['a'\] has shape \(4, 3\); expected \(3,\) as in params, or \(k, 3\) in ev",
        ):
            product({**vs, "b": params["b"]})
        with pytest.raises(ValueError, match=r"v\['c'\] has shape \(4, 1\); .* or \(k,\) in every"):
            product({**params, "c": torch.ones(4, 1)})


def test_options_out_of_range_are_named():
    p = torch.ones(3)
    for product in (
        lambda **o: hvp(torch.sum, p, p, **o),
        lambda **o: jvp(torch.sum, p, p, **o),
        lambda **o: ggnvp(torch.square, torch.sum, p, p, **o),
    ):
        with pytest.raises(ValueError, match=r"mode='sideways' is unknown: choose one of '"):
            product(mode="sideways")
        with pytest.raises(ValueError, match="chunk_size=0; expected at least 1"):
            product(chunk_size=0)
        with pytest.raises(ValueError, match="memory_budget=-5; expected at least 1"):
            product(memory_budget=-5)
        with pytest.raises(ValueError, match="both given; expected one"):
            product(chunk_size=1, memory_budget=100)
    with pytest.raises(TypeError, match=r"the value of f is torch.int64"):
        jvp(lambda q: (q > 0).long(), p, p, mode="double_reverse")
    with pytest.raises(TypeError, match=r"the value of f is torch.int64"):
        jvp(lambda q: (q > 0).long(), p, p, mode="finite_difference")


@pytest.mark.parametrize("mode", MODES)
def test_modes_agree_on_errors_and_leave_parameters_alone(mode):
    p = torch.ones(3)
    with pytest.raises(ValueError, match=r"f returned a tensor of shape \(3,\)"):
        hvp(torch.square, p, p, mode=mode)

    def failing(q: Tensor) -> Tensor:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        hvp(failing, p, p, mode=mode)
    constant = hvp(lambda q: torch.tensor(3.0), p, p, mode=mode)
    assert constant.tolist() == [0.0, 0.0, 0.0]
    assert p.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("mode", [m for m in EXACT if m != "auto"])
def test_one_product_of_each_mode_is_one_run_of_the_function(mode):
    calls = []

    def f(p: Tensor) -> Tensor:
        calls.append(1)
        return (p**3).sum()

    grad_and_hvp(f, normal(2), normal(2), mode=mode)
    assert len(calls) == 1
    calls.clear()
    hvp(f, normal(2), normal(2), mode="finite_difference")
    assert len(calls) == 2
    hvp_finite_difference(f, normal(2), normal(2))
    assert len(calls) == 6


def test_forward_over_reverse_takes_less_memory_than_jvp_of_torch_func_grad():
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)])
    x = torch.randn(256, 64)
    params = {k: p.detach() for k, p in net.named_parameters()}
    v = normal_like(params)

    def f(p: Tree) -> Tensor:
        return functional_call(net, p, (x,)).square().mean()

    cpu = torch.device("cpu")
    lean = peak_bytes(lambda: hvp(f, params, v, mode="forward_over_reverse"), cpu)
    composing = peak_bytes(lambda: torch.func.jvp(torch.func.grad(f), (params,), (v,)), cpu)
    gradient = peak_bytes(lambda: torch.func.grad(f)(params), cpu)
    assert lean < 0.7 * composing
    assert lean < 2.5 * gradient


def test_products_are_symmetric_in_every_mode():
    f, params, x = problem("attention")
    u, v = normal_like(params, seed=1), normal_like(params, seed=2)
    for mode in EXACT:
        hu, hv = (hvp(f, params, t, x, mode=mode) for t in (u, v))
        assert inner(u, hv) == pytest.approx(inner(v, hu), rel=1e-10)


def test_the_pullback_is_adjoint_to_every_mode_of_jvp():
    f, params, x = problem("mlp")
    v, one = normal_like(params), torch.ones((), dtype=torch.float64)
    cotangent = vjp(f, params, one, x)[1]
    for mode in ("forward", "double_reverse"):
        assert float(jvp(f, params, v, x, mode=mode)[1]) == pytest.approx(inner(cotangent, v))


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


def test_several_directions_go_at_once_by_reverse_over_forward(caplog):
    p, vs = normal(4), normal(3, 4, seed=1)
    runs = []

    def f(p: Tensor) -> Tensor:
        runs.append(1)
        return (p**3).sum()

    with caplog.at_level(logging.WARNING, "hvpopt"):
        found = hvp(f, p, vs, mode="reverse_over_forward", chunk_size=3)
    torch.testing.assert_close(found, 6 * p * vs)
    assert len(runs) == 1
    assert not caplog.records


_aten = torch.ops.aten
UNSEEN = {
    "NativeLayerNorm": lambda x: _aten.layer_norm(x, [4]),
    "NativeBatchNorm": lambda x: _aten.batch_norm(x, *[None] * 4, True, 0.1, 1e-5, False),
    "LinalgDet": lambda x: _aten.linalg_det(x.T @ x),
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", UNSEEN)
def test_reverse_over_forward_refuses_wrong_formulas_that_it_cannot_replace(name, recorded):
    x, p, v = normal(5, 4), normal(4, seed=1).requires_grad_(recorded), normal(4, seed=2)
    with pytest.raises(RuntimeError, match=rf"wrong through {name}\w+, .* from TorchScript"):
        hvp(lambda p: UNSEEN[name](x * p).pow(3).sum(), p, v, mode="reverse_over_forward")


def test_batch_norm_in_eval_mode_is_right_wherever_it_is_called_from():
    x, p, v = normal(5, 4), normal(4, seed=1), normal(4, seed=2)
    mean, var = torch.zeros_like(p), torch.ones_like(p)

    def f(p: Tensor) -> Tensor:
        y = _aten.batch_norm(x * p, None, None, mean, var, False, 0.1, 0.0, False)
        return y.pow(3).sum()

    expected = 6 * (x**3).sum(0) * p * v
    torch.testing.assert_close(hvp(f, p, v, mode="reverse_over_forward"), expected)


def test_checkpointed_layers_run_again_with_the_same_kernels():
    x, p, vs = normal(5, 4), normal(4, seed=1), normal(3, 4, seed=2)

    def layer(x: Tensor) -> Tensor:
        y = F.batch_norm(x, None, None, training=True)
        return F.huber_loss(y**2, torch.zeros_like(y))

    def f(p: Tensor) -> Tensor:
        return checkpoint(layer, x * p, use_reentrant=False)

    expected = hvp(lambda p: layer(x * p), p, vs)
    torch.testing.assert_close(hvp(f, p, vs), expected)
    torch.testing.assert_close(hvp(f, p, vs[0]), expected[0])
    torch.testing.assert_close(torch.vmap(linearize(f, p).hvp)(vs), expected)


@pytest.mark.parametrize("limit", [2.5, "2", True])
def test_a_limit_that_is_no_int_is_named(limit):
    p = torch.ones(2)
    with pytest.raises(TypeError, match=rf"chunk_size={limit!r} is a .*; expected an int"):
        hvp(lambda p: p.sum(), p, torch.ones(3, 2), chunk_size=limit)


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (({"a": 0, "b": 0}, 0), "v is a tuple, but params is a list; expected the same containers"),
        ([{"b": 0, "a": 0}, 0], r"v\[0\] has the same keys in another order than params\[0\]"),
    ],
)
def test_containers_that_differ_are_named(v, message):
    params = [{"a": torch.ones(2), "b": torch.ones(2)}, torch.ones(2)]
    v = combined(lambda _: torch.ones(2), v)
    with pytest.raises(ValueError, match=message):
        hvp(lambda p: p[1].sum(), params, v)
