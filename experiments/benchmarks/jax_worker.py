"""JAX's products of one network, measured in a process of their own.

`jax_process` starts it with the name of a file of arrays, and options; it prints its figures as
JSON.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .jax_models import MODELS, Array, Params, cross_entropy
from .tasks import (
    GGNS,
    HVPS,
    ONE_SHOT_GGN,
    ONE_SHOT_HVP,
    REPEATED_GGN,
    REPEATED_HVP,
    Curvature,
    Layout,
    Product,
)
from .timing import Times, free_bytes, interleaved_times, timed

CPU = torch.device("cpu")
"""JAX waits for its own device."""

Data = tuple[Array, Array]


@dataclass(frozen=True)
class Compiled:
    """A way to a product, compiled."""

    product: Product
    engine: str
    run: Callable[[], Any]
    num_bytes: int
    """Outputs and temporaries, and what is kept for a repeated product."""
    layout: Layout

    def read(self, result: Any, index: int) -> dict[str, Array]:
        """The product with one direction."""
        if self.layout == "list":
            product: dict[str, Array] = result[index]
            return product
        return {name: x[index] if self.layout == "rows" else x for name, x in result.items()}


class Network:
    """A network's compiled gradient and products.

    Args:
        name: Its name in `MODELS`.
        arrays: ``inputs``, ``targets``, ``params/…`` by name, and ``directions/…``, one a row.
    """

    def __init__(self, name: str, arrays: dict[str, Array]) -> None:
        self._model = MODELS[name]
        self._params = _named(arrays, "params/", 0)
        self._directions = _named(arrays, "directions/", 1)
        inputs = arrays["inputs"]
        if inputs.ndim == 4:
            inputs = inputs.transpose(0, 2, 3, 1)
        self._data: Data = jnp.asarray(inputs), jnp.asarray(arrays["targets"])
        compiled = _compiled(jax.value_and_grad(self._loss), self._params, self._data)
        self.gradient_bytes = _num_bytes(compiled)
        self._built: dict[Curvature, tuple[Any, Any]] = {}
        self.gradient = lambda: jax.block_until_ready(compiled(self._params, self._data))

    def ways(self, counts: Sequence[int]) -> Iterator[tuple[Product, str, Callable[[], Compiled]]]:
        """Each way to each product, with one and with more vectors; compiled when called."""
        for product, name, function in (
            (ONE_SHOT_HVP, "JAX jvp of grad", self._hvp),
            (ONE_SHOT_GGN, "JAX jvp, vjp", self._ggn),
        ):
            yield product, name, partial(self._one_shot, product, name, function)
        for product in (REPEATED_HVP, REPEATED_GGN):
            yield product, "JAX linearize", partial(self._repeated, product, "JAX linearize", "one")
        ways: list[tuple[str, Layout]] = [("one by one", "list"), ("vmap", "rows")]
        for i, count in enumerate(counts):
            for product in (HVPS[count], GGNS[count]):
                for way, layout in ways if i == 0 else ways[1:]:  # one by one is known by then
                    name = f"JAX linearize, {way}"
                    yield product, name, partial(self._repeated, product, name, layout)

    def is_compiled(self, product: Product, engine: str) -> bool:
        """Whether the way needs no compilation any more."""
        return engine.endswith("one by one") and product.curvature in self._built

    def error(self, product: Params, expected: Array) -> float:
        """Relative, of a product against one that is flat in the layout of torch's parameters."""
        # in this order: JAX returns names sorted
        parts = [from_jax(np.asarray(product[name])).reshape(-1) for name in self._params]
        return float(np.linalg.norm(np.concatenate(parts) - expected) / np.linalg.norm(expected))

    def _loss(self, params: Params, data: Data) -> Array:
        return cross_entropy(self._model(params, data[0]), data[1])

    def _hvp(self, params: Params, data: Data, v: Params) -> Any:
        gradient = jax.value_and_grad(partial(self._loss, data=data))
        primal, (_, product) = jax.jvp(gradient, (params,), (v,))
        return product, primal

    def _ggn(self, params: Params, data: Data, v: Params) -> Any:
        z, along = jax.jvp(lambda p: self._model(p, data[0]), (params,), (v,))
        curved = jax.jvp(jax.grad(partial(cross_entropy, targets=data[1])), (z,), (along,))[1]
        return jax.vjp(lambda p: self._model(p, data[0]), params)[1](curved)[0], z

    def _linearized_grad(self, params: Params, data: Data) -> Any:
        return jax.linearize(jax.grad(partial(self._loss, data=data)), params)[1]

    def _linearized_model(self, params: Params, data: Data) -> Any:
        z, push = jax.linearize(lambda p: self._model(p, data[0]), params)
        return push, jax.linearize(jax.grad(partial(cross_entropy, targets=data[1])), z)[1]

    def _vectors(self, count: int) -> Params:
        return {k: v[0] if count == 1 else v[:count] for k, v in self._directions.items()}

    def _one_shot(self, product: Product, name: str, function: Any) -> Compiled:
        arguments = self._params, self._data, self._vectors(1)
        compiled = _compiled(function, *arguments)

        def run() -> Any:
            return jax.block_until_ready(compiled(*arguments))[0]

        return Compiled(product, name, run, _num_bytes(compiled), "one")

    def _repeated(self, product: Product, name: str, layout: Layout) -> Compiled:
        """The application of what is built once; it is compiled once for one vector."""
        vectors = self._vectors(product.count)
        each = [{k: v[i] for k, v in vectors.items()} for i in range(product.count)]
        if product.curvature not in self._built:
            self._built[product.curvature] = self._build(product.curvature)
        kept, compiled = self._built[product.curvature]
        if layout == "rows":
            compiled = _compiled(jax.vmap(_apply, (None, 0)), kept, vectors)
        size = _num_bytes(compiled) + sum(x.nbytes for x in jax.tree.leaves(kept))

        def run() -> Any:
            if layout == "list":
                return jax.block_until_ready([compiled(kept, v) for v in each])
            return jax.block_until_ready(compiled(kept, vectors))

        return Compiled(product, name, run, size, layout)

    def _build(self, curvature: Curvature) -> tuple[Any, Any]:
        build = self._linearized_grad if curvature == "hessian" else self._linearized_model
        kept = jax.block_until_ready(jax.jit(build)(self._params, self._data))
        return kept, _compiled(_apply, kept, self._vectors(1))


