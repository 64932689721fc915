"""What can be measured of a curvature: scalars, and what is drawn."""

import math
import time
from collections.abc import Callable
from functools import partial

import torch

from hvpopt import trees
from hvpopt.curvature import (
    Sharpness,
    StabilityLimit,
    alignment,
    directional_curvature,
    layerwise,
    layerwise_trace,
    loss_slice,
    named_blocks,
    optimizer_limit,
    sharpness,
    spectral_density,
    top_eigenpairs,
)
from hvpopt.lightning.monitors.look import Look, Slices
from hvpopt.trees import TensorList


def _sharpness(look: Look) -> None:
    limit = _limit(look)
    plain = limit if limit is not None and limit.preconditioner is None else None
    found = _found_sharpness(look, plain, "sharpness")
    look.scalars["top_eigenvalue"] = found.eigenpairs.values[0]
    if limit is not None and plain is None:
        found = _found_sharpness(look, limit, "preconditioned sharpness")
    if limit is not None:
        look.scalars.update(sharpness=found.value, stability_threshold=limit.threshold)
    look.sharpness = found


def _found_sharpness(look: Look, limit: StabilityLimit | None, key: str) -> Sharpness:
    found = sharpness(
        look.operator,
        limit=limit,
        max_steps=look.effort.max_lanczos_steps,
        rtol=look.effort.rtol,
        generator=look.generator(),
        start=look.memory.get(key),
    )
    look.remember(key, found.eigenpairs)
    look.num_products += found.num_products
    return found


def _limit(look: Look) -> StabilityLimit | None:
    """The optimizer's stability limit; None for those that have none."""
    optimizer = getattr(look.optimizer, "optimizer", look.optimizer)  # a handover's current one
    try:
        return optimizer_limit(optimizer, look.operator.params)
    except (TypeError, ValueError):  # none is known of this kind, or its options
        return None


def _trace(look: Look) -> None:
    _traces(look, {"": look.operator.params}, with_layers="layers" in look.names)


def _layers(look: Look) -> None:
    if look.layers is None:  # else they came with the whole trace, from the same products
        _traces(look, {}, with_layers=True)


def _traces(look: Look, blocks: dict[str, TensorList], *, with_layers: bool) -> None:
    if with_layers:
        blocks = blocks | named_blocks(look.module, look.operator.params)
    found = layerwise_trace(
        look.operator,
        blocks=blocks,
        num_probes=look.effort.num_probes,
        generator=look.generator(),
    )
    look.num_products += next(iter(found.values())).num_products
    whole = found.pop("", None)
    if whole is not None:
        low, high = whole.band(0.95)
        look.scalars.update(trace=whole.value, trace_low=low, trace_high=high)
    if with_layers:
        look.layers = {name: estimate.value for name, estimate in found.items()}
        look.scalars.update({f"layer_trace/{name}": x for name, x in look.layers.items()})


def _alignment(look: Look) -> None:
    gradient = look.operator.gradient()
    if 0 < float(trees.norm(gradient)) < math.inf:
        found = alignment(gradient, look.top(_two(look)))
        along = directional_curvature(look.operator, gradient)
        look.num_products += along.num_products
        look.scalars.update(gradient_share=found.share, gradient_curvature=along.value)


def _spectrum(look: Look) -> None:
    found = spectral_density(
        look.operator,
        num_probes=look.effort.num_density_probes,
        num_steps=look.effort.density_steps,
        generator=look.generator(),
    )
    look.num_products += found.num_products
    if not bool((found.weights > 0).any()):  # products that are not finite have no spectrum
        return
    low, high = found.range
    negative = found.share_below(-0.01 * max(abs(low), abs(high)))
    look.scalars.update(spectrum_min=low, spectrum_max=high, negative_share=negative.value)
    look.spectrum = found


def _layer_sharpness(look: Look) -> None:
    estimate = partial(
        top_eigenpairs,
        max_steps=look.effort.max_lanczos_steps,
        rtol=look.effort.rtol,
        converge="values",
        generator=look.generator(),
    )
    blocks = named_blocks(look.module, look.operator.params)
    found = layerwise(estimate, look.operator, blocks=blocks)
    look.num_products += sum(pairs.num_products for pairs in found.values())
    look.scalars.update({f"layer_top_eigenvalue/{n}": e.values[0] for n, e in found.items()})


def _slices(look: Look) -> None:
    """Comes last: that the parameters move costs the operator its graph."""
    operator, params = look.operator, look.operator.params
    gradient, pairs, loss = operator.gradient(), look.top(_two(look)), float(operator.loss())
    if not all(map(math.isfinite, (loss, *pairs.values))):
        return
    farthest = 0.5 * float(trees.norm([p.detach() for p in params]))
    radii = [  # where the quadratic model has doubled the loss
        min(farthest, math.sqrt(2 * abs(loss / value))) if value else farthest
        for value in pairs.values
    ]
    grid = [torch.linspace(-r, r, 7, dtype=torch.float64) for r in radii]
    values = loss_slice(
        lambda _: operator.loss(),
        params,
        pairs.vectors,
        distances=(grid[0], grid[1]) if len(grid) == 2 else grid[0],
        in_place=True,
    )
    slopes = tuple(float(trees.dot(gradient, vector)) for vector in pairs.vectors)
    look.slices = Slices(values, pairs.values, slopes)


def _two(look: Look) -> int:
    return min(2, sum(p.numel() for p in look.operator.params))


MEASURES: dict[str, Callable[[Look], None]] = {
    "sharpness": _sharpness,
    "trace": _trace,
    "alignment": _alignment,
    "spectrum": _spectrum,
    "layers": _layers,
    "layer_sharpness": _layer_sharpness,
    "slices": _slices,
}
"""By the name that a user gives, in the order in which they are taken."""


def take(look: Look) -> None:
    """Takes the measures that the look is for, in their order in `MEASURES`."""
    for name, measure in MEASURES.items():
        if name in look.names:
            start = time.perf_counter()
            measure(look)
            look.seconds[name] = time.perf_counter() - start
