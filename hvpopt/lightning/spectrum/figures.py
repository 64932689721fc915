"""The pictures of one report, or of several side by side."""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from hvpopt.lightning.spectrum.report import Plane, SpectrumReport

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind readers tell apart; lines differ in their dashes, too."""
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_STYLE: Any = {
    "axes.edgecolor": "#8a8f98",
    "axes.grid": True,
    "axes.labelcolor": "#2b2f36",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "hvpopt",
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
}
_MOST_LAYERS = 24


def check_can_draw() -> None:
    """Raises RuntimeError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise RuntimeError(
            "The report's pictures are drawn by matplotlib, which is not installed: "
            "pip install 'hvpopt[experiments]'."
        )


def figures(reports: Sequence[SpectrumReport]) -> dict[str, Any]:
    """Figures of matplotlib by name; those alone for which the reports hold anything.

    "density", "eigenvalues", "layers", "slices", "plane".
    """
    import matplotlib

    makers: dict[str, Callable[[Sequence[SpectrumReport]], Any]] = {
        "density": _density,
        "eigenvalues": _eigenvalues,
        "layers": _layers,
        "slices": _slices,
        "plane": _planes,
    }
    with matplotlib.rc_context(_STYLE):
        made = {name: make(reports) for name, make in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def _canvas(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _line(index: int) -> dict[str, Any]:
    return {"color": _colour(index), "linestyle": _DASHES[index % len(_DASHES)]}


def _is_shown(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _density(reports: Sequence[SpectrumReport]) -> Any:
    """Eigenvalues in a unit, on a logarithmic scale, with the extreme ones marked."""
    canvas = _canvas(9.6, 3.8)
    axis = canvas.subplots()
    highest = 0.0
    for i, report in enumerate(reports):
        density, n = report.density, report.num_params
        if not _is_shown(density.values):
            continue
        counts = [n * x for x in density.values]
        spread = [n * x if math.isfinite(x) else 0.0 for x in density.spread]
        highest = max(highest, *counts)
        axis.plot(density.grid, counts, label=report.name, linewidth=1.8, **_line(i))
        low = [max(c - s, 0) for c, s in zip(counts, spread, strict=True)]
        high = [c + s for c, s in zip(counts, spread, strict=True)]
        axis.fill_between(density.grid, low, high, color=_colour(i), alpha=0.15, lw=0)
        ends = [e.value for e in (*report.top, *report.bottom)]
        axis.plot(
            ends,
            [0.015 + 0.035 * i] * len(ends),
            marker="|",
            markersize=11,
            markeredgewidth=1.6,
            linestyle="none",
            color=_colour(i),
            transform=axis.get_xaxis_transform(),
            label="extreme eigenvalues" if len(reports) == 1 else None,
        )
    if highest <= 0:
        return None
    axis.set_yscale("log")
    axis.set_ylim(max(highest * 1e-7, 1e-3 * min(1.0, highest)), highest * 3)
    axis.axvline(0, color="#8a8f98", linewidth=0.8)
    axis.set_xlabel("eigenvalue")
    axis.set_ylabel("eigenvalues per unit")
    axis.legend(loc="upper right")
    return canvas


def _eigenvalues(reports: Sequence[SpectrumReport]) -> Any:
    """The extreme eigenvalues with their residual bounds."""
    num_top = max(len(r.top) for r in reports)
    num_bottom = max(len(r.bottom) for r in reports)
    canvas = _canvas(9.6, 3.4)
    axis = canvas.subplots()
    for i, report in enumerate(reports):
        shift = 0.16 * (i - (len(reports) - 1) / 2)
        places = [j + shift for j in range(len(report.top))]
        places += [num_top + num_bottom - 1 - j + shift for j in range(len(report.bottom))]
        found = [*report.top, *report.bottom]
        axis.errorbar(
            places,
            [e.value for e in found],
            yerr=[e.residual_bound for e in found],
            fmt="osD^vP*"[i % 7],
            color=_colour(i),
            markersize=6,
            capsize=4,
            label=report.name,
        )
    subscripts = [f"λ$_{{{j + 1}}}$" for j in range(num_top)]
    subscripts += [f"λ$_{{n-{j}}}$" if j else "λ$_n$" for j in reversed(range(num_bottom))]
    axis.set_xticks(range(num_top + num_bottom), subscripts)
    axis.axhline(0, color="#8a8f98", linewidth=0.8)
    axis.set_ylabel("eigenvalue")
    if len(reports) > 1:
        axis.legend()
    return canvas


def _layers(reports: Sequence[SpectrumReport]) -> Any:
    """The trace of each layer's block with its standard error, largest layers where many."""
    sizes: dict[str, float] = {}
    for report in reports:
        for layer in report.layers:
            sizes[layer.name] = max(sizes.get(layer.name, 0.0), abs(layer.trace.value))
    largest = set(sorted(sizes, key=lambda name: -sizes[name])[:_MOST_LAYERS])
    names = [name for name in sizes if name in largest]  # in the module's order
    width = 0.8 / len(reports)
    canvas = _canvas(9.6, 1.2 + len(names) * (0.26 + 0.12 * len(reports)))
    axis = canvas.subplots()
    for i, report in enumerate(reports):
        traces = {layer.name: layer.trace for layer in report.layers}
        rows = [j for j, name in enumerate(names) if name in traces]
        axis.barh(
            [j + width * (i - (len(reports) - 1) / 2) for j in rows],
            [traces[names[j]].value for j in rows],
            height=width * 0.9,
            xerr=[_finite(traces[names[j]].standard_error) for j in rows],
            color=_colour(i),
            ecolor="#2b2f36",
            capsize=2.5,
            label=report.name,
        )
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.axvline(0, color="#8a8f98", linewidth=0.8)
    axis.set_xlabel("trace of the layer's block")
    if len(reports) > 1:
        axis.legend()
    return canvas


def _slices(reports: Sequence[SpectrumReport]) -> Any:
    """The loss along eigenvectors, beside its quadratic model."""
    labels = list(dict.fromkeys(s.label for r in reports for s in r.slices))
    if not labels:
        return None
    canvas = _canvas(9.6, 3.6)
    axes = canvas.subplots(1, len(labels), squeeze=False)[0]
    for axis, label in zip(axes, labels, strict=True):
        axis.set_title(label)
        for i, report in enumerate(reports):
            for found in (s for s in report.slices if s.label == label):
                model = [
                    report.loss + found.slope * d + found.eigenvalue * d**2 / 2
                    for d in found.distances
                ]
                colour = _colour(i)
                name = report.name if len(reports) > 1 else "loss"
                axis.plot(found.distances, found.losses, linewidth=2, color=colour, label=name)
                axis.plot(
                    found.distances,
                    model,
                    linewidth=1.2,
                    linestyle=(0, (4, 2)),
                    color=colour if len(reports) > 1 else COLOURS[1],
                    label="quadratic model" if len(reports) == 1 else None,
                )
        axis.axvline(0, color="#8a8f98", linewidth=0.8)
        axis.set_xlabel("distance")
    axes[0].set_ylabel("loss")
    handles, names = axes[0].get_legend_handles_labels()
    canvas.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5))
    return canvas


def _planes(reports: Sequence[SpectrumReport]) -> Any:
    """The loss on the plane of the two top eigenvectors, one panel a report."""
    shown = [(r, r.plane) for r in reports if r.plane is not None]
    if not shown:
        return None
    columns = min(len(shown), 3)
    rows = math.ceil(len(shown) / columns)
    width = 5.6 if columns == 1 else 9.6
    canvas = _canvas(width, rows * (4.4 if columns == 1 else 9.6 / columns))
    axes = canvas.subplots(rows, columns, squeeze=False).flatten()
    for axis, (report, plane) in zip(axes, shown, strict=False):
        _contours(canvas, axis, plane)
        if len(reports) > 1:
            axis.set_title(report.name)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    return canvas


def _contours(canvas: Any, axis: Any, plane: Plane) -> None:
    columns = [list(column) for column in zip(*plane.losses, strict=True)]  # rows go up
    finite = [x for row in columns for x in row if math.isfinite(x)]
    axis.grid(visible=False)
    axis.set_xlabel("along the top eigenvector")
    axis.set_ylabel("along the second")
    if not finite or min(finite) == max(finite):
        return
    low, high = min(finite), max(finite)
    levels = [low + (high - low) * (k / 16) ** 2 for k in range(17)]  # closer where it is flat
    filled = axis.contourf(plane.across, plane.up, columns, levels=levels, cmap="viridis")
    axis.contour(
        plane.across, plane.up, columns, levels=levels[1:-1], colors="white", linewidths=0.4
    )
    axis.plot(0, 0, marker="P", markersize=9, color="white", markeredgecolor="black")
    canvas.colorbar(filled, ax=axis, format="%.3g").set_label("loss")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
