"""Products by torch.compile: the same values, compiled once, eager where that fails."""

import gc
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functional import combined, joined, normal, normal_like
from product_problems import problem
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from hvpopt.products import compiled, grad_and_hvp, gradient_graph, hvp, linearize

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """An empty cache, torch's own operations in place of generated code, and their count."""
    counted, plain, aot_eager = [], torch.compile, lookup_backend("aot_eager")

    def backend(module: Any, inputs: Any) -> Any:
        counted.append(1)
        return aot_eager(module, inputs)

    monkeypatch.setattr(torch, "compile", lambda f, **o: plain(f, backend=backend, **o))
    compiled._cache.clear()
    yield counted
    compiled._cache.clear()
    torch._dynamo.reset()


MODES = ["auto", "forward_over_reverse", "reverse_over_forward", "reverse_over_reverse"]


@pytest.mark.parametrize("mode", MODES)
def test_compiled_products_are_the_eager_ones(compilations, mode):
    f, params, x = problem("mlp")
    v = normal_like(params)
    found = grad_and_hvp(f, params, v, x, mode=mode, compile=True)
    for compiled_part, part in zip(found, grad_and_hvp(f, params, v, x), strict=True):
        torch.testing.assert_close(joined(compiled_part), joined(part))
    vs = combined(lambda p: torch.stack([normal_like(p, seed=s) for s in range(3)]), params)
    torch.testing.assert_close(
        joined(hvp(f, params, vs, x, mode=mode, compile=True)), joined(hvp(f, params, vs, x))
    )
    assert len(compilations) == 1


@pytest.mark.parametrize("name", ["attention", "batch norm", "silu"])
def test_networks_compile(compilations, name):
    f, params, x = problem(name)
    v = normal_like(params)
    expected = hvp(f, params, v, x)
    torch.testing.assert_close(joined(hvp(f, params, v, x, compile=True)), joined(expected))
    point = linearize(f, params, x, compile=True)
    torch.testing.assert_close(joined(point.hvp(v)), joined(expected))
    torch.testing.assert_close(joined(point.grad), joined(linearize(f, params, x).grad))
    assert len(compilations) == 2


def test_a_compiled_linearization_takes_many_directions(compilations):
    f, params, x = problem("mlp")
    point, eager = linearize(f, params, x, compile=True), linearize(f, params, x)
    vs = combined(lambda p: torch.stack([normal_like(p, seed=s) for s in range(3)]), params)
    for _ in range(2):
        torch.testing.assert_close(joined(point.hvp(vs)), joined(eager.hvp(vs)))
    assert not point.loss.requires_grad
    assert not any(t.requires_grad for t in (*point.grad.values(), *point.hvp(vs).values()))


def cubes(x: Tensor, c: float) -> Callable[[Tensor], Tensor]:
    return lambda p: c * (x * p**3).sum()


def test_a_function_made_anew_at_each_call_is_compiled_once(compilations):
    p, v = normal(4), normal(4, seed=1)
    for seed in range(12):
        x = normal(4, seed=seed)
        torch.testing.assert_close(hvp(cubes(x, 1.0), p, v, compile=True), 6 * x * p * v)
        torch.testing.assert_close(linearize(cubes(x, 1.0), p, compile=True).hvp(v), 6 * x * p * v)
    assert len(compilations) == 2
    assert len(compiled._cache) == 2


def test_what_a_function_depends_on_is_looked_at_again(compilations):
    p, v, x = normal(4), normal(4, seed=1), normal(4, seed=2)
    f = cubes(x, 1.0)
    hvp(f, p, v, compile=True)
    x += 1  # in place
    torch.testing.assert_close(hvp(f, p, v, compile=True), 6 * x * p * v)
    torch.testing.assert_close(hvp(cubes(x, 5.0), p, v, compile=True), 30 * x * p * v)
    wide = normal(7)
    torch.testing.assert_close(
        hvp(cubes(wide, 1.0), wide, wide, compile=True), 6 * wide * wide * wide
    )


def test_the_cache_keeps_few_functions_and_none_of_their_tensors(compilations, monkeypatch):
    monkeypatch.setattr(compiled, "MAX_FUNCTIONS", 2)
    p = normal(3)
    for f in (lambda q: (q**2).sum(), lambda q: (q**4).sum()):
        hvp(f, p, p, compile=True)
    x = normal(3, seed=1)
    gone = weakref.ref(x)
    hvp(cubes(x, 1.0), p, p, compile=True)
    assert len(compiled._cache) == 2
    del x
    gc.collect()
    assert gone() is None