def measure(
    network: Network,
    expected: dict[tuple[str, str], Array],
    counts: Sequence[int],
    *,
    repeats: int,
    seconds: float,
    compile_seconds: float,
) -> list[dict[str, Any]]:
    """The figures of each way, product by product; times are lists of seconds over the rounds.

    Args:
        network: The network.
        expected: Products by curvature and direction's number.
        counts: Numbers of vectors beside one.
        repeats: Rounds of timing.
        seconds: Fewer rounds where they would take longer; where not even two fit, the time is
            that of the run that was checked.
        compile_seconds: After so long, nothing more is compiled.
    """
    figures = []
    start = time.perf_counter()
    for product, engine, compile in network.ways(counts):
        figure: dict[str, Any] = {"what": product.what, "engine": engine}
        try:
            is_late = time.perf_counter() - start > compile_seconds
            if is_late and not network.is_compiled(product, engine):
                raise TimeoutError(f"not run: the others took longer than {compile_seconds:.0f} s")
            compiled, figure["build_seconds"] = timed(compile, CPU)
            if compiled.num_bytes > 0.6 * free_bytes(CPU):
                size = compiled.num_bytes / 2**30
                raise MemoryError(f"not run: it would take some {size:.0f} GiB")
            gradient_once = timed(network.gradient, CPU)[1]
            result, once = timed(compiled.run, CPU)
            figure["error"] = max(
                network.error(compiled.read(result, int(index)), reference)
                for (curvature, index), reference in expected.items()
                if curvature == product.curvature and int(index) < product.count
            )
        except Exception as error:  # JAX may raise anything
            figures.append({**figure, "failure": str(error).strip().partition("\n")[0]})
            continue
        runs = {"gradient": network.gradient, "product": compiled.run}
        times = {"gradient": Times((gradient_once,)), "product": Times((once,))}
        if once < seconds:
            times["product"] = Times((timed(compiled.run, CPU)[1],))  # the first is slower
        rounds = min(repeats, int(seconds / (gradient_once + once)) - 1)
        if rounds >= 1:
            times = interleaved_times(runs, repeats=rounds, device=CPU)
        figure["memory_bytes"] = compiled.num_bytes
        figures.append({**figure, **{name: t.seconds for name, t in times.items()}})
    return figures


def _apply(kept: Any, v: Params) -> Params:
    """H v by the linearized gradient, or Jᵀ ∇²ℓ J v by the linearized model and its transpose."""
    if not isinstance(kept, tuple):
        product: Params = kept(v)
        return product
    push, curve = kept
    (product,) = jax.linear_transpose(push, v)(curve(push(v)))
    return product


def _compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile()


def _num_bytes(compiled: Any) -> int:
    sizes = compiled.memory_analysis()
    return int(sizes.output_size_in_bytes + sizes.temp_size_in_bytes)


def _named(arrays: dict[str, Array], prefix: str, leading: int) -> Params:
    return {
        name.removeprefix(prefix): jnp.asarray(to_jax(x, leading))
        for name, x in arrays.items()
        if name.startswith(prefix)
    }


def to_jax(x: Array, leading: int = 0) -> Array:
    """A parameter from torch; kernels become height × width × in × out."""
    return np.moveaxis(x, (leading, leading + 1), (-1, -2)) if x.ndim == leading + 4 else x


def from_jax(x: Array) -> Array:
    """The reverse of `to_jax`, without leading dimensions."""
    return np.moveaxis(x, (-1, -2), (0, 1)) if x.ndim == 4 else x


def main(path: str, options: str) -> None:
    """Measures the network whose arrays are in the file at ``path``, by options in JSON."""
    model, platform, counts, limits = json.loads(options)
    jax.config.update("jax_platforms", platform)
    jax.config.update("jax_default_matmul_precision", "highest")  # float32, as in torch
    with np.load(path) as file:
        arrays = dict(file)
    network = Network(model, arrays)
    expected = {
        (name.split("/")[1], name.split("/")[2]): x
        for name, x in arrays.items()
        if name.startswith("expected/")
    }
    network.gradient()
    gradient = [timed(network.gradient, CPU)[1] for _ in range(limits["repeats"])]
    figures = measure(network, expected, counts, **limits)
    content = {
        "gradient": gradient,
        "gradient_bytes": network.gradient_bytes,
        "device": str(jax.devices()[0]),
        "figures": figures,
    }
    print(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
