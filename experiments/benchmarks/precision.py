"""Accuracy of products by precision: ``python -m hvpopt.experiments.benchmarks.precision``.

For each network: the relative error ‖x − x₆₄‖ / ‖x₆₄‖ of the loss, the gradient, and Hessian and
Gauss-Newton products of each engine, against the same parameters, data and directions in float64,
where the reference is the graph engine's. A gradient's own error stands beside them to judge by.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import models
from .accuracy import ENGINES, REFERENCE, Row, measure
from .hvp_cost import machine
from .models import Problem

Networks = dict[str, Callable[[torch.device], Problem]]

FULL: Networks = {
    "cnn": partial(models.cnn, batch=16, width=16),
    "gpt": partial(models.gpt, batch=4, length=32, layers=2, width=64),
    "lstm": partial(models.lstm, batch=8, length=16, width=64),
}
QUICK: Networks = {name: models.QUICK[name] for name in FULL}


def table(rows: Sequence[Row]) -> str:
    """The rows as text: one line a precision."""
    columns = [(curvature, engine) for curvature in ENGINES for engine in ENGINES[curvature]]
    labels = {"hessian": "HVP", "ggn": "GGN", "finite_difference": "differences"}
    heads = [f"{labels[c]} {labels.get(e, e)}" for c, e in columns]
    lines = [f"  {'':<31}{'loss':>9}{'gradient':>10}" + "".join(f"{head:>17}" for head in heads)]
    notes: list[str] = []
    for precision in dict.fromkeys(row.precision for row in rows):
        by_column = {(r.curvature, r.engine): r for r in rows if r.precision == precision}
        plain = next((r for r in by_column.values() if r.failure is None), Row(precision, "", ""))
        line = f"  {precision:<31}{_error(plain.loss):>9}{_error(plain.gradient):>10}"
        for column in columns:
            row = by_column[column]
            is_reference = (precision, column[1]) == (REFERENCE.name, "graph")
            line += f"{'reference' if is_reference else _error(row.product):>17}"
            if row.failure is not None:
                notes.append(f"  {precision}, {' '.join(column)}: {row.failure}")
        exponents = {r.exponent for r in by_column.values() if r.exponent is not None}
        if exponents:
            notes.append(
                f"  {precision}: loss × 2^{min(exponents)}"
                + (f" to 2^{max(exponents)}" if len(exponents) > 1 else "")
            )
        lines.append(line)
    return "\n".join([*lines, *notes])


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and, with ``--json``, writes them to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m hvpopt.experiments.benchmarks.precision",
        description="Relative errors of loss, gradient, Hessian and Gauss-Newton products by "
        "precision, against float64.",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--models", nargs="+", choices=list(FULL), default=list(FULL), help="which networks"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="tiny networks: a check, no numbers")
    options = parser.parse_args(argv)
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device {options.device}: choose cpu or cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; choose cpu")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")

    device, directions = torch.device(options.device), 1 if options.quick else 3
    head = {
        "machine": machine(device),
        "device": device.type,
        "versions": {name: version(name) for name in ("torch", "hvpopt")}
        | {"python": platform.python_version()},
        "directions": directions,
        "quick": options.quick,
    }
    print(
        f"{head['machine']}, torch {torch.__version__}. Relative errors against float64; of "
        f"products the root mean square\nover {directions} random direction(s) of unit length."
    )
    reports = []
    for name in options.models:
        problem = (QUICK if options.quick else FULL)[name](device)
        with _without_tf32():
            rows = measure(problem, directions=directions)
        count = sum(p.numel() for p in problem.module.parameters())
        print(f"\n{problem.name}: {count:,} parameters\n{table(rows)}", flush=True)
        rows_as_json: list[dict[str, Any]] = [asdict(row) for row in rows]
        reports.append({"model": problem.name, "num_parameters": count, "rows": rows_as_json})
    if options.json is not None:
        content = {**head, "models": reports}
        options.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Convolutions on CUDA would use it in float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


if __name__ == "__main__":
    main()
