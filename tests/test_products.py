"""Products on pytrees against closed forms, dense Hessians, identities and differences."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from hvpopt.products import ggnvp, grad_and_hvp, hvp, jvp, linearize, vjp

Tree = Any


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def normal_like(tree: Tree, seed: int = 1) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return pytree.tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), tree)


def inner(a: Tree, b: Tree) -> float:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return float(sum((x * y).sum() for x, y in pairs))


def combined(f: Callable[..., Tensor], *trees: Tree) -> Tree:
    return pytree.tree_map(f, *trees)


def flat(tree: Tree) -> Tensor:
    return torch.cat([x.reshape(-1) for x in pytree.tree_leaves(tree)])


def dense_hessian(f: Callable[[Tree], Tensor], params: Tree) -> Tensor:
    """By reverse mode over reverse mode, on the flat vector."""
    leaves, spec = pytree.tree_flatten(params)
    sizes = [x.numel() for x in leaves]

    def on_flat(x: Tensor) -> Tensor:
        parts = [p.reshape(q.shape) for p, q in zip(x.split(sizes), leaves, strict=True)]
        return f(pytree.tree_unflatten(parts, spec))

    return torch.autograd.functional.hessian(on_flat, flat(params))


def linearized_hvp(f: Callable[..., Tensor], params: Tree, v: Tree, *args: Any) -> Tree:
    return linearize(f, params, *args).hvp(v)


both_hvps = pytest.mark.parametrize("product", [hvp, linearized_hvp])


class Block(nn.Module):
    """One causal transformer block with its usual fast attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).reshape(*x.shape[:2], 2, 9).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
    "silu": lambda: nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3)),
    "mish": lambda: nn.Sequential(nn.Linear(6, 4), nn.Mish(), nn.Linear(4, 3)),
    "group norm": lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4), nn.Softplus()),
    "batch norm": lambda: nn.Sequential(
        nn.Conv1d(4, 2, 3), nn.BatchNorm1d(2), nn.Tanh(), nn.Conv1d(2, 2, 2)
    ),
    "attention": Block,
    "lstm": Recurrent,
}


def problem(name: str) -> tuple[Callable[[Tree, Tensor], Tensor], dict[str, Tensor], Tensor]:
    """(f, params, x): a network's mean squared output as a function of its parameters."""
    torch.manual_seed(0)
    net = NETWORKS[name]().double()
    buffers = dict(net.named_buffers())
    params = {k: p.detach() for k, p in net.named_parameters()}

    def f(p: Tree, x: Tensor) -> Tensor:
        copies = {k: b.clone() for k, b in buffers.items()}
        return (functional_call(net, (p, copies), (x,)) + 1).square().mean()

    return f, params, normal(3, 4, 6, seed=5)


@both_hvps
def test_the_hessian_of_a_quadratic_is_its_matrix(product):
    a = normal(7, 7)
    a = a + a.T
    v = normal(7, seed=1)
    hv = product(lambda p: 0.5 * p @ a @ p, normal(7, seed=2), v)
    torch.testing.assert_close(hv, a @ v)


@both_hvps
def test_the_hessian_of_softmax_cross_entropy_is_the_covariance_of_the_prediction(product):
    logits, v = normal(5), normal(5, seed=1)
    p = logits.softmax(0)
    expected = (torch.diag(p) - torch.outer(p, p)) @ v
    hv = product(lambda z: F.cross_entropy(z, torch.tensor(2)), logits, v)
    torch.testing.assert_close(hv, expected)


@both_hvps
@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_those_of_the_dense_hessian(name, product):
    f, params, x = problem(name)
    v = normal_like(params)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        dense = dense_hessian(lambda p: f(p, x), params)
    hv = product(f, params, v, x)
    assert list(hv) == list(params)
    torch.testing.assert_close(flat(hv), dense @ flat(v), rtol=1e-9, atol=1e-12)


@both_hvps
@pytest.mark.parametrize("name", ["silu", "attention", "lstm"])
def test_products_are_central_differences_of_the_gradient(name, product):
    """The error of the difference is ε²/6 · f⁗, about 1e-9 here."""
    f, params, x = problem(name)
    v, step = normal_like(params), 1e-4
    up, down = (
        torch.func.grad(f)(combined(lambda p, t, s=s: p + s * t, params, v), x)
        for s in (step, -step)
    )
    hv = product(f, params, v, x)
    torch.testing.assert_close(flat(hv), (flat(up) - flat(down)) / (2 * step), rtol=1e-5, atol=1e-7)


