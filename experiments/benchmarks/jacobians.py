"""Dense Jacobians, six ways: ``python -m hvpopt.experiments.benchmarks.jacobians``.

A layer tanh(W x) from N to M entries, its Jacobian by its inputs, by its weights, and by a batch of
inputs (each example's own): the six ways of `hvpopt.jacobians.jacobian`, what ``mode="auto"``
makes of it, and PyTorch's own functions beside them.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvpopt.jacobians import JacobianMode, jacobian, which_mode

from .command import parse
from .timing import Times, interleaved_times, timed

WAYS: tuple[JacobianMode, ...] = (
    "vjp_loop",
    "vjp_vmap",
    "jacrev",
    "dual_loop",
    "jvp_loop",
    "jacfwd",
)
SLOW = 0.2
"""Seconds from which a way is timed in three rounds at most."""


@dataclass(frozen=True)
class Case:
    """A Jacobian that is measured."""

    name: str
    """How tables call it."""
    rows: int
    """Of the matrix; of one example's."""
    columns: int
    """Likewise."""
    f: Callable[[Tensor], Tensor]
    """The layer."""
    x: Tensor
    """The point."""
    batched: bool = False
    """Whether it is of a batch, example by example."""


@dataclass(frozen=True)
class Measured:
    """One case on one device; seconds are medians."""

    seconds: dict[str, float]
    """Of each way, of "auto", and of PyTorch's functions."""
    auto: str
    """What "auto" took."""
    reason: str
    """And why."""
    best: str
    """The fastest of the six."""
    auto_to_best: float
    """Time of "auto" over that of the fastest: the median of the ratios within rounds, where both
    were timed in the same rounds."""


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """Inputs and batches of (N, M) = (16, 10240) and (10240, 16), weights of M N = 16384."""
    generator = torch.Generator().manual_seed(0)
    wide, area, rows = (128, 256, (64, 4)) if quick else (10240, 16384, (1024, 16))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def layer(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(w @ x if x.dim() == 1 else x @ w.T)

    def weights_of(m: int, n: int) -> Tensor:
        return normal(m, n) / n**0.5

    found = []
    narrow = 4 if quick else 16
    for n, m in ((narrow, wide), (wide, narrow)):
        f = partial(layer, weights_of(m, n))
        found.append(Case(f"inputs, N = {n}, M = {m}", m, n, f, normal(n)))
    for m in rows:
        n = area // m
        x = normal(n)
        weights = Case(
            f"weights, M × N = {m} × {n}", m, area, partial(_transposed, layer, x), weights_of(m, n)
        )
        found.append(weights)
    for n, m in ((narrow, wide), (wide, narrow)):
        f = partial(layer, weights_of(m, n))
        found.append(Case(f"batch of 4, N = {n}, M = {m}", m, n, f, normal(4, n), batched=True))
    return found


def _transposed(f: Callable[[Tensor, Tensor], Tensor], second: Tensor, first: Tensor) -> Tensor:
    return f(first, second)


def runs_of(case: Case) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    modes: tuple[JacobianMode, ...] = (*WAYS, "auto")
    runs: dict[str, Callable[[], Any]] = {
        mode: partial(jacobian, case.f, case.x, mode=mode, batched=case.batched) for mode in modes
    }
    forward = case.columns < case.rows
    runs["torch.autograd.functional"] = partial(
        torch.autograd.functional.jacobian,
        case.f,
        case.x,
        vectorize=True,
        strategy="forward-mode" if forward else "reverse-mode",
    )
    if not case.batched:
        of = torch.func.jacfwd if forward else torch.func.jacrev
        runs[f"torch.func.{of.__name__}"] = lambda: of(case.f)(case.x)
    return runs


def check(case: Case, runs: Mapping[str, Callable[[], Any]]) -> None:
    """Lets a case pass where all ways give the same numbers.

    Raises:
        RuntimeError: Naming the way that does not.
    """
    expected = runs["auto"]()
    for name, run in runs.items():
        found = run()
        if case.batched and found.dim() == 4:  # with the zeros between examples
            found = torch.stack([found[i, :, i] for i in range(len(case.x))])
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error < 1e-4:
            raise RuntimeError(f"{case.name}: {name} is off by {error:.1e}.")


def measure(case: Case, device: torch.device, *, repeats: int) -> Measured:
    """Times all ways to one case's Jacobian, in turns; slow ones apart, in fewer rounds."""
    runs = runs_of(case)
    check(case, runs)
    slow = {name for name, run in runs.items() if timed(run, device)[1] > SLOW}
    times: dict[str, Times] = {}
    for group, rounds in ((runs.keys() - slow, repeats), (slow, min(repeats, 3))):
        chosen = {name: run for name, run in runs.items() if name in group}
        times |= in_shuffled_turns(chosen, repeats=rounds, device=device)
    best = min(WAYS, key=lambda way: times[way].median)
    same_rounds = len({name in slow for name in ("auto", best)}) == 1
    ratio = times["auto"].median / times[best].median
    choice = which_mode(case.f, case.x, batched=case.batched)
    return Measured(
        seconds={name: times[name].median for name in runs},
        auto=choice.mode,
        reason=choice.reason,
        best=best,
        auto_to_best=times["auto"].ratios_to(times[best])[0] if same_rounds else ratio,
    )


def in_shuffled_turns(
    runs: Mapping[str, Callable[[], Any]], *, repeats: int, device: torch.device
) -> dict[str, Times]:
    """As `interleaved_times`, in another order each round: what runs before leaves caches behind,
    which matters to what takes less than a millisecond."""
    shuffle = random.Random(0).sample
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        order = {name: runs[name] for name in shuffle(list(runs), len(runs))}
        for name, times in interleaved_times(order, repeats=1, device=device, warmup=0).items():
            seconds[name] += times.seconds
    return {name: Times(tuple(s)) for name, s in seconds.items()}


def table(case: Case, measured: Mapping[str, Measured]) -> str:
    """One case as text, the devices beside each other."""
    lines = [
        f"{case.name}: Jacobian of {case.rows:,} × {case.columns:,}"
        + (" for each example" if case.batched else ""),
        f"  {'milliseconds':<30}" + "".join(f"{name:>14}" for name in measured),
    ]
    names = list(next(iter(measured.values())).seconds)
    for name in names:
        shown = [
            f"{1e3 * m.seconds[name]:.3f}" + ("*" if name == m.best else " ")
            for m in measured.values()
        ]
        lines.append(f"    {name:<28}" + "".join(f"{s:>14}" for s in shown))
    lines.append(
        f"    {'auto took':<28}" + "".join(f"{m.auto + ' ':>14}" for m in measured.values())
    )
    ratios = [f"{m.auto_to_best:.2f} " for m in measured.values()]
    lines.append(f"    {'auto / best of the six (*)':<28}" + "".join(f"{r:>14}" for r in ratios))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and, with ``--json``, writes them to a file."""
    description = "Dense Jacobians of inputs, weights and batches: six ways and the automatic one."
    options = parse("jacobians", description, argv)
    print(
        f"{options.title()} Medians of {options.repeats} rounds (of three, for what takes more "
        f"than {SLOW} s).\nPyTorch's own functions in the mode that suits the shape; "
        "torch.autograd.functional computes the zeros between examples.",
        flush=True,
    )
    results: dict[str, dict[str, Measured]] = {}
    for index in range(len(cases(torch.device("cpu"), quick=options.quick))):
        measured = {}
        for device in options.devices:
            case = cases(device, quick=options.quick)[index]
            measured[device.type] = measure(case, device, repeats=options.repeats)
        results[case.name] = measured
        print("\n" + table(case, measured), flush=True)
    worst = max(m.auto_to_best for case in results.values() for m in case.values())
    print(f"\nauto / best of the six, at worst: {worst:.2f}")
    options.write(
        {
            "worst_auto_to_best": worst,
            "cases": {
                name: {device: asdict(m) for device, m in case.items()}
                for name, case in results.items()
            },
        }
    )


if __name__ == "__main__":
    main()
