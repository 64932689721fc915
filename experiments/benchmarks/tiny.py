"""What a product, a CG iteration and an optimizer's step cost where the arithmetic is nothing.

On a perceptron 4-8-2 the time is that of Python and of torch's dispatch: what each engine adds to
every product of a network of any size.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from hvpopt import SMD, NewtonCG
from hvpopt.optim.base import ClosureOptimizer
from hvpopt.solvers import cg
from hvpopt.trees import TensorList

from . import jax_process, models
from .bounds import FlopBound, flop_bound
from .measure import reason, references
from .models import Problem
from .peers import peer_tasks
from .tasks import SINGLE, Curvature, further_tasks, tasks
from .timing import interleaved_times

CG_STEPS = 20

Runs = dict[tuple[str, str], Callable[[], object]]


@dataclass(frozen=True)
class Overhead:
    """The time of something small."""

    what: str
    """What is done."""
    engine: str
    """By which engine, solver or optimizer."""
    microseconds: float | None
    """Median over rounds of the time of one; None where it fails."""
    failure: str | None = None
    """Why."""


def measure(device: torch.device, *, quick: bool = False) -> list[Overhead]:
    """The times of products by every engine and peer, of CG's iterations, and of steps."""
    number, repeats = (2, 2) if quick else (20, 7)
    problem = models.tiny(device)
    bound = flop_bound(problem)
    with ExitStack() as stack:
        runs, overheads = _products(problem, bound, stack)
        overheads += _microseconds(runs, device, number, repeats)
    overheads += _jax(problem, bound, device, repeats=20 if quick else 200)
    whats = ["gradient", *(product.what for product in SINGLE)]
    overheads.sort(key=lambda overhead: whats.index(overhead.what))
    overheads += _cg_iterations(problem, device, number, repeats)
    overheads += _microseconds(_steps(device), device, number, repeats)
    return overheads


def table(overheads: Sequence[Overhead]) -> str:
    """The overheads as text."""
    lines = ["MLP 4-8-2, batch 8: microseconds, all of them overhead"]
    what = ""
    for overhead in overheads:
        if overhead.what != what:
            what = overhead.what
            lines.append(f"  {what}")
        figure = f"{'fails: ' + str(overhead.failure)}"
        if overhead.microseconds is not None:
            figure = f"{overhead.microseconds:>9.0f}"
        lines.append(f"    {overhead.engine:<40}{figure}")
    return "\n".join(lines)


def _microseconds(runs: Runs, device: torch.device, number: int, repeats: int) -> list[Overhead]:
    """The time of one of ``number`` runs in a row; the different ones take turns."""

    def several(run: Callable[[], object]) -> Callable[[], None]:
        def in_a_row() -> None:
            for _ in range(number):
                run()

        return in_a_row

    times = interleaved_times(
        {f"{what}\n{engine}": several(run) for (what, engine), run in runs.items()},
        repeats=repeats,
        device=device,
    )
    return [
        Overhead(what, engine, 1e6 * taken.median / number)
        for (what, engine), taken in zip(runs, times.values(), strict=True)
    ]


def _products(problem: Problem, bound: FlopBound, stack: ExitStack) -> tuple[Runs, list[Overhead]]:
    """The products that can be computed, and those that fail."""
    runs: Runs = {("gradient", "loss.backward()"): problem.closure}
    failed = []
    for task in (*tasks(bound), *further_tasks(bound), *peer_tasks(bound)):
        try:
            run = task.prepare(problem.copy(), stack)
            run()
        except Exception as error:  # another library may raise anything
            failed.append(Overhead(task.product.what, task.engine, None, reason(error)))
        else:
            runs[task.product.what, task.engine] = run
    return runs, failed


def _jax(problem: Problem, bound: FlopBound, device: torch.device, repeats: int) -> list[Overhead]:
    curvatures: tuple[Curvature, ...] = ("hessian", "ggn")
    expected = {curvature: references(problem, curvature, {1}) for curvature in curvatures}
    report = jax_process.measure(
        "tiny", problem, bound, expected, device, counts=(), repeats=repeats, seconds=5.0
    )
    if report.gradient_seconds is None:
        return [Overhead("gradient", "JAX", None, report.failure)]
    return [
        Overhead("gradient", "JAX", 1e6 * report.gradient_seconds),
        *(
            Overhead(
                row.what,
                row.engine,
                None if row.milliseconds is None else 1e3 * row.milliseconds,
                row.failure,
            )
            for row in report.rows
        ),
    ]


def _cg_iterations(
    problem: Problem, device: torch.device, number: int, repeats: int
) -> list[Overhead]:
    """On a diagonal operator; its product is part of the iteration."""
    b = list(problem.direction().values())
    diagonal = [torch.rand_like(x) + 0.1 for x in b]

    def matvec(v: TensorList) -> TensorList:
        return list(torch._foreach_mul(diagonal, v))

    def solve() -> None:
        solution = cg(matvec, b, stop=lambda progress: None, max_steps=CG_STEPS)
        if solution.num_steps != CG_STEPS:
            raise RuntimeError(f"CG took {solution.num_steps} steps, not {CG_STEPS}.")

    solved, product = _microseconds(
        {("CG iteration", "solvers.cg"): solve, ("CG iteration", ""): lambda: matvec(b)},
        device,
        number,
        repeats,
    )
    assert solved.microseconds is not None
    return [
        Overhead("CG iteration", "solvers.cg with a diagonal", solved.microseconds / CG_STEPS),
        Overhead("CG iteration", "the diagonal's product alone", product.microseconds),
    ]


def _steps(device: torch.device) -> Runs:
    """Steps of optimizers, so small that the problem stays what it is."""
    runs: Runs = {}
    for build in (
        lambda parameters: torch.optim.SGD(parameters, lr=1e-6),
        lambda parameters: SMD(parameters, lr=1e-6),
        lambda parameters: NewtonCG(parameters, lr=1e-3, max_cg_steps=10),
    ):
        problem = models.tiny(device)
        optimizer = build(problem.module.parameters())
        optimizer.step(problem.closure)
        name = type(optimizer).__name__
        if isinstance(optimizer, ClosureOptimizer) and optimizer.last_report is not None:
            name += f", {optimizer.last_report.num_products} products"
        runs["optimizer step", name] = _stepping(optimizer, problem)
    return runs


def _stepping(optimizer: torch.optim.Optimizer, problem: Problem) -> Callable[[], object]:
    return lambda: optimizer.step(problem.closure)  # type: ignore[arg-type]