@both_hvps
def test_the_product_is_symmetric_and_linear(product):
    f, params, x = problem("attention")
    u, v = normal_like(params, seed=1), normal_like(params, seed=2)
    hu, hv = product(f, params, u, x), product(f, params, v, x)
    assert inner(u, hv) == pytest.approx(inner(v, hu), rel=1e-10)
    mixed = product(f, params, combined(lambda a, b: 2 * a - 3 * b, u, v), x)
    torch.testing.assert_close(flat(mixed), 2 * flat(hu) - 3 * flat(hv))


def test_loss_and_gradient_are_those_of_autograd():
    f, params, x = problem("mlp")
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    loss = f(leaves, x)
    loss.backward()
    point = linearize(f, params, x)
    one_shot = grad_and_hvp(f, params, normal_like(params), x)
    for found_loss, grad in ((point.loss, point.grad), one_shot[:2]):
        torch.testing.assert_close(found_loss, loss.detach())
        for k in params:
            torch.testing.assert_close(grad[k], leaves[k].grad)


def test_a_linearization_runs_the_function_once():
    calls = []

    def f(p: Tensor) -> Tensor:
        calls.append(1)
        return (p**3).sum()

    p = normal(4)
    point = linearize(f, p)
    for seed in range(3):
        v = normal(4, seed=seed)
        torch.testing.assert_close(point.hvp(v), 6 * p * v)
    assert len(calls) == 1
    with pytest.raises(FrozenInstanceError):
        point.loss = torch.zeros(())  # type: ignore[misc]


def test_a_linearization_refuses_to_be_used_after_the_parameters_moved():
    p = normal(4)
    point = linearize(lambda q: (q**3).sum(), p)
    p += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        point.hvp(p)


def test_one_product_is_one_run_of_the_function():
    calls = []

    def f(p: Tensor) -> Tensor:
        calls.append(1)
        return (p**3).sum()

    grad_and_hvp(f, normal(2), normal(2))
    assert len(calls) == 1
    ggnvp(f, torch.square, normal(2), normal(2))
    assert len(calls) == 2


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


