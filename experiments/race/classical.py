"""Classical test functions by iteration counts: ``hvpopt task=race race=classical``.

No wall-clock decides here, but how many iterations a method needs, where it ends, and whether
what it says of that is true.
"""

import importlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvpopt.minimization import MinimizeResult, minimize

from ..classical.functions import TestFunction, all_functions  # noqa: TID252
from .classical_report import Count, draw, table_of, title
from .report import head, markdown, plain, text

log = logging.getLogger(__name__)

LIBRARIES = ("hvpopt", "torchmin")


@dataclass(frozen=True, kw_only=True)
class ClassicalRace:
    """Methods on functions, each from the function's usual start in float64.

    Args:
        methods: by name, entries ``{library: hvpopt, method: trust-ncg, options: {}}``; the library
            is "hvpopt" or "torchmin", the options are its keyword arguments.
        only: names of functions, whole or in part ("Rosenbrock"); None for all.
        accuracy: f above the minimum that counts as arrived.
        tolerance: the same for a claim of success to be true.
        max_iter: of every method.

    Raises:
        ValueError: for a library that is none of the two, or an ``only`` that fits no function.
    """

    methods: Mapping[str, Mapping[str, Any]]
    only: Sequence[str] | None = None
    accuracy: float = 1e-13
    tolerance: float = 1e-6
    max_iter: int = 5_000

    def __post_init__(self) -> None:
        for name, entry in self.methods.items():
            if entry.get("library") not in LIBRARIES:
                raise ValueError(
                    f"race.methods.{name}.library={entry.get('library')!r}: choose of "
                    f"{', '.join(LIBRARIES)}."
                )
        for part in self.only or ():
            if not any(part in function.name for function in all_functions()):
                names = ", ".join(function.name for function in all_functions())
                raise ValueError(f"race.only names {part!r}, which is in none of {names}.")

    @property
    def functions(self) -> list[TestFunction]:
        """Those that are minimised."""
        if self.only is None:
            return list(all_functions())
        names = {function.name for function in all_functions()}
        return [
            function
            for function in all_functions()
            if any(p == function.name or (p not in names and p in function.name) for p in self.only)
        ]

    def run(self, output_dir: str | Path) -> dict[str, Any]:
        """Runs all methods on all functions; writes race.json, race.md, race.png and TensorBoard's
        files; returns what is in the first."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        counts: list[Count] = []
        interrupted = False
        try:
            for function in self.functions:
                of_function = [
                    self._count(function, name, entry) for name, entry in self.methods.items()
                ]
                counts += self._with_arrivals(function, of_function)
        except KeyboardInterrupt:
            interrupted = True
        about = {
            **head(torch.device("cpu")),
            "accuracy": self.accuracy,
            "tolerance": self.tolerance,
            "max_iter": self.max_iter,
            "methods": {name: dict(entry) for name, entry in self.methods.items()},
            "interrupted": interrupted,
        }
        table = table_of(counts, self.accuracy)
        content = {**about, "counts": [asdict(count) for count in counts]}
        (folder / "race.json").write_text(json.dumps(plain(content), indent=1) + "\n")
        (folder / "race.md").write_text(f"{title(about)}\n\n{markdown(table)}\n")
        draw(folder, counts)
        log.info("%s\n\n%s\n\noutputs: %s", title(about), text(table), folder)
        if interrupted:
            raise SystemExit(130)
        return content

    def _count(self, function: TestFunction, name: str, entry: Mapping[str, Any]) -> Count:
        if entry["library"] == "torchmin" and find_spec("torchmin") is None:
            message = "not installed (pip install pytorch-minimize)"
            return Count(function.name, name, message=message)
        call = _METHODS[entry["library"]]
        options = {"method": entry["method"], **entry.get("options", {})}
        values: list[float] = []
        try:
            start = time.perf_counter()
            call(function, options, self.max_iter, lambda value: None)
            seconds = time.perf_counter() - start
            end = call(function, options, self.max_iter, values.append)
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            return Count(function.name, name, message=f"{type(error).__name__}: {line}")
        minima = [function.minimum, *function.local_minima]
        is_there = any(abs(end.value - m) <= self.tolerance for m in minima)
        return Count(
            function=function.name,
            method=name,
            iterations=end.iterations,
            excess=max(0.0, min((end.value - m for m in minima), key=abs)),
            success=end.success,
            is_true=end.success == (is_there or _is_minimum(function, end.x)),
            evaluations=end.evaluations,
            seconds=seconds,
            message=end.message,
            values=tuple(values),
        )

    def _with_arrivals(self, function: TestFunction, counts: Sequence[Count]) -> list[Count]:
        """The counts of a function with their iterations to the accuracy."""
        ends = [count.values[-1] for count in counts if count.values]
        minima = []
        for minimum in (function.minimum, *function.local_minima):
            # some are known to a few digits only: then the least value found nearby counts
            near = [v for v in ends if abs(v - minimum) <= self.tolerance]
            minima.append(min(near, default=minimum) if minimum else minimum)
        return [replace(c, to_accuracy=_arrival(c.values, minima, self.accuracy)) for c in counts]


def _arrival(values: Sequence[float], minima: Sequence[float], accuracy: float) -> int | None:
    """The first iteration after which f is so near to one of the minima."""
    near = (i for i, v in enumerate(values, 1) if min(abs(v - m) for m in minima) <= accuracy)
    return next(near, None)


def _is_minimum(function: TestFunction, x: Tensor) -> bool:
    """Whether the gradient is all but zero and the Hessian positive definite."""
    x = x.detach()
    if torch.func.grad(function.f)(x).norm() > 1e-6:
        return False
    values = torch.linalg.eigvalsh(torch.func.hessian(function.f)(x))
    return bool(values[0] > 1e-9 * values[-1])


@dataclass(frozen=True)
class _End:
    x: Tensor
    value: float
    iterations: int
    evaluations: int
    success: bool
    message: str


def _ours(
    function: TestFunction,
    options: Mapping[str, Any],
    max_iter: int,
    record: Callable[[float], None],
) -> _End:
    def callback(result: MinimizeResult) -> None:
        record(result.fun)

    found = minimize(function.f, function.x0(), max_iter=max_iter, callback=callback, **options)
    return _End(found.x, found.fun, found.nit, found.nfev, found.success, found.message)


def _torchmin(
    function: TestFunction,
    options: Mapping[str, Any],
    max_iter: int,
    record: Callable[[float], None],
) -> _End:
    torchmin = importlib.import_module("torchmin")
    method = options["method"]
    others = {name: value for name, value in options.items() if name != "method"}

    def callback(x: Tensor) -> None:
        record(float(function.f(x)))

    found = torchmin.minimize(
        function.f, function.x0(), method, max_iter=max_iter, options=others, callback=callback
    )
    return _End(
        found.x, float(found.fun), found.nit, found.nfev, bool(found.success), str(found.message)
    )


_METHODS = {"hvpopt": _ours, "torchmin": _torchmin}
