"""Gradients through an inner minimisation: ``python -m hvpopt.experiments.benchmarks.adjoints``.

An energy E(x, y; θ) of 159 labels is minimised over y by T steps of gradient descent, and a loss of
the last y is differentiated by θ. For each way to that gradient: time and peak memory against T and
the width of the network, beside a plain unroll with ``create_graph=True`` and, with ``--peers``,
torchopt's unroll and implicit gradient. All ways to one problem are run in turns. Then the time of
an inference of the size of Bibtex's test set.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from hvpopt.nested import GradientDescent, Logits, minimize_energy
from hvpopt.nested.energies import spen

from . import adjoint_ways
from .adjoint_ways import BACK, BACK_8, EXACT, FORWARD, PLAIN, UNROLLED, Problem, Way, plain, ways
from .command import Options, parse
from .timing import Times, interleaved_times, peak_bytes, timed

STEPS, WIDTHS = (5, 20, 50, 100, 200), (64, 256)
LONGEST_FORWARD = 50
"""The most steps with forward mode, which takes several times as long as the others."""
SECONDS, LEAST_ROUNDS = 3.0, 5
"""For the rounds of one problem; fewer rounds where they would take longer, but so many."""


@dataclass(frozen=True)
class Row:
    """One way to the gradient after T steps on one network; figures are None where it failed."""

    device: str
    width: int
    num_steps: int
    way: str
    milliseconds: float | None = None
    """Median."""
    time_ratio: float | None = None
    """To the plain unroll, median over the rounds."""
    time_ratio_min: float | None = None
    time_ratio_max: float | None = None
    unrolled_ratio: float | None = None
    """To the unrolled adjoint, median over the rounds."""
    rounds: int = 0
    peak_mib: float | None = None
    """Above the network and its data."""
    error: float | None = None
    """Relative, against the plain unroll; large where another gradient is computed."""
    failure: str | None = None
    """Why it was not measured."""

    def timed(self, times: Times, plain: Times, unrolled: Times | None) -> "Row":
        """This row with its times."""
        median, least, most = times.ratios_to(plain)
        return replace(
            self,
            milliseconds=1e3 * times.median,
            time_ratio=median,
            time_ratio_min=least,
            time_ratio_max=most,
            unrolled_ratio=None if unrolled is None else times.ratios_to(unrolled)[0],
            rounds=len(times.seconds),
        )


@dataclass(frozen=True)
class InferenceTime:
    """An inference of Bibtex's size."""

    rows: int
    labels: int
    num_steps: int
    seconds: float
    """Median, the encoder's pass included."""


def measure(problem: Problem, num_steps: int, options: Options, *, peers: bool) -> list[Row]:
    """Errors, peak memories and, in turns, times of all ways to one problem.

    Raises:
        RuntimeError: If a way that computes the same as the plain unroll differs from it.
    """
    device = problem.start.device
    reference = plain(problem, num_steps)
    rows: dict[str, Row] = {}
    ready: dict[str, Way] = {}
    once = 0.0
    for name, way in ways(problem, num_steps, peers=peers).items():
        row = Row(device.type, problem.width, num_steps, name)
        if name == FORWARD and num_steps > LONGEST_FORWARD:
            rows[name] = replace(row, failure=f"not run beyond {LONGEST_FORWARD} steps: slow")
            continue
        try:
            grads = way()  # the first run is slower
            peak = peak_bytes(way, device)
            seconds = timed(way, device)[1]
        except Exception as raised:  # another library may raise anything
            if name not in adjoint_ways.PEERS:
                raise
            rows[name] = replace(row, failure=str(raised).partition("\n")[0])
            continue
        error = _relative(grads, reference)
        if name in EXACT and not error < 1e-3:
            raise RuntimeError(f"{name}, {num_steps} steps, is off by {error:.1e}.")
        rows[name] = replace(row, peak_mib=peak / 2**20, error=error)
        ready[name] = way
        once += seconds
    rounds = min(options.repeats, max(LEAST_ROUNDS, int(SECONDS / once)))
    times = interleaved_times(ready, repeats=rounds, device=device, warmup=0)
    for name, taken in times.items():
        rows[name] = rows[name].timed(taken, times[PLAIN], times.get(UNROLLED))
    return list(rows.values())


