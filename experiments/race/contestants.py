"""Who runs: a contestant is an entry of the configuration, and its run an iterator of steps."""

import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvpopt.cli.errors import UserError
from hvpopt.cli.targets import resolve_target

from .problem import Problem
from .rivals import torchmin_steps

PACKAGES = {"pytorch_optimizer": "pytorch-optimizer", "torchmin": "pytorch-minimize"}
"""Packages of rivals and how pip calls them; where one is absent, its contestants do not run."""

_KINDS = ("optimizer", "minimizer", "solver")
_KEYS = (*_KINDS, "options", "grid", "create_graph_every")


@dataclass(frozen=True)
class Contestant:
    """A method with its options, and those that are to be tuned.

    Attributes:
        name: as tables and plots call it.
        kind: "optimizer" (a class with torch's interface, called with the parameters), "minimizer"
            (a method of pytorch-minimize), or "solver" (a function from the problem to an
            iterator of steps).
        method: the dotted path of the class or function, or the minimizer's method.
        options: keyword arguments.
        grid: for each option that is tuned its candidates; their combinations are tried.
        create_graph_every: on the first step and then every so many, the closure calls
            ``backward(create_graph=True)``; the Hessian methods of pytorch-optimizer (from
            version 4 on) need it on these.
    """

    name: str
    kind: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    create_graph_every: int = 0

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> "Contestant":
        """The contestant of an entry ``{optimizer: torch.optim.SGD, grid: {lr: [0.1, 1]}}``.

        Raises:
            ValueError: for an entry that names no method or several, an unknown key, an empty
                list of candidates, or a class that does not exist.
        """
        where = f"race.contestants.{name}"
        unknown = sorted(set(entry) - set(_KEYS))
        if unknown:
            raise ValueError(f"{where} has no key {unknown[0]!r}: choose of {', '.join(_KEYS)}.")
        kinds = [kind for kind in _KINDS if kind in entry]
        if len(kinds) != 1:
            raise ValueError(
                f"{where} must name one of {', '.join(_KINDS)}, got {kinds or 'none'}."
            )
        grid = dict(entry.get("grid", {}))
        for option, values in grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(
                    f"{where}.grid.{option}={values!r}: expected a list of candidates."
                )
        contestant = cls(
            name,
            kinds[0],
            entry[kinds[0]],
            dict(entry.get("options", {})),
            grid,
            entry.get("create_graph_every", 0),
        )
        if contestant.missing_package is None:
            contestant._resolved()
        return contestant

    @property
    def missing_package(self) -> str | None:
        """The package, as pip calls it, that this contestant needs and that is not installed."""
        module = "torchmin" if self.kind == "minimizer" else self.method.partition(".")[0]
        absent = module in PACKAGES and importlib.util.find_spec(module) is None
        return PACKAGES[module] if absent else None

    @property
    def is_ours(self) -> bool:
        """Whether the method is one of hvpopt's optimizers."""
        return self.method.startswith("hvpopt.") and ".experiments." not in self.method

    def candidates(self) -> list[dict[str, Any]]:
        """The options with each combination of the grid."""
        names = list(self.grid)
        return [
            {**self.options, **dict(zip(names, values, strict=True))}
            for values in itertools.product(*self.grid.values())
        ]

    def at_edge(self, options: Mapping[str, Any]) -> list[str]:
        """The tuned options whose choice is the first or the last of several candidates."""
        return [
            name
            for name, values in self.grid.items()
            if len(values) > 1 and options[name] in (values[0], values[-1])
        ]

    def start(self, problem: Problem, options: Mapping[str, Any]) -> Iterator[None]:
        """A run on the problem: each ``next`` makes a step, and the iterator ends where the method
        or the problem's batches do."""
        if self.kind == "minimizer":
            return torchmin_steps(problem, self.method, options)
        if self.kind == "solver":
            return self._resolved()(problem, **options)
        optimizer = self._resolved()
        return optimizer_steps(problem, optimizer, options, self.create_graph_every)

    def _resolved(self) -> Any:
        if self.kind == "minimizer":
            return None
        try:
            return resolve_target(
                self.method, f"race.contestants.{self.name}.{self.kind}", more=tuple(PACKAGES)
            )
        except UserError as error:
            raise ValueError(str(error).replace("._target_=", "=")) from error


def optimizer_steps(
    problem: Problem, make: Any, options: Mapping[str, Any], create_graph_every: int = 0
) -> Iterator[None]:
    """Steps of an optimizer with torch's interface, one batch each."""
    optimizer = make(list(problem.module.parameters()), **options)
    for count in itertools.count(1):
        if not problem.advance():
            return
        losses: list[Tensor] = []
        with_graph = create_graph_every > 0 and (count - 1) % create_graph_every == 0

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = problem.loss()
            if with_graph:  # noqa: B023 (called within the same round)
                loss.backward(create_graph=True)
            else:
                loss.backward()
            losses.append(loss.detach())  # noqa: B023
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        problem.observe(losses[0])
        yield
