"""Checks, times and weighs each way to each product of one network."""

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from hvpopt import ClosureOracle
from hvpopt.engines.support import differentiable_kernels

from .bounds import FlopBound
from .models import Problem
from .report import Report, Row
from .tasks import Curvature, Product, Task, flat
from .timing import Times, free_bytes, interleaved_times, peak_bytes, timed

TOLERANCE = 1e-3
"""Relative error, in float32, above which an exact product is wrong."""

KERNELS = "attention and recurrence by kernels that have second derivatives"
STATELESS = "BatchNorm without running statistics"

Context = Callable[[], AbstractContextManager[None]]


class WrongProductError(ValueError):
    """Raised where an exact product is not the one that hvpopt's graph engine computes."""


@dataclass(frozen=True)
class _Trial:
    """A task that was run once and checked, or that failed."""

    task: Task
    row: Row
    run: Callable[[], object] | None = None
    whole: Callable[[], object] | None = None
    """Builds and runs."""
    seconds: float = 0.0
    """Of the run that was checked."""
    gradient_seconds: float = 0.0
    """Of a gradient just before."""
    build_seconds: float = 0.0
    """Of what it built."""


class Measurement:
    """One network's gradient and products.

    Args:
        problem: The network.
        tasks: The ways to its products, checked against hvpopt's graph engine.
        bound: Its floating-point operations.
        device: Where it is.
        repeats: Rounds of timing.
        seconds: Fewer rounds where those of one product would take longer; where not even two
            fit, the time is that of the run that was checked.
    """

    def __init__(
        self,
        problem: Problem,
        tasks: Sequence[Task],
        bound: FlopBound,
        device: torch.device,
        *,
        repeats: int,
        seconds: float = float("inf"),
    ) -> None:
        self._problem, self._tasks, self._bound = problem, tasks, bound
        self._device, self._repeats, self._seconds = device, repeats, seconds
        problem.closure()
        self._gradient_peak = self._peak(problem.closure)
        self._gradients = [timed(problem.closure, device)[1]]
        self._rows: list[Row] = []
        counts = {task.product.count for task in tasks}
        for index in range(max(counts)):  # so that no task's build contains it
            problem.direction(index)
        self.expected: dict[Curvature, dict[int, Tensor]] = {
            curvature: references(problem, curvature, counts)
            for curvature in dict.fromkeys(task.product.curvature for task in tasks)
        }

    def report(self) -> Report:
        """Measures all products, one after the other."""
        gc.collect()
        gc.freeze()  # collecting garbage before each peak is then quick
        try:
            for product in dict.fromkeys(task.product for task in self._tasks):
                self._rows += self._measure(product)
        finally:
            gc.unfreeze()
        return Report(
            model=self._problem.name,
            num_parameters=sum(p.numel() for p in self._problem.module.parameters()),
            gradient_seconds=statistics.median(self._gradients),
            gradient_peak_mib=self._gradient_peak / 2**20,
            gradient_flops=self._bound.forward + self._bound.backward,
            rows=self._rows,
        )

    def _measure(self, product: Product) -> list[Row]:
        group = [task for task in self._tasks if task.product == product]
        with ExitStack() as stack:
            trials = [self._known(task) or self._try(task, stack) for task in group]
            gradient, times = self._times(trials)
        self._gradients += gradient.seconds
        rows = []
        for trial in trials:
            row = trial.row
            if trial.task.engine in times:
                row = row.timed(times[trial.task.engine], gradient)
                if trial.whole is not None and self._is_weighed(trial):
                    row = replace(row, memory_ratio=self._peak(trial.whole) / self._gradient_peak)
            rows.append(row)
        return rows

    def _is_weighed(self, trial: _Trial) -> bool:
        """Whether the memory is measured; 32 vectors at once take four times what 8 do."""
        product, layout = trial.task.product, trial.task.layout
        one_by_one = layout == "list"  # as much as one
        return trial.build_seconds <= self._seconds and product.count < 32 and not one_by_one

    def _known(self, task: Task) -> _Trial | None:
        """Vectors one by one take each what they took when there were fewer."""
        if task.layout != "list":
            return None
        for row in self._rows:
            same = (row.engine, row.curvature) == (task.engine, task.product.curvature)
            if same and row.count > 1:
                return _Trial(task, row.of_more(task.product))
        return None

    def _try(self, task: Task, stack: ExitStack) -> _Trial:
        """One run of the task, as it is or else after a remedy, compared with what is expected."""
        row = _row(task)
        refusal = self._refusal(task)
        if refusal is not None:
            return _Trial(task, replace(row, failure=refusal))
        failures: list[str] = []
        for remedy, problem, context in self._ways(task):
            own = ExitStack()
            try:
                with context():
                    run, build_seconds = timed(partial(task.prepare, problem, own), self._device)
                    gradient_seconds = timed(self._problem.closure, self._device)[1]
                    result, seconds = timed(run, self._device)
                    error = self._error(task, result)
                    if seconds < self._seconds / 50:  # the first run is slower
                        seconds = timed(run, self._device)[1]
            except Exception as raised:  # another library may raise anything
                own.close()
                why = reason(raised)
                if why not in failures:
                    failures.append(f"with {remedy}: {why}" if failures else why)
                continue
            finally:
                result = None
            stack.enter_context(own)
            repeated = task.product.is_repeated
            return _Trial(
                task,
                replace(
                    row,
                    error=error,
                    remedy=remedy,
                    failure=failures[0] if failures else None,
                    build_ratio=build_seconds / gradient_seconds if repeated else None,
                ),
                _within(context, run),
                _within(context, partial(_whole, task, problem)),
                seconds,
                gradient_seconds,
                build_seconds,
            )
        return _Trial(task, replace(row, failure="; ".join(failures)))

    def _ways(self, task: Task) -> Iterator[tuple[str | None, Problem, Context]]:
        """The problem as it is, then what a knowing user would change, the function the same."""
        yield None, self._problem.copy(), nullcontext
        if not task.is_ours:
            yield KERNELS, self._problem.copy(), differentiable_kernels
            if any(isinstance(m, _BatchNorm) for m in self._problem.module.modules()):
                yield STATELESS, self._problem.without_statistics(), nullcontext

    def _times(self, trials: Sequence[_Trial]) -> tuple[Times, dict[str, Times]]:
        """Of the gradient and of each task, in as many rounds as there is time for."""
        ready = {trial.task.engine: trial for trial in trials if trial.run is not None}
        once = sum(trial.seconds + trial.gradient_seconds for trial in ready.values())
        rounds = self._repeats
        if once * (rounds + 1) > self._seconds:  # the first is not counted
            rounds = int(self._seconds / once) - 1
        if rounds >= 1 and ready:
            runs = {name: trial.run for name, trial in ready.items() if trial.run is not None}
            times = interleaved_times(
                {"gradient": self._problem.closure, **runs}, repeats=rounds, device=self._device
            )
            return times.pop("gradient"), times
        gradients = [trial.gradient_seconds for trial in ready.values()]
        gradient = Times((statistics.median(gradients),)) if gradients else Times(())
        return gradient, {name: Times((trial.seconds,)) for name, trial in ready.items()}

    def _error(self, task: Task, result: object) -> float:
        """The largest relative error over the directions that are checked.

        Raises:
            WrongProductError: If it is too large for an exact engine.
        """
        errors = []
        for index, expected in self.expected[task.product.curvature].items():
            if index < task.product.count:
                difference = task.read(result, index).detach() - expected
                errors.append(float(difference.norm() / expected.norm()))
        error = max(errors)
        if task.is_exact and not error < TOLERANCE:
            raise WrongProductError(f"wrong by {error:.0e} of the product")
        return error

    def _refusal(self, task: Task) -> str | None:
        """Why a task is not tried, judging by the same way with fewer vectors."""
        if task.product.count == 1:
            return None
        for row in self._rows:
            same = row.engine.split(",")[0] == task.engine.split(",")[0]
            if not same or row.curvature != task.product.curvature or row.build_ratio is None:
                continue
            if row.build_ratio * statistics.median(self._gradients) > self._seconds:
                return f"not run: it first builds for some {row.build_ratio:.0f} gradients"
            if task.layout in ("rows", "columns") and row.memory_ratio is not None:
                each = row.memory_ratio * self._gradient_peak / row.count
                peak = each * task.product.count
                if row.engine == task.engine and peak > 0.6 * free_bytes(self._device):
                    return f"not run: it would take some {peak / 2**30:.0f} GiB"
        return None

    def _peak(self, task: Callable[[], object]) -> int:
        self._problem.module.zero_grad()
        return peak_bytes(task, self._device)


def _whole(task: Task, problem: Problem) -> object:
    with ExitStack() as stack:
        return task.prepare(problem, stack)()


def _within(context: Context, task: Callable[[], object]) -> Callable[[], object]:
    if context is nullcontext:
        return task

    def run() -> object:
        with context():
            return task()

    return run


def references(problem: Problem, curvature: Curvature, counts: set[int]) -> dict[int, Tensor]:
    """The products with the last of each count of directions, and with the first."""
    parameters = list(problem.module.parameters())
    with ClosureOracle(problem.closure, parameters, engine="graph") as oracle:
        point = oracle.trace(curvature)
        return {
            i: flat(point.product(list(problem.direction(i).values())))
            for i in sorted({0, *(count - 1 for count in counts)})
        }


def _row(task: Task) -> Row:
    return Row(
        what=task.product.what,
        engine=task.engine,
        curvature=task.product.curvature,
        count=task.product.count,
        library="hvpopt" if task.is_ours else "torch",
        is_exact=task.is_exact,
        flop_bound=task.bound,
    )


def reason(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, ImportError):
        return f"{error}: pip install 'hvpopt[bench]'"
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, WrongProductError) else f"{type(error).__name__}: {line}"