def broken(p: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return (p**3).sum()


def test_what_cannot_be_compiled_runs_eagerly_with_one_warning(compilations):
    p, v = normal(4), normal(4, seed=1)
    with pytest.warns(UserWarning, match=r"compile=True falls back to eager execution: .*break"):
        torch.testing.assert_close(hvp(broken, p, v, compile=True), 6 * p * v)
    with pytest.warns(UserWarning, match="falls back to eager"):
        torch.testing.assert_close(linearize(broken, p, compile=True).hvp(v), 6 * p * v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leaf = p.clone().requires_grad_()
        torch.testing.assert_close(hvp(broken, leaf, v, compile=True), 6 * p * v)
        torch.testing.assert_close(linearize(broken, p, compile=True).hvp(v), 6 * p * v)
    assert compilations == []


def test_a_compiler_that_fails_is_a_reason_too(monkeypatch):
    compiled._cache.clear()
    plain = torch.compile

    def backend(module: Any, inputs: Any) -> Any:
        raise OSError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda f, **o: plain(f, backend=backend, **o))
    p, v = normal(4), normal(4, seed=1)
    with pytest.warns(UserWarning, match="no compiler here"):
        torch.testing.assert_close(hvp(lambda q: (q**3).sum(), p, v, compile=True), 6 * p * v)
    with pytest.warns(UserWarning, match="no compiler here"):
        found = linearize(lambda q: (q**3).sum(), p, compile=True).hvp(v)
    torch.testing.assert_close(found, 6 * p * v)
    compiled._cache.clear()
    torch._dynamo.reset()


def test_ever_new_shapes_are_named_and_what_was_compiled_stays(compilations):
    def products() -> None:
        for n in range(2, 14):
            p = normal(n)
            torch.testing.assert_close(hvp(lambda q: (q**3).sum(), p, p, compile=True), 6 * p * p)

    with pytest.warns(UserWarning, match=r"compiled too often.*same function object"):
        products()
    assert 2 <= len(compilations) <= 12


def test_the_functions_own_errors_are_raised(compilations):
    p = torch.ones(3)

    def failing(q: Tensor) -> Tensor:
        raise KeyError("inside")

    for product in (lambda f: hvp(f, p, p, compile=True), lambda f: linearize(f, p, compile=True)):
        with pytest.raises(KeyError, match="inside"):
            product(failing)
        with pytest.raises(ValueError, match=r"f returned a tensor of shape \(3,\)"):
            product(lambda q: q**2)


def test_compiled_products_are_values(compilations):
    p, v = normal(4).requires_grad_(), normal(4, seed=1)
    found = grad_and_hvp(lambda q: (q**3).sum(), p, v, compile=True)
    assert not any(t.requires_grad for t in found)
    assert p.requires_grad
    assert p.grad is None


def test_compilation_inside_a_transform_or_of_differences_is_an_error():
    p, vs = normal(3), normal(2, 3)
    with pytest.raises(ValueError, match=r"compile=True is inside a torch.func transform"):
        torch.vmap(lambda v: hvp(lambda q: (q**2).sum(), p, v, compile=True))(vs)
    with pytest.raises(ValueError, match="compile=True with mode='finite_difference'"):
        hvp(lambda q: (q**2).sum(), p, p, mode="finite_difference", compile=True)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")
def test_generated_code_gives_the_same_products():
    compiled._cache.clear()
    for name in ("mlp", "attention"):
        f, params, x = problem(name)
        v = normal_like(params)
        expected = hvp(f, params, v, x)
        torch.testing.assert_close(joined(hvp(f, params, v, x, compile=True)), joined(expected))
        torch.testing.assert_close(
            joined(linearize(f, params, x, compile=True).hvp(v)), joined(expected)
        )


def test_fallen_back_products_are_values_and_heed_their_limits(monkeypatch, compilations):
    w, p, vs = normal(3).requires_grad_(), normal(3, seed=1), normal(4, 3, seed=2)
    sizes, for_each = [], gradient_graph.for_each

    def f(p: Tensor) -> Tensor:
        return (w * p**3).sum() * (1.0 if float(p.detach().sum()) < 1e9 else 2.0)

    def spy(one: Any, v: Any, k: int, chunk: int, *rest: Any) -> Any:
        sizes.append(chunk)
        return for_each(one, v, k, chunk, *rest)

    with pytest.warns(UserWarning, match="falls back to eager"):
        first = hvp(f, p, vs[0], compile=True)
    monkeypatch.setattr(gradient_graph, "for_each", spy)
    again = hvp(f, p, vs, compile=True, chunk_size=2)
    assert not first.requires_grad
    assert not again.requires_grad
    torch.testing.assert_close(again, 6 * w.detach() * p * vs)
    torch.testing.assert_close(first, again[0])
    assert sizes == [2]
