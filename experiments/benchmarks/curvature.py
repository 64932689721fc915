"""Curvature beside other libraries: ``python -m hvpopt.experiments.benchmarks.curvature``.

For each network the time from the bare network to its largest eigenvalue, its five largest, its
trace and its spectral density, by hvpopt, PyHessian, hessian-eigenthings and curvlinops. For
eigenvalues each takes its cheapest setting that is within ``TOLERANCE`` for all of ``SEEDS``; for
traces and densities all take as many products, which for one algorithm is the same accuracy. Times
are taken in turns, and errors are those of the runs that were timed.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch

from hvpopt.curvature import TraceEstimate, spectral_density, trace

from .command import parse
from .curvature_contestants import Contestant, Figure, hessian, ladders
from .curvature_peers import Nodes
from .measure import reason
from .models import FULL, QUICK, Problem
from .timing import Times, interleaved_times, timed

PEERS = ("PyHessian", "hessian-eigenthings", "curvlinops-for-pytorch")
MODELS = ("mlp", "gpt", "cnn")
FIGURES: tuple[Figure, ...] = (
    "largest eigenvalue",
    "five largest eigenvalues",
    "trace",
    "spectral density",
)
TOLERANCE = 0.01
"""Of eigenvalues, relative."""
SEEDS = (0, 1, 2, 3)
"""For which it holds, and with which times are taken."""
TRACE_PROBES = 24
SECONDS = 12.0
"""Rounds of timing of a figure end after so long."""


@dataclass(frozen=True)
class Entry:
    """A library's time for a figure of a network."""

    figure: Figure
    """Which."""
    library: str
    """Whose."""
    method: str
    """By which algorithm."""
    setting: str | None = None
    """What was chosen."""
    milliseconds: float | None = None
    """Median over the rounds."""
    ratio: float | None = None
    """To the time of hvpopt's first entry in the same round, median."""
    cpu_ratio: float | None = None
    """The same of the processor's time, which other programs on the machine disturb less; on an
    accelerator that of the program that drives it."""
    error: float | None = None
    """Of an eigenvalue and a trace relative, root mean square over the rounds; of a density the
    mean distance to the true eigenvalues, over their range (the largest over rounds is not)."""
    rounds: int = 0
    """How many."""
    failure: str | None = None
    """Why there is no time."""


@dataclass(frozen=True)
class Truth:
    """What the figures of a network are, by long runs; those that were asked for."""

    eigenvalues: np.ndarray | None = None
    """The five largest, by SciPy's ARPACK to 1e-4."""
    trace: TraceEstimate | None = None
    """By Hutchinson's estimate with many probes."""
    density: Nodes | None = None
    """By many probes and steps."""

    def error(self, figure: Figure, found: Any) -> float:
        """How far a contestant's figure is off, as in `Entry`."""
        if figure == "trace":
            assert self.trace is not None
            return abs(found - self.trace.value) / abs(self.trace.value)
        if figure == "spectral density":
            assert self.density is not None
            return _distance(found, self.density)
        assert self.eigenvalues is not None
        expected = self.eigenvalues[: len(found)]
        return float(np.max(np.abs(found - expected) / expected[-1]))


def _distance(found: Nodes, true: Nodes) -> float:
    """∫ |F − F₀| of the distribution functions, over the range of the true nodes."""
    points = np.concatenate([found[0], true[0]])
    masses = np.concatenate([found[1], -true[1]])
    order = np.argsort(points)
    apart = np.abs(np.cumsum(masses[order]))[:-1] @ np.diff(points[order])
    return float(apart / np.ptp(true[0]))


def truth(problem: Problem, figures: Sequence[Figure], *, quick: bool) -> Truth:
    """Takes the time it needs."""
    true = Truth()
    probes, density_probes, steps = (8, 2, 20) if quick else (128, 4, 45)
    with hessian(problem) as operator:
        if set(figures) & set(FIGURES[:2]):
            values = scipy.sparse.linalg.eigsh(
                operator.to_scipy(), k=5, which="LA", tol=1e-4, return_eigenvectors=False
            )
            true = replace(true, eigenvalues=np.sort(values)[::-1])
        if "trace" in figures:
            generator = torch.Generator().manual_seed(7)
            total = trace(operator, num_probes=probes, generator=generator)
            true = replace(true, trace=total)
        if "spectral density" in figures:
            density = spectral_density(
                operator,
                num_probes=density_probes,
                num_steps=steps,
                reorthogonalize=False,
                generator=torch.Generator().manual_seed(8),
            )
            nodes, weights = density.nodes.numpy(), density.weights.numpy()
            true = replace(true, density=(nodes.ravel(), weights.ravel() / density_probes))
    return true