def _relative(grads: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """‖difference‖ / ‖reference‖ over the parameters that ``grads`` are of, the first ones."""
    pairs = list(zip(grads, reference, strict=False))
    off = sum(float((g - r).norm()) ** 2 for g, r in pairs)
    return (off / sum(float(r.norm()) ** 2 for _, r in pairs)) ** 0.5


def time_inference(device: torch.device, *, repeats: int, quick: bool) -> InferenceTime:
    """20 steps on the logits of a SPEN as Bibtex's, all test rows at once, without gradients."""
    rows, inputs, labels = (20, 12, 5) if quick else (2515, 1836, 159)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        energy = spen(inputs, labels).to(device)
        x = (torch.rand(rows, inputs) < 0.04).float().to(device)
    domain, method = Logits(), GradientDescent(0.1, 20)

    def infer() -> Tensor:
        with torch.no_grad():
            encoding = energy.encoder(x)
            start = domain.center((rows, labels), device=device)
            return minimize_energy(energy.head, encoding, start, method=method, domain=domain).y

    times = interleaved_times({"inference": infer}, repeats=repeats, device=device)
    return InferenceTime(rows, labels, method.num_steps, times["inference"].median)


def table(rows: Sequence[Row], what: str) -> str:
    """Ways by T: the time as a ratio to the plain unroll, or the peak memory in MiB."""
    steps = list(dict.fromkeys(row.num_steps for row in rows))
    lines = [f"  {what:<36}" + "".join(f"{f'T = {t}':>10}" for t in steps)]
    for way in dict.fromkeys(row.way for row in rows):
        cells = []
        for row in (r for r in rows if r.way == way):
            value = row.time_ratio if what.startswith("time") else row.peak_mib
            absent = "–" if str(row.failure).startswith("not run") else "fails"
            cells.append(f"{absent:>10}" if value is None else f"{value:>10.2f}")
        lines.append(f"    {way:<34}" + "".join(cells))
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """Back-optimisation beside the unrolled adjoint, on one network."""
    by_way = {way: [row for row in rows if row.way == way] for way in (PLAIN, BACK, BACK_8)}
    lines = []
    for way in (BACK, BACK_8):
        ratios = [row.unrolled_ratio for row in by_way[way]]
        shown = ", ".join("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"  {way} / {UNROLLED}, time: {shown}")
    for way, of_way in by_way.items():
        first, last = of_way[-2:]
        if first.peak_mib is not None and last.peak_mib is not None:
            growth = 1024 * (last.peak_mib - first.peak_mib) / (last.num_steps - first.num_steps)
            lines.append(f"  {way}: {growth:.1f} KiB of memory a step, at the last two T")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and, with ``--json``, writes them to a file."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--peers", action="store_true")
    flag, rest = flags.parse_known_args(argv)
    description = "Cost of gradients through an inner minimisation. With --peers: torchopt, too."
    options = parse("adjoints", description, rest)
    steps, widths = ((2, 4), (8,)) if options.quick else (STEPS, WIDTHS)
    batch, labels = (4, 8) if options.quick else (32, 159)
    print(
        f"{options.title()} Ways in turns; time as a ratio to the plain unroll in the same round, "
        "memory is the peak above the network's."
    )
    found: list[Row] = []
    inferences: dict[str, InferenceTime] = {}
    for device in options.devices:
        for width in widths:
            problem = Problem.drawn(width, device, batch=batch, labels=labels)
            rows: list[Row] = []
            for t in steps:
                rows += measure(problem, t, options, peers=flag.peers)
            iterate = problem.start.numel() * problem.start.element_size() / 1024
            count = sum(p.numel() for p in problem.energy.parameters())
            print(
                f"\n{device.type}: energy of width {width}, {count:,} parameters; batch {batch}, "
                f"{labels} labels, an iterate is {iterate:.1f} KiB"
            )
            print(table(rows, "time / plain unroll"))
            print(table(rows, "peak memory, MiB"))
            print(verdict(rows), flush=True)
            found += rows
            _write(options, found, inferences)  # as far as it has come
        inference = time_inference(device, repeats=options.repeats, quick=options.quick)
        inferences[device.type] = inference
        print(
            f"\n{device.type}: inference of {inference.rows:,} rows, {inference.labels} labels, "
            f"{inference.num_steps} steps: {inference.seconds:.3f} s"
        )
        _write(options, found, inferences)


def _write(options: Options, rows: Sequence[Row], inferences: dict[str, InferenceTime]) -> None:
    content = {name: asdict(i) for name, i in inferences.items()}
    options.write({"rows": [asdict(row) for row in rows], "inference": content})


if __name__ == "__main__":
    main()
