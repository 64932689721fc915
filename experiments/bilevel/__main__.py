"""Runs the bilevel experiments and prints their tables.

python -m hvpopt.experiments.bilevel hypercleaning|ridge|step_sizes [--seeds 1 2 3] [--json F]
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import hypercleaning, ridge, step_sizes

Rows = list[dict[str, Any]]


def mean_and_error(values: Sequence[float]) -> str:
    """The mean over the seeds, with its standard error where there are several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def run_hypercleaning(seeds: Sequence[int], quick: bool) -> Rows:
    """Accuracies with and without cleaning."""
    size = {"num_train": 300, "num_clean": 60} if quick else {}
    cleaning = hypercleaning.Cleaning(num_outer_steps=2) if quick else hypercleaning.Cleaning()
    rows = []
    for seed in seeds:
        data = hypercleaning.Corrupted.drawn(seed, **size)
        rows.append(
            asdict(hypercleaning.outcome(seed, data, cleaning, steps=20 if quick else 3000))
        )
        print(f"seed {seed}: {rows[-1]['cleaned']:.2f} cleaned", flush=True)
    print(f"test accuracy, percent, {len(rows)} seed(s) ± standard error")
    for key, what in {
        "uncleaned": "network, uncleaned",
        "clean_only": "network, clean images only",
        "cleaned": "network, hyper-cleaned",
        "oracle": "network, oracle",
        "regression_uncleaned": "softmax regression, uncleaned",
        "regression_cleaned": "softmax regression, hyper-cleaned",
        "detection": "labels told as wrong or right",
        "num_products": "Hessian products",
        "seconds": "seconds for the cleaning",
    }.items():
        print(f"  {what:<36}{mean_and_error([row[key] for row in rows])}")
    return rows


def run_ridge(seeds: Sequence[int], quick: bool) -> Rows:
    """Excess errors with one penalty and with one for each feature."""
    rows = []
    for seed in seeds:
        problem = ridge.Regression.drawn(seed)
        rows.append({"seed": seed, **asdict(ridge.learn(problem, num_steps=3 if quick else 60)[1])})
    print(f"‖w − true weights‖², {len(rows)} seed(s) ± standard error")
    for key, what in {
        "least_squares": "least squares",
        "shared": "one penalty, the best of a grid",
        "learned": "a penalty for each feature, learned",
        "oracle": "least squares on the right features",
    }.items():
        print(f"  {what:<36}{mean_and_error([row[key] for row in rows])}")
    worst = max(row["error"] for row in rows)
    print(f"  largest relative error of a hypergradient against its closed form: {worst:.1e}")
    return rows


def run_step_sizes(seeds: Sequence[int], quick: bool) -> Rows:
    """Losses after training with step sizes tuned and learned."""
    task = step_sizes.Digits(num_steps=4) if quick else step_sizes.Digits()
    found = step_sizes.outcomes(task, **({"num_outer_steps": (2, 2)} if quick else {}))
    rows = [asdict(row) for row in found]
    print(f"training loss after {task.num_steps} steps, mean of {len(step_sizes.JUDGES)} new runs")
    for row in rows:
        print(
            f"  {row['what']:<44}{row['num_hparams']:>5} numbers   "
            f"{row['loss']:.4f} ± {row['standard_error']:.4f}"
        )
    return rows


EXPERIMENTS: dict[str, Callable[[Sequence[int], bool], Rows]] = {
    "hypercleaning": run_hypercleaning,
    "ridge": run_ridge,
    "step_sizes": run_step_sizes,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one experiment, prints its table and, with ``--json``, writes its numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m hvpopt.experiments.bilevel",
        description="Bilevel problems solved by hypergradients.",
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="of data (default: 1 2 3)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check, no numbers")
    options = parser.parse_args(argv)
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    try:
        rows = EXPERIMENTS[options.experiment](options.seeds, options.quick)
    except FileNotFoundError as error:
        parser.exit(1, f"{error}\n")
    if options.json is not None:
        content = {"torch": torch.__version__, "quick": options.quick, "rows": rows}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
