"""The custom layout of TensorBoard: which scalars belong in one chart."""

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple


class Chart(NamedTuple):
    """A chart of the custom layout."""

    category: str
    title: str
    kind: Literal["lines", "band"]
    """A band has three names: its middle, its lower and its upper end."""
    names: tuple[str, ...]
    """Of scalars, behind the prefix; one that ends in a slash stands for all that begin so."""


CURVATURE = (
    Chart(
        "Curvature",
        "Sharpness and stability threshold (2/lr)",
        "lines",
        ("top_eigenvalue", "sharpness", "stability_threshold"),
    ),
    Chart("Curvature", "Trace with its 95% band", "band", ("trace", "trace_low", "trace_high")),
    Chart("Curvature", "Ends of the spectrum", "lines", ("spectrum_min", "spectrum_max")),
)

OPTIMIZER = (
    Chart("Newton step", "Damping and reduction ratio", "lines", ("damping", "reduction_ratio")),
    Chart("Newton step", "Trust-region radius", "lines", ("radius",)),
    Chart("Newton step", "CG steps", "lines", ("cg_steps", "cg_iterate")),
    Chart("Newton step", "Why CG ended", "lines", ("cg_status/",)),
    Chart("Newton step", "Step length", "lines", ("step_length", "update_norm")),
    Chart("Newton step", "Slope ratio", "lines", ("slope_ratio",)),
    Chart("Newton step", "Least curvature that CG met", "lines", ("min_curvature",)),
    Chart(
        "Gains",
        "ln(gain): median, 5% and 95%",
        "band",
        ("log_gain_median", "log_gain_low", "log_gain_high"),
    ),
    Chart(
        "Gains", "ln(gain): extremes", "lines", ("log_gain_min", "log_gain_mean", "log_gain_max")
    ),
    Chart(
        "Gains", "Gains at a bound, or floored", "lines", ("fraction_at_bounds", "fraction_floored")
    ),
    Chart("Gains", "Overshoot (cut above 1)", "lines", ("overshoot",)),
    Chart("Gains", "Alignment of v and the gradient", "lines", ("trace_alignment",)),
    Chart(
        "Diagonal",
        "Win rate: share of steps not clipped",
        "lines",
        ("fraction_unclipped", "fraction_negative"),
    ),
    Chart(
        "Diagonal",
        "Running diagonal: median, 5% and 95%",
        "band",
        ("curvature_median", "curvature_low", "curvature_high"),
    ),
    Chart("Step", "Outcomes", "lines", ("outcome/",)),
    Chart("Step", "Products and closure runs", "lines", ("num_products", "num_closure_runs")),
)


DETAILS = (
    Chart("Curvature by layer", "Trace", "lines", ("layer_trace/",)),
    Chart("Curvature by layer", "Top eigenvalue", "lines", ("layer_top_eigenvalue/",)),
    Chart("Gradient and curvature", "Share in the top eigenvectors", "lines", ("gradient_share",)),
    Chart("Gradient and curvature", "Along the gradient", "lines", ("gradient_curvature",)),
    Chart("Gradient and curvature", "Share of negative eigenvalues", "lines", ("negative_share",)),
    Chart("Cost of the curvature", "Share of the time", "lines", ("time_share",)),
    Chart("Cost of the curvature", "Seconds a measurement", "lines", ("seconds",)),
    Chart("Cost of the curvature", "Products a measurement", "lines", ("products",)),
)


def layout(tags: Iterable[str]) -> dict[str, Any]:
    """The layout for `SummaryWriter.add_custom_scalars`, of the charts that have something to show.

    Args:
        tags: the names of the scalars that there are; their prefix ends at the first slash. A
            prefix that begins with "optimizer" has the charts of an optimizer, any other those of
            the curvature.

    Examples:
        >>> layout(["curvature/trace", "curvature/trace_low", "curvature/trace_high"])
        {'Curvature': {'Trace with its 95% band': ['Margin', ['curvature/trace', \
'curvature/trace_low', 'curvature/trace_high']]}}
    """
    tags = set(tags)
    prefixes = sorted({tag.partition("/")[0] for tag in tags})
    found: dict[str, Any] = {}
    for chart in (*CURVATURE, *OPTIMIZER, *DETAILS):
        for prefix in prefixes:
            if prefix.startswith("optimizer") != (chart in OPTIMIZER):
                continue
            names = [f"{prefix}/{name}" for name in chart.names]
            present = [name for name in names if _is_met(name, tags)]
            if not present or (chart.kind == "band" and len(present) < 3):
                continue
            is_lone = prefix in ("curvature", "optimizer")
            category = chart.category if is_lone else f"{chart.category} ({prefix})"
            # all names, so that the charts of runs that differ in them are one chart in TensorBoard
            lines = ["Margin", names] if chart.kind == "band" else ["Multiline", _regexes(names)]
            found.setdefault(category, {})[chart.title] = lines
    return found


def _is_met(name: str, tags: set[str]) -> bool:
    return any(tag.startswith(name) for tag in tags) if name.endswith("/") else name in tags


def _regexes(names: Iterable[str]) -> list[str]:
    """TensorBoard matches them at the beginning of a name."""
    return [re.escape(name) + ("" if name.endswith("/") else "$") for name in names]
