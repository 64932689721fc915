"""JAX beside torch: starts `jax_worker`, waits for it, and reads its figures."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bounds import FlopBound
from .models import Problem
from .report import Report, Row
from .tasks import (
    COUNTS,
    GGNS,
    HVPS,
    ONE_SHOT_GGN,
    ONE_SHOT_HVP,
    REPEATED_GGN,
    REPEATED_HVP,
    Curvature,
    Product,
)
from .timing import Times

NOT_INSTALLED = "not installed: pip install 'hvpopt[bench]'"
TOLERANCE = 1e-3
"""Relative error, in float32, above which a product is wrong."""


@dataclass(frozen=True)
class JaxReport:
    """JAX's figures of one network."""

    gradient_seconds: float | None = None
    """Median time of its compiled loss and gradient."""
    rows: list[Row] = field(default_factory=list)
    """Its products; ratios are to its own gradient."""
    failure: str | None = None
    """Why there are none."""


def measure(
    name: str,
    problem: Problem,
    bound: FlopBound,
    expected: dict[Curvature, dict[int, Tensor]],
    device: torch.device,
    *,
    counts: Sequence[int],
    repeats: int,
    seconds: float,
    compile_seconds: float = 30.0,
) -> JaxReport:
    """Measures the network in JAX, in a process that runs while this one waits.

    Args:
        name: Its name in `jax_models.MODELS`.
        problem: The network in torch, for its parameters and batch.
        bound: Its floating-point operations.
        expected: Products by curvature and direction, to check JAX's against.
        device: JAX runs on the same; on a CPU with as many threads as torch.
        counts: Numbers of vectors beside one.
        repeats: Rounds of timing.
        seconds: Fewer rounds where those of one way to a product would take longer.
        compile_seconds: After so long, nothing more is compiled.
    """
    if importlib.util.find_spec("jax") is None:
        return JaxReport(failure=NOT_INSTALLED)
    platform = "cuda" if device.type == "cuda" else "cpu"
    limits = {"repeats": repeats, "seconds": seconds, "compile_seconds": compile_seconds}
    with tempfile.TemporaryDirectory() as folder, cpus_as_threads(device):
        path = Path(folder) / "arrays.npz"
        _write(path, problem, expected, max(counts, default=1))
        options = json.dumps([name, platform, list(counts), limits])
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.jax_worker", str(path), options],
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        return JaxReport(failure=f"fails: {lines[-1]}")
    content = json.loads(done.stdout.splitlines()[-1])
    rows = [_row(figure, content["gradient_bytes"], bound) for figure in content["figures"]]
    for count in counts[1:]:
        for row in [row for row in rows if row.engine.endswith("one by one")]:
            if row.count == counts[0]:
                several = HVPS if row.curvature == "hessian" else GGNS
                rows.append(row.of_more(several[count]))
    return JaxReport(statistics.median(content["gradient"]), rows)


def joined(report: Report, jax: JaxReport) -> Report:
    """The report with JAX's rows behind those of the same product."""
    rows = []
    for what in dict.fromkeys(row.what for row in report.rows):
        rows += [row for row in (*report.rows, *jax.rows) if row.what == what]
    return replace(
        report,
        rows=rows,
        jax_gradient_seconds=jax.gradient_seconds,
        jax_failure=jax.failure,
    )


def _write(
    path: Path, problem: Problem, expected: dict[Curvature, dict[int, Tensor]], count: int
) -> None:
    import numpy as np  # comes with JAX

    arrays = {"inputs": problem.inputs, "targets": problem.targets}
    arrays |= {f"params/{name}": x for name, x in problem.params().items()}
    arrays |= {f"directions/{name}": x for name, x in problem.directions(count).items()}
    for curvature, products in expected.items():
        arrays |= {f"expected/{curvature}/{i}": x for i, x in products.items()}
    np.savez(path, **{name: x.cpu().numpy() for name, x in arrays.items()})  # type: ignore[arg-type]


@contextmanager
def cpus_as_threads(device: torch.device) -> Iterator[None]:
    """While active, started processes have as many CPUs as torch threads: XLA uses them all."""
    if device.type != "cpu" or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cpus)[: torch.get_num_threads()])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


def _bounds(bound: FlopBound) -> dict[str, tuple[Product, float]]:
    bounds = {
        ONE_SHOT_HVP: bound.one_shot_hvp,
        REPEATED_HVP: bound.repeated_hvp,
        ONE_SHOT_GGN: bound.one_shot_ggn,
        REPEATED_GGN: bound.repeated_ggn,
    }
    bounds |= {HVPS[count]: bound.repeated_hvp for count in COUNTS}
    bounds |= {GGNS[count]: bound.repeated_ggn for count in COUNTS}
    return {product.what: (product, value) for product, value in bounds.items()}


def _row(figure: dict[str, Any], gradient_bytes: int, bound: FlopBound) -> Row:
    product, least = _bounds(bound)[figure["what"]]
    row = Row(
        what=product.what,
        engine=figure["engine"],
        curvature=product.curvature,
        count=product.count,
        library="jax",
        is_exact=True,
        flop_bound=least,
        error=figure.get("error"),
        failure=figure.get("failure"),
    )
    if row.failure is None and not (row.error is not None and row.error < TOLERANCE):
        return replace(row, failure=f"wrong by {row.error:.0e} of the product")
    if row.failure is not None:
        return row
    gradient, times = Times(tuple(figure["gradient"])), Times(tuple(figure["product"]))
    return replace(
        row.timed(times, gradient),
        memory_ratio=figure["memory_bytes"] / gradient_bytes,
        build_ratio=figure["build_seconds"] / gradient.median,
    )
