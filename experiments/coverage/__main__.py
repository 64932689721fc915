"""Prints which of torch's modules and operations each engine serves: ``python -m ...coverage``."""

import argparse
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from hvpopt.engines.choice import EngineName

from .outcomes import Outcome, outcomes
from .samples import NoGradientError, Sample, module_samples, operation_samples
from .table import table

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def run(makers: Iterable[Callable[[], Sample]], engines: Sequence[EngineName]) -> Iterator[Outcome]:
    """The outcome of each sample under each engine."""
    for make in makers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's samples, some of which are deprecated
            try:
                yield from outcomes(make(), engines)
            except NoGradientError:  # a module without inputs
                continue


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and, with ``--json``, writes every outcome to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m hvpopt.experiments.coverage",
        description="Hessian products of each of torch's own samples of its modules (in training "
        "and evaluation mode) and operations, against differences of the gradient.",
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--engines", nargs="+", default=["auto", "graph", "dual"])
    parser.add_argument("--operations", type=int, metavar="N", help="N samples of each operation "
                        "of op_db instead of the modules")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every outcome here")
    options = parser.parse_args(argv)
    found: list[Outcome] = []
    for name in options.dtypes:
        dtype = DTYPES[name]
        if options.operations:
            samples = operation_samples(
                dtype, per_operation=options.operations, device=options.device
            )
            found += run(samples, options.engines)
            continue
        for training in (True, False):
            samples = module_samples(dtype, training=training, device=options.device)
            found += run(samples, options.engines)
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(o) for o in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
