"""Where a step spends its time: ``python -m hvpopt.experiments.benchmarks.optimizer_steps``.

For each network and optimizer, the time of a step in gradients, and its shares: the traces (the
closure's first run, which records the graph), the products, the evaluations of the loss and other
further runs, and the rest, which is the optimizer's own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

import hvpopt
from hvpopt.closure import ClosureOracle
from hvpopt.linearization import LinearizedClosure
from hvpopt.optim.base import ClosureOptimizer
from hvpopt.preconditioners import Kronecker

from . import models
from .command import Options, parse
from .timing import timed

Make = Callable[[Any], ClosureOptimizer]

OPTIMIZERS: dict[str, Make] = {
    "NewtonCG": lambda p: hvpopt.NewtonCG(p, damping=1.0, max_cg_steps=10),
    "NewtonCG, Kronecker()": lambda p: hvpopt.NewtonCG(
        p, damping=1.0, max_cg_steps=10, preconditioner=Kronecker()
    ),
    "TrustRegionNewtonCG": lambda p: hvpopt.TrustRegionNewtonCG(p, max_cg_steps=10),
    "SMD": hvpopt.SMD,
}


@dataclass(frozen=True)
class Row:
    """The median step of an optimizer on a network."""

    model: str
    optimizer: str
    gradients: float
    """The time of a step, in gradients."""
    products: float
    """How many curvature products it computed."""
    shares: dict[str, float]
    """Of the step's time, in percent: "trace", "products", "evaluations", "own"."""


@contextmanager
def _stopwatches(device: torch.device) -> Iterator[dict[str, float]]:
    """While active, the seconds inside of the oracle's traces, products and evaluations add up."""
    seconds = dict.fromkeys(("trace", "products", "evaluations"), 0.0)
    names = {"trace": "trace", "trace_along": "trace"}
    names |= {"evaluate": "evaluations", "run_again": "evaluations"}
    originals = {name: getattr(ClosureOracle, name) for name in names}

    def watched(run: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result, taken = timed(lambda: run(*args, **kwargs), device)
            seconds[part] += taken
            if isinstance(result, LinearizedClosure):
                product = watched(result.product, "products")
                return LinearizedClosure(**{**vars(result), "product": product})
            return result

        return wrapped

    for name, part in names.items():
        setattr(ClosureOracle, name, watched(originals[name], part))
    try:
        yield seconds
    finally:
        for name, original in originals.items():
            setattr(ClosureOracle, name, original)


def measure(problem: models.Problem, name: str, *, repeats: int, device: torch.device) -> Row:
    """The medians over ``repeats`` steps, from the network as it is."""
    optimizer = OPTIMIZERS[name](problem.module.parameters())
    start = {key: value.clone() for key, value in problem.module.state_dict().items()}
    optimizer.step(problem.closure)  # engines are chosen, states made
    steps, gradients = [], []
    for _ in range(repeats):
        gradients.append(timed(problem.closure, device)[1])
        with _stopwatches(device) as seconds:
            _, total = timed(lambda: optimizer.step(problem.closure), device)
        own = total - sum(seconds.values())
        products = optimizer.last_report.num_products if optimizer.last_report else 0
        steps.append({**seconds, "own": own, "total": total, "count": products})
    problem.module.load_state_dict(start)
    step = {key: median(s[key] for s in steps) for key in steps[0]}
    parts = ("trace", "products", "evaluations", "own")
    shares = {key: 100 * step[key] / step["total"] for key in parts}
    return Row(problem.name, name, step["total"] / median(gradients), step["count"], shares)


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
    print(options.title(), "Medians of steps; shares in percent of the step.\n")
    heads = ("gradients", "products", "trace", "products", "evaluations", "own")
    rows, last = [], ""
    for row in _tables(options):
        if row.model != last:
            print(row.model)
            print(f"  {'':<26}" + "".join(f"{head:>13}" for head in heads))
            last = row.model
        shares = "".join(f"{row.shares[key]:>12.1f}%" for key in ("trace", "products"))
        shares += "".join(f"{row.shares[key]:>12.1f}%" for key in ("evaluations", "own"))
        print(
            f"  {row.optimizer:<26}{row.gradients:>13.1f}{row.products:>13.0f}{shares}", flush=True
        )
        rows.append(asdict(row))
    options.write({"rows": rows})


if __name__ == "__main__":
    main()