def measure(
    figure: Figure, problem: Problem, true: Truth, *, repeats: int, seconds: float
) -> list[Entry]:
    """All libraries' entries for a figure, hvpopt's first."""
    device = problem.inputs.device
    entries: list[Entry] = []
    contestants: dict[int, Contestant] = {}
    round_seconds = 0.0
    for ladder in ladders(figure, TRACE_PROBES):
        entry = Entry(figure, ladder[0].library, ladder[0].method)
        try:
            chosen = _cheapest(ladder, figure, problem, true)
            if chosen is None:
                entry = replace(entry, failure=f"no setting tried is within {TOLERANCE:g}")
            else:
                entry = replace(entry, setting=chosen.setting)
                round_seconds += timed(partial(chosen.run, problem, 0), device)[1]
                contestants[len(entries)] = chosen
        except Exception as error:
            entry = replace(entry, failure=reason(error))
        entries.append(entry)

    errors: dict[int, list[float]] = {place: [] for place in contestants}
    cpu: dict[int, list[float]] = {place: [] for place in contestants}

    def task(place: int) -> Callable[[], None]:
        def run() -> None:
            start = time.process_time()
            found = contestants[place].run(problem, SEEDS[len(errors[place]) % len(SEEDS)])
            cpu[place].append(time.process_time() - start)
            errors[place].append(true.error(figure, found))

        return run

    rounds = max(1, min(repeats, int(seconds / max(round_seconds, 1e-9))))
    tasks = {str(place): task(place) for place in contestants}
    times = interleaved_times(tasks, repeats=rounds, device=device, warmup=0)
    for place in contestants:
        taken = times[str(place)]
        entries[place] = replace(
            entries[place],
            milliseconds=1e3 * taken.median,
            ratio=taken.ratios_to(times["0"])[0] if 0 in contestants else None,
            cpu_ratio=Times(tuple(cpu[place])).ratios_to(Times(tuple(cpu[0])))[0]
            if 0 in contestants
            else None,
            error=math.sqrt(statistics.fmean(e**2 for e in errors[place])),
            rounds=rounds,
        )
    return entries


def _cheapest(
    ladder: Sequence[Contestant], figure: Figure, problem: Problem, true: Truth
) -> Contestant | None:
    """The first contestant within `TOLERANCE` for all seeds; of a single one no such is asked."""
    if len(ladder) == 1:
        return ladder[0]
    for contestant in ladder:
        if all(true.error(figure, contestant.run(problem, s)) <= TOLERANCE for s in SEEDS):
            return contestant
    return None


def table(problem: Problem, true: Truth, entries: Sequence[Entry]) -> str:
    """The entries of one network as text."""
    size = sum(p.numel() for p in problem.module.parameters())
    lines = [f"{problem.name}: {size:,} parameters"]
    if true.eigenvalues is not None:
        lines[0] += f", largest eigenvalue {true.eigenvalues[0]:.4g}"
    if true.trace is not None:
        lines[0] += f", trace {true.trace.value:.4g} ± {true.trace.standard_error:.2g}"
    figure = None
    for entry in entries:
        if entry.figure != figure:
            figure = entry.figure
            lines.append(f"  {figure:<64}{'ms':>9}{'ratio':>8}{'of CPU':>8}{'error':>9}")
        name = f"{entry.library}, {entry.method}" + (f", {entry.setting}" if entry.setting else "")
        if entry.milliseconds is None:
            lines.append(f"    {name}: {entry.failure}")
            continue
        ratios = "".join(
            f"{'' if x is None else format(x, '.2f'):>8}" for x in (entry.ratio, entry.cpu_ratio)
        )
        lines.append(f"    {name:<62}{entry.milliseconds:>9.0f}{ratios}{entry.error:>9.4f}")
    return "\n".join(lines)


def verdict(models: dict[str, list[Entry]]) -> str:
    """hvpopt's fastest entry over the fastest other, for each network and figure."""
    lines = ["hvpopt's fastest over the fastest other's, below 1.00 hvpopt is faster:"]
    for model, entries in models.items():
        for figure in dict.fromkeys(entry.figure for entry in entries):
            timed_entries = [
                (entry.milliseconds, entry)
                for entry in entries
                if entry.figure == figure and entry.milliseconds is not None
            ]
            ours = [x for x in timed_entries if x[1].library == "hvpopt"]
            others = [x for x in timed_entries if not x[1].library.startswith("hvpopt")]
            if not ours or not others:
                lines.append(f"  {model}, {figure}: –")
                continue
            best, rival = (min(x, key=lambda pair: pair[0]) for x in (ours, others))
            cpu = ""
            if best[1].cpu_ratio and rival[1].cpu_ratio:
                cpu = f", of CPU time {best[1].cpu_ratio / rival[1].cpu_ratio:.2f}"
            lines.append(
                f"  {model}, {figure}: {best[0] / rival[0]:.2f}{cpu} "
                f"({best[1].method} / {rival[1].library}, {rival[1].method})"
            )
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and, with ``--json``, writes them to a file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=FIGURES)
    chosen, others = parser.parse_known_args(argv)
    description = (
        "Cost of curvature's figures beside other libraries. --models and --figures choose: "
        f"{', '.join(MODELS)}; {', '.join(map(repr, FIGURES))}."
    )
    options = parse("curvature", description, others)
    peers = {name: _version(name) for name in PEERS}
    print(options.title())
    print("With " + ", ".join(f"{name} {number}" for name, number in peers.items()), flush=True)
    content: dict[str, Any] = {"peers": peers, "tolerance": TOLERANCE, "devices": {}}
    for device in options.devices:
        measured: dict[str, list[Entry]] = {}
        for name in chosen.models[:1] if options.quick else chosen.models:
            problem = (QUICK if options.quick else FULL)[name](device)
            problem.module.eval()  # PyHessian's only mode
            true = truth(problem, chosen.figures, quick=options.quick)
            measured[name] = [
                entry
                for figure in chosen.figures
                for entry in measure(
                    figure,
                    problem,
                    true,
                    repeats=options.repeats,
                    seconds=0.0 if options.quick else SECONDS,
                )
            ]
            print("\n" + table(problem, true, measured[name]), flush=True)
            content["devices"][device.type] = {
                key: [asdict(entry) for entry in entries] for key, entries in measured.items()
            }
            options.write(content)  # of as many networks as have been measured
        print("\n" + verdict(measured), flush=True)


if __name__ == "__main__":
    main()