def test_the_ggn_of_a_linear_model_is_the_hessian():
    x, y = normal(8, 5), torch.arange(8) % 3
    params = {"w": normal(3, 5, seed=1), "b": normal(3, seed=2)}

    def model(p: Tree, inputs: Tensor) -> Tensor:
        return F.linear(inputs, p["w"], p["b"])

    v = normal_like(params)
    expected = dense_hessian(lambda p: F.cross_entropy(model(p, x), y), params) @ flat(v)
    product = ggnvp(model, lambda z: F.cross_entropy(z, y), params, v, x)
    torch.testing.assert_close(flat(product), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_ggn_is_the_dense_one(name):
    torch.manual_seed(0)
    net = NETWORKS[name]().double()
    x = normal(3, 4, 6, seed=5)
    params = {k: p.detach() for k, p in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def model(p: Tree) -> Tensor:
        return functional_call(net, (p, {k: b.clone() for k, b in buffers.items()}), (x,))

    def loss(z: Tensor) -> Tensor:
        return z.exp().mean()

    leaves, spec = pytree.tree_flatten(params)

    def outputs(*parts: Tensor) -> Tensor:
        return model(pytree.tree_unflatten(list(parts), spec)).reshape(-1)

    blocks = torch.autograd.functional.jacobian(outputs, tuple(leaves))
    jacobian = torch.cat([j.reshape(len(j), -1) for j in blocks], dim=1)
    z = model(params)
    curvature = z.exp().reshape(-1) / z.numel()
    v = normal_like(params)
    expected = jacobian.T @ (curvature * (jacobian @ flat(v)))
    torch.testing.assert_close(flat(ggnvp(model, loss, params, v)), expected)


def test_the_ggn_takes_outputs_that_are_pytrees():
    p, v = normal(3), normal(3, seed=1)

    def model(q: Tensor) -> Tree:
        return {"a": q**2, "b": (q.sin(),)}

    product = ggnvp(model, lambda z: (z["a"] ** 2).sum() + (z["a"] * z["b"][0]).sum(), p, v)
    slope_a, slope_b = 2 * p, p.cos()
    expected = slope_a * (2 * slope_a * v + slope_b * v) + slope_b * slope_a * v
    torch.testing.assert_close(product, expected)


def assert_independent_of(context: Any, requires_grad: bool) -> None:
    f, params, x = problem("silu")
    v = normal_like(params)
    expected = flat(hvp(f, params, v, x))
    leaves = {k: p.clone().requires_grad_(requires_grad) for k, p in params.items()}
    with context:
        results = [
            hvp(f, leaves, v, x),
            linearize(f, leaves, x).hvp(v),
            grad_and_hvp(f, leaves, v, x)[2],
        ]
        ggn = ggnvp(lambda p: f(p, x), lambda z: z**2, leaves, v)
    for result in results:
        torch.testing.assert_close(flat(result).detach().clone(), expected)
    torch.testing.assert_close(
        flat(ggn).detach().clone(), flat(ggnvp(lambda p: f(p, x), lambda z: z**2, params, v))
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
    v = normal_like(params)
    expected = flat(hvp(f, params, v, x))
    with torch.inference_mode():
        params, v, x = combined(torch.clone, params), combined(torch.clone, v), x.clone()
        results = [
            hvp(f, params, v, x),
            linearize(f, params, x).hvp(v),
            vjp(f, params, torch.ones((), dtype=torch.float64), x)[1],
            jvp(f, params, v, x)[1],
        ]
    torch.testing.assert_close(flat(results[0]).clone(), expected)
    torch.testing.assert_close(flat(results[1]).clone(), expected)


def test_a_batch_of_directions_by_vmap():
    f, params, x = problem("attention")
    vs = combined(lambda p: torch.stack([normal_like(p, seed=s) for s in range(3)]), params)
    one_shot = torch.vmap(lambda v: hvp(f, params, v, x))(vs)
    linearized = torch.vmap(linearize(f, params, x).hvp)(vs)
    ggn = torch.vmap(lambda v: ggnvp(lambda p: f(p, x), lambda z: z.exp(), params, v))(vs)
    for i in range(3):
        v = combined(lambda t, i=i: t[i], vs)
        expected = flat(hvp(f, params, v, x))
        for batch in (one_shot, linearized):
            torch.testing.assert_close(flat(combined(lambda t, i=i: t[i], batch)), expected)
        torch.testing.assert_close(
            flat(combined(lambda t, i=i: t[i], ggn)),
            flat(ggnvp(lambda p: f(p, x), lambda z: z.exp(), params, v)),
        )


def test_the_product_can_be_differentiated_again():
    """d/dp vᵀ∇²f v = 24 p v² for f = Σ p⁴; for the GGN of z = p², ½z²: d/dp 4p²v² = 8 p v²."""
    p, v = normal(4), normal(4, seed=1)

    def curvature(q: Tensor) -> Tensor:
        return v @ hvp(lambda r: (r**4).sum(), q, v)

    def gauss_newton(q: Tensor) -> Tensor:
        return v @ ggnvp(torch.square, lambda z: 0.5 * (z**2).sum(), q, v)

    for function, expected in ((curvature, 24 * p * v**2), (gauss_newton, 8 * p * v**2)):
        torch.testing.assert_close(torch.func.grad(function)(p), expected)
        leaf = p.clone().requires_grad_()
        function(leaf).backward()
        torch.testing.assert_close(leaf.grad, expected)


@both_hvps
def test_parameters_that_do_not_matter_have_zero_products(product):
    params = {"used": normal(2), "linear": normal(2, seed=1), "unused": normal(3)}

    def f(p: Tree) -> Tensor:
        return (p["used"] ** 2).sum() + p["linear"].sum()

    v = normal_like(params)
    hv = product(f, params, v)
    torch.testing.assert_close(hv["used"], 2 * v["used"])
    assert not hv["linear"].any()
    assert hv["unused"].tolist() == [0.0, 0.0, 0.0]
    point = linearize(f, params)
    assert point.grad["linear"].tolist() == [1.0, 1.0]
    assert point.grad["unused"].tolist() == [0.0, 0.0, 0.0]


@both_hvps
@pytest.mark.parametrize("f", [lambda p: p.sum(), lambda p: torch.tensor(3.0)])
def test_linear_and_constant_functions_have_a_zero_hessian(product, f):
    assert product(f, torch.ones(3), torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


@both_hvps
def test_a_zero_direction_has_a_zero_product(product):
    f, params, x = problem("mlp")
    hv = product(f, params, combined(torch.zeros_like, params), x)
    assert not flat(hv).any()


@both_hvps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_keep_the_dtype(product, dtype):
    p = normal(4).to(dtype)
    hv = product(lambda q: (q**3).sum(), p, torch.ones_like(p))
    assert hv.dtype == dtype
    torch.testing.assert_close(hv, 6 * p, rtol=2e-2, atol=2e-2)


def test_tied_weights_in_a_module_are_one_parameter():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight
    params = {k: p.detach() for k, p in net.named_parameters()}
    x = normal(3, 4)

    def f(p: Tree) -> Tensor:
        return functional_call(net, p, (x,)).square().mean()

    v = normal_like(params)
    assert "2.weight" not in params
    torch.testing.assert_close(flat(hvp(f, params, v)), dense_hessian(f, params) @ flat(v))


def square(p: Tree) -> Tensor:
    return (p["w"] ** 2).sum()


EVERY_PRODUCT = {
    "jvp": jvp,
    "hvp": hvp,
    "grad_and_hvp": grad_and_hvp,
    "linearize": linearized_hvp,
    "ggnvp": lambda f, p, v: ggnvp(f, torch.square, p, v),
}


@pytest.mark.parametrize("name", EVERY_PRODUCT)
def test_a_direction_that_does_not_match_is_named(name):
    product, params = EVERY_PRODUCT[name], {"w": torch.ones(3)}
    with pytest.raises(ValueError, match=r"v\['w'\] has shape \(2,\); expected \(3,\)"):
        product(square, params, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"v\['w'\] has dtype torch.float64; expected"):
        product(square, params, {"w": torch.ones(3, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"v has the leaves \['x'\]|v has the leaves \[\['x'\]\]"):
        product(square, params, {"x": torch.ones(3)})
    with pytest.raises(ValueError, match=r"v\['w'\] is a float; expected a tensor"):
        product(square, params, {"w": 1.0})
    with pytest.raises(ValueError, match=r"v\['w'\] has device meta; expected cpu"):
        product(square, params, {"w": torch.ones(3, device="meta")})


@pytest.mark.parametrize("name", [*EVERY_PRODUCT, "vjp"])
def test_parameters_that_cannot_be_differentiated_are_named(name):
    product = {**EVERY_PRODUCT, "vjp": vjp}[name]
    for bad, message in (
        (torch.ones(3, dtype=torch.int64), r"params\['w'\] is torch.int64; expected real"),
        (torch.ones(3, dtype=torch.complex64), r"params\['w'\] is complex .*view_as_real"),
        (1.5, r"params\['w'\] is a float; expected a tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            product(square, {"w": bad}, {"w": bad})
    with pytest.raises(ValueError, match="params hold no tensor"):
        product(square, {}, {})


@pytest.mark.parametrize("name", [k for k in EVERY_PRODUCT if k not in ("jvp", "ggnvp")])
def test_a_function_that_is_not_a_scalar_is_named(name):
    product, p = EVERY_PRODUCT[name], torch.ones(3)
    for f, error, message in (
        (torch.square, ValueError, r"f returned a tensor of shape \(3,\).*mean\(\) or sum\(\)"),
        (lambda q: q.sum().reshape(1), ValueError, r"shape \(1,\)"),
        (lambda q: 1.0, TypeError, "f returned a float; expected a scalar tensor"),
        (lambda q: (q > 0).sum(), TypeError, "f returned a tensor of dtype torch.int64"),
        (lambda q: q.sum() * 1j, TypeError, "dtype torch.complex64"),
    ):
        with pytest.raises(error, match=message):
            product(f, p, p)


def test_what_does_not_fit_the_values_is_named():
    p = torch.ones(3)
    with pytest.raises(ValueError, match=r"u has shape \(2,\); expected \(3,\) as in the value"):
        vjp(torch.square, p, torch.ones(2))
    with pytest.raises(TypeError, match=r"the value of f is torch\.int64"):
        vjp(lambda q: (q > 0).long(), p, torch.ones(3))
    with pytest.raises(ValueError, match="loss returned a tensor of shape"):
        ggnvp(torch.square, torch.square, p, p)
    with pytest.raises(TypeError, match=r"the model's output\[1\] is torch.int64"):
        ggnvp(lambda q: (q, torch.ones(2, dtype=torch.int64)), lambda z: z[0].sum(), p, p)


def test_an_exception_inside_the_function_leaves_everything_as_it_was():
    p = torch.ones(3, requires_grad=True)

    def failing(q: Tensor) -> Tensor:
        raise KeyError("inside")

    for product in (hvp, linearized_hvp):
        with pytest.raises(KeyError, match="inside"):
            product(failing, p, torch.ones(3))
    assert p.tolist() == [1.0, 1.0, 1.0]
    assert p.grad is None
    torch.testing.assert_close(
        hvp(lambda q: (q**2).sum(), p.detach(), torch.ones(3)), 2 * p.detach()
    )


def test_the_product_can_be_compiled():
    f, params, x = problem("attention")
    v = normal_like(params)
    compiled = torch.compile(
        lambda p, t: hvp(f, p, t, x), fullgraph=True, backend="aot_eager", dynamic=False
    )
    torch.testing.assert_close(flat(compiled(params, v)), flat(hvp(f, params, v, x)))


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
            flat(product(f, params, v, compiled)), flat(product(f, plain, plain_v, net))
        )
