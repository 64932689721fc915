"""Pictures of the curvature, drawn with matplotlib, as arrays for TensorBoard."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hvpopt.lightning.monitors.look import Slices

Picture = NDArray[np.uint8]
"""(height, width, 3)."""

Points = tuple[Sequence[float], Sequence[float]]
"""Nodes and weights of a spectrum; the weights sum to one."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def spectrum_figure(
    steps: Sequence[int], spectra: Sequence[Points], grid: NDArray[Any], density: NDArray[Any],
    spread: NDArray[Any],
) -> Picture:  # fmt: skip
    """The density of the eigenvalues now, and how it has changed since training began.

    Over time the eigenvalues are on the scale asinh(λ / s), which is linear near zero and
    logarithmic far from it, and the colour is the share of eigenvalues at a place of that scale.

    Args:
        steps: when the spectra were measured, increasing.
        spectra: of each step.
        grid: (g,) eigenvalues.
        density: (g,) the density of the last spectrum there.
        spread: (g,) its standard error over the probes.
    """
    figure = _figure(10.0, 3.8)
    now, over_time = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.07, right=0.97, bottom=0.14, top=0.91, wspace=0.22)
    now.semilogy(grid, density, color=_BLUE, lw=1.5)
    floor = max(float(density.max()) * 1e-6, 1e-300)
    now.fill_between(
        grid, np.maximum(density - spread, floor), density + spread, color=_BLUE, alpha=0.25, lw=0
    )
    now.set(
        title=f"Spectral density, step {steps[-1]}",
        xlabel="eigenvalue λ",
        ylabel="density (± standard error)",
        ylim=(floor, 3 * float(density.max())),
    )

    scale = _linear_scale(spectra)
    places = [np.arcsinh(np.asarray(nodes) / scale) for nodes, _ in spectra]
    low, high = min(p.min() for p in places), max(p.max() for p in places)
    width = 0.01 * max(high - low, 1e-9)
    rows = np.linspace(low - 3 * width, high + 3 * width, 200)
    columns = [
        (np.exp(-0.5 * ((rows[:, None] - p) / width) ** 2) * np.asarray(weights)).sum(1)
        for p, (_, weights) in zip(places, spectra, strict=True)
    ]
    shade = np.log10(np.maximum(np.stack(columns, 1), 1e-4))
    mesh = over_time.pcolormesh(_edges(steps), _edges(rows), shade, cmap="magma")
    ticks = _ticks(scale, rows[0], rows[-1])
    over_time.set_yticks(np.arcsinh(ticks / scale), [f"{tick:g}" for tick in ticks])
    over_time.set(title="Spectrum over time", xlabel="step", ylabel="eigenvalue λ")
    over_time.locator_params(axis="x", integer=True)
    figure.colorbar(mesh, ax=over_time, label="log₁₀ share")
    return _drawn(figure)


def layers_figure(steps: Sequence[int], layers: Sequence[Mapping[str, float]]) -> Picture:
    """The trace of every layer over time, as a heat map.

    Args:
        steps: when the traces were measured, increasing.
        layers: the trace of each layer at each step; layers may come and go.
    """
    names = list(dict.fromkeys(name for found in layers for name in found))
    values = np.array([[found.get(name, np.nan) for found in layers] for name in names])
    height = max(2.4, 1.2 + 0.3 * len(names))
    values[~np.isfinite(values)] = np.nan
    figure = _figure(8.0, height)
    axes = figure.subplots()
    left = min(0.05 + 0.0105 * max(map(len, names)), 0.5)
    figure.subplots_adjust(left=left, right=1.0, bottom=0.5 / height, top=1 - 0.35 / height)
    scale = max(float(np.nanmax(np.abs(values), initial=0.0)), 1e-30)
    shade = np.sign(values) * np.log10(1 + np.abs(values) / (1e-3 * scale))
    limit = float(np.log10(1 + 1e3))
    mesh = axes.pcolormesh(
        _edges(steps),
        np.arange(len(names) + 1) - 0.5,
        shade,
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
    )
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.set(title="Trace of the curvature by layer", xlabel="step")
    axes.locator_params(axis="x", integer=True)
    bar = figure.colorbar(mesh, ax=axes)
    ticks = np.array([-1.0, -0.1, -0.01, 0.0, 0.01, 0.1, 1.0])
    bar.set_ticks(
        np.sign(ticks) * np.log10(1 + np.abs(ticks) / 1e-3),
        labels=[f"{float(f'{t * scale:.2g}'):g}" for t in ticks],
    )
    return _drawn(figure)


def slices_figure(step: int, slices: "Slices") -> Picture:
    """The loss along the top eigenvectors, with its quadratic model, and over their plane."""
    count = len(slices.eigenvalues)
    figure = _figure(12.0 if count == 2 else 4.5, 3.6)
    axes = figure.subplots(1, count + (count == 2), squeeze=False)[0]
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.14, top=0.83, wspace=0.24)
    for i, (value, slope) in enumerate(zip(slices.eigenvalues, slices.slopes, strict=True)):
        distances, losses = (x.numpy() for x in slices.line(i))
        fine = np.linspace(distances[0], distances[-1], 61)
        model = losses[len(losses) // 2] + slope * fine + 0.5 * value * fine**2
        axes[i].plot(distances, losses, "o-", color=_BLUE, ms=3, lw=1.5, label="loss")
        axes[i].plot(fine, model, "--", color=_ORANGE, lw=1.2, label="quadratic model")
        title = f"Along eigenvector {i + 1}, λ = {value:.3g}"
        axes[i].set(title=title, xlabel="distance", ylabel="loss")
    axes[0].legend(frameon=False)
    if count == 2:
        first, second = (x.numpy() for x in slices.values.distances)
        losses = slices.values.values.numpy().T
        filled = axes[2].contourf(first, second, losses, levels=20, cmap="viridis")
        axes[2].plot(0, 0, "w+", ms=10)
        axes[2].set(title="Plane of both", xlabel="distance along 1", ylabel="distance along 2")
        figure.colorbar(filled, ax=axes[2], label="loss")
    figure.suptitle(f"Loss slices, step {step}", fontsize=11)
    return _drawn(figure)


_BLUE, _ORANGE = "#1f5fa8", "#d9731a"


def _figure(width: float, height: float) -> "Figure":
    # by the classes themselves: pyplot would change the user's backend
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100)


def _drawn(figure: "Figure") -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _linear_scale(spectra: Sequence[Points]) -> float:
    """Below which eigenvalues are drawn on a linear scale: a thousandth of the largest."""
    largest = max(float(np.max(np.abs(nodes))) for nodes, _ in spectra)
    return 1e-3 * largest if largest > 0 else 1.0


def _edges(centres: Sequence[float] | NDArray[Any]) -> NDArray[Any]:
    """(n + 1,) the edges of cells around n centres."""
    at = np.asarray(centres, dtype=float)
    if len(at) == 1:
        return at[0] + np.array([-0.5, 0.5])
    inner = (at[1:] + at[:-1]) / 2
    return np.concatenate([[2 * at[0] - inner[0]], inner, [2 * at[-1] - inner[-1]]])


def _ticks(scale: float, low: float, high: float) -> NDArray[Any]:
    """Powers of ten, with their signs, that lie in a range of asinh(λ / scale)."""
    first = int(np.ceil(np.log10(scale)))
    powers = 10.0 ** np.arange(first, first + 8)
    ticks = np.concatenate([-powers[::-1], [0.0], powers])
    places = np.arcsinh(ticks / scale)
    return ticks[(places >= low) & (places <= high)]
