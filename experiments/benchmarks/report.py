"""What was measured, and its tables."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .tasks import Curvature, Product
from .timing import Times


@dataclass(frozen=True)
class Row:
    """One engine at one product; ratios are to one gradient, with several vectors for each.

    A figure is None where it was not measured.
    """

    what: str
    """Which product."""
    engine: str
    """By which engine, or by which other library."""
    curvature: Curvature
    """Of which matrix."""
    count: int
    """With how many vectors."""
    library: str
    """"hvpopt", "torch" for peers in the same process, or "jax"."""
    is_exact: bool
    """Whether it is no approximation."""
    flop_bound: float
    """What counted floating-point operations set."""
    time_ratio: float | None = None
    """Median over the rounds."""
    time_ratio_min: float | None = None
    """Least."""
    time_ratio_max: float | None = None
    """Largest."""
    rounds: int = 0
    """How many."""
    milliseconds: float | None = None
    """Median time of one product."""
    memory_ratio: float | None = None
    """Peak of all that it builds and of one application."""
    build_ratio: float | None = None
    """Time for what a repeated product builds once, compilation included."""
    error: float | None = None
    """Relative, against hvpopt's graph engine."""
    remedy: str | None = None
    """What had to be changed for it to run."""
    failure: str | None = None
    """Why it was not measured, or why it does not run without the remedy."""

    def of_more(self, product: Product) -> "Row":
        """This row for a product with more vectors, of which each takes the same."""
        return replace(self, what=product.what, count=product.count)

    def timed(self, times: Times, gradient: Times) -> "Row":
        """This row with the times of all its vectors, beside a gradient's in the same rounds."""
        median, least, most = (ratio / self.count for ratio in times.ratios_to(gradient))
        return replace(
            self,
            time_ratio=median,
            time_ratio_min=least,
            time_ratio_max=most,
            rounds=len(times.seconds),
            milliseconds=1e3 * times.median / self.count,
        )


@dataclass(frozen=True)
class Report:
    """One network."""

    model: str
    """What it is."""
    num_parameters: int
    """How large it is."""
    gradient_seconds: float
    """Median time of loss and gradient."""
    gradient_peak_mib: float
    """Their peak memory above the model's."""
    gradient_flops: int
    """Their matrix products' floating-point operations."""
    rows: list[Row]
    """What was measured."""
    jax_gradient_seconds: float | None = None
    """Median time of JAX's compiled loss and gradient, to which its ratios are."""
    jax_failure: str | None = None
    """Why JAX was not measured."""


def table(report: Report, *, peers: bool = False) -> str:
    """The report as text; with peers, also what was built, errors, failures and remedies."""
    lines = [
        f"{report.model}: {report.num_parameters:,} parameters; one gradient takes "
        f"{1e3 * report.gradient_seconds:.2f} ms, {report.gradient_peak_mib:.1f} MiB and "
        f"{report.gradient_flops / 1e9:.2f} GFLOP"
    ]
    if report.jax_gradient_seconds is not None:
        lines.append(
            f"  JAX's own compiled gradient takes {1e3 * report.jax_gradient_seconds:.2f} ms"
        )
    if report.jax_failure is not None:
        lines.append(f"  JAX: {report.jax_failure}")
    width = 40 if peers else 22
    heads = f"  {'engine':<{width + 2}}{'time':>7}{'least':>8}{'most':>8}{'bound':>8}{'memory':>9}"
    lines.append(heads + (f"{'build':>9}{'error':>9}" if peers else ""))
    what = ""
    notes: dict[str, int] = {}
    for row in report.rows:
        if row.what != what:
            what = row.what
            lines.append(f"  {what}")
        note = row.failure
        if note is not None and row.remedy is not None:
            note = f"with {row.remedy}; without: {note}"
        mark = "" if note is None else f" [{notes.setdefault(note, len(notes) + 1)}]"
        lines.append(_line(row, width, peers, mark))
    for note, number in notes.items():
        note = f"[{number}] {note}"
        lines += textwrap.wrap(note, 96, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


def _line(row: Row, width: int, peers: bool, mark: str = "") -> str:
    engine = f"    {row.engine + mark:<{width}}"
    if row.time_ratio is None:
        return f"{engine}{'not run' if str(row.failure).startswith('not run') else 'fails':>9}"
    times = (row.time_ratio, row.time_ratio_min, row.time_ratio_max)
    figures = [f"{row.time_ratio:>7.2f}", *(_figure(t, 8) for t in times[1:])]
    figures += [_figure(row.flop_bound, 8), _figure(row.memory_ratio, 9)]
    if peers:
        error = "" if row.error is None else f"{row.error:.0e}"
        build = "" if row.build_ratio is None else f"{row.build_ratio:.1f}"
        figures += [f"{build:>9}", f"{error:>9}"]
    return (engine + "".join(figures)).rstrip()


def _figure(value: float | None, width: int) -> str:
    return " " * width if value is None else f"{value:>{width}.2f}"


def verdict(reports: Sequence[Report]) -> str:
    """For each network and product the fastest exact entries, hvpopt's over the others'."""
    lines = [
        "Verdict: the fastest exact engines in milliseconds a product; below 1.00 hvpopt is "
        "faster.",
        f"  {'':<38}{'hvpopt':>9}{'torch peer':>12}{'ratio':>7}{'JAX':>9}{'ratio':>7}  engines",
    ]
    for report in reports:
        lines.append(f"  {report.model}")
        for what in dict.fromkeys(row.what for row in report.rows):
            rows = [row for row in report.rows if row.what == what]
            best = {name: fastest(rows, name) for name in ("hvpopt", "torch", "jax")}
            ours = best["hvpopt"]
            cells = [f"    {what:<36}", _milliseconds(ours, 9)]
            for name, cell_width in (("torch", 12), ("jax", 9)):
                cells.append(_milliseconds(best[name], cell_width))
                cells.append(f"{_ratio(ours, best[name]):>7}")
            names = [row.engine for row in (ours, best["torch"]) if row is not None]
            lines.append("".join(cells) + "  " + " / ".join(names))
    return "\n".join(lines)


def fastest(rows: Sequence[Row], library: str) -> Row | None:
    """The exact row of least time of one library, among those measured."""
    timed = [
        (row.milliseconds, i)
        for i, row in enumerate(rows)
        if row.library == library and row.is_exact and row.milliseconds is not None
    ]
    return rows[min(timed)[1]] if timed else None


def _milliseconds(row: Row | None, width: int) -> str:
    if row is None or row.milliseconds is None:
        return f"{'–':>{width}}"
    return f"{row.milliseconds:>{width}.2f}"


def _ratio(ours: Row | None, theirs: Row | None) -> str:
    if ours is None or theirs is None or ours.milliseconds is None or theirs.milliseconds is None:
        return "–"
    return f"{ours.milliseconds / theirs.milliseconds:.2f}"
