"""Where a step spends its time: ``python -m hvpopt.experiments.benchmarks.optimizer_steps``.

For each network and optimizer, the time of a step in gradients, and its shares: the traces (the
closure's first run, which records the graph), the products, the evaluations of the loss, the
refreshes of the preconditioner (with their runs of the closure), and the rest, which is the
optimizer's own. Sums over the steps, so that what only every third step does counts with its third;
with a number of steps that is a multiple of three.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import hvpopt
from hvpopt.closure import ClosureOracle
from hvpopt.linearization import LinearizedClosure
from hvpopt.optim.base import ClosureOptimizer
from hvpopt.preconditioners.base import Preconditioner

from . import models
from .command import Options, parse
from .timing import timed

Make = Callable[[Any], ClosureOptimizer]

OPTIMIZERS: dict[str, Make] = {
    "NewtonCG": hvpopt.NewtonCG,
    "NewtonCG, no preconditioner": lambda p: hvpopt.NewtonCG(p, preconditioner=None),
    "TrustRegionNewtonCG": hvpopt.TrustRegionNewtonCG,
    "SMD": hvpopt.SMD,
}
PARTS = ("trace", "products", "evaluations", "refresh")


@dataclass(frozen=True)
class Row:
    """The average step of an optimizer on a network."""

    model: str
    optimizer: str
    gradients: float
    """The time of a step, in gradients that were timed in turns with it."""
    products: float
    """How many curvature products it computed."""
    shares: dict[str, float]
    """Of the step's time, in percent: "trace", "products", "evaluations", "refresh", "own"."""
    own_range: tuple[float, float]
    """The least and the largest share of a step that is the optimizer's own."""


@contextmanager
def _stopwatches(device: torch.device) -> Iterator[dict[str, float]]:
    """While active, the seconds inside of traces, products, evaluations and refreshes add up.

    What runs inside of another part counts as that one: a refresh's runs of the closure do.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    watched: list[tuple[type, str, str]] = [
        (ClosureOracle, "trace", "trace"),
        (ClosureOracle, "trace_along", "trace"),
        (ClosureOracle, "evaluate", "evaluations"),
        (ClosureOracle, "run_again", "evaluations"),
        (Preconditioner, "prepare", "refresh"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in watched]
    under_way: list[str] = []

    def timing(run: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed_run(*args: Any, **kwargs: Any) -> Any:
            if under_way:
                return run(*args, **kwargs)
            under_way.append(part)
            try:
                result, taken = timed(lambda: run(*args, **kwargs), device)
            finally:
                under_way.pop()
            seconds[part] += taken
            if isinstance(result, LinearizedClosure):
                result = replace(result, product=timing(result.product, "products"))
            return result

        return timed_run

    for owner, name, part in watched:
        setattr(owner, name, timing(getattr(owner, name), part))
    try:
        yield seconds
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def measure(problem: models.Problem, name: str, *, repeats: int, device: torch.device) -> Row:
    """The sums over ``repeats`` steps, from the network as it is."""
    optimizer = OPTIMIZERS[name](problem.module.parameters())
    start = {key: value.clone() for key, value in problem.module.state_dict().items()}
    optimizer.step(problem.closure)  # engines are chosen, states made, the damping is calibrated
    steps, gradients, num_products = [], 0.0, optimizer.num_products
    for _ in range(repeats):
        gradients += timed(problem.closure, device)[1]
        with _stopwatches(device) as seconds:
            _, total = timed(lambda: optimizer.step(problem.closure), device)
        steps.append({**seconds, "own": total - sum(seconds.values()), "total": total})
    problem.module.load_state_dict(start)
    total = sum(step["total"] for step in steps)
    own = [100 * step["own"] / step["total"] for step in steps]
    return Row(
        model=problem.name,
        optimizer=name,
        gradients=total / gradients,
        products=(optimizer.num_products - num_products) / repeats,
        shares={key: 100 * sum(s[key] for s in steps) / total for key in (*PARTS, "own")},
        own_range=(min(own), max(own)),
    )


def _tables(options: Options) -> Iterator[Row]:
    networks = models.QUICK if options.quick else models.FULL
    for device in options.devices:
        for network in ("mlp", "gpt"):
            for name in OPTIMIZERS:
                problem = networks[network](device)
                yield measure(problem, name, repeats=options.repeats, device=device)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and, with ``--json``, writes it to a file."""
    options = parse("optimizer_steps", (__doc__ or "").split("\n\n")[1], argv)
    print(options.title(), "Sums over steps; shares in percent of the steps.\n")
    heads = ("gradients", "products", *PARTS, "own", "(in a step)")
    rows, last = [], ""
    for row in _tables(options):
        if row.model != last:
            print(row.model)
            print(f"  {'':<28}" + "".join(f"{head:>12}" for head in heads))
            last = row.model
        shares = "".join(f"{share:>11.1f}%" for share in row.shares.values())
        least, most = row.own_range
        print(
            f"  {row.optimizer:<28}{row.gradients:>12.1f}{row.products:>12.1f}{shares}"
            f"{f'{least:.0f}-{most:.0f}%':>12}",
            flush=True,
        )
        rows.append(asdict(row))
    options.write({"rows": rows})


if __name__ == "__main__":
    main()
