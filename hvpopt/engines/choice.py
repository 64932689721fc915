"""The choice of an engine: by what the caller needs and by what the model supports."""

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Literal, get_args

import torch

from hvpopt.engines.base import Engine
from hvpopt.engines.blame import line, none_serves
from hvpopt.engines.dual import DualEngine, RemainderError
from hvpopt.engines.finite_difference import FiniteDifferenceEngine
from hvpopt.engines.graph import GraphEngine
from hvpopt.engines.split import Curvature, curvature_name

logger = logging.getLogger("hvpopt")

EngineName = Literal["auto", "dual", "graph", "finite_difference"]
Use = Literal["one product", "many products"]


def _candidates(requested: EngineName, use: Use, curvature: Curvature) -> list[Engine]:
    dual: list[Engine] = [DualEngine()]
    if curvature == "hessian":
        dual.append(DualEngine(thorough=True))
    if requested == "dual":
        return dual
    if requested == "graph":
        return [GraphEngine()]
    if requested == "finite_difference":
        return [FiniteDifferenceEngine()]
    forward_first = curvature != "hessian" and use == "one product"
    exact = [*dual, GraphEngine()] if forward_first else [GraphEngine(), *dual]
    return [*exact, FiniteDifferenceEngine()] if curvature == "hessian" else exact


class EngineChoice:
    """Remembers which engine serves a model, so that it is found once and logged once.

    Args:
        requested: an engine's name, or "auto". Which comes first is measured
            (``hvpopt.experiments.benchmarks.hvp_cost``): the graph engine, except for a single
            product of the GGN or a Fisher matrix, where the dual engine costs no more and takes
            less memory. What an engine cannot differentiate falls to the next, finite differences
            last.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, requested: EngineName = "auto") -> None:
        if requested not in get_args(EngineName):
            raise ValueError(
                f"engine={requested!r} is unknown: choose one of "
                f"{', '.join(map(repr, get_args(EngineName)))}."
            )
        self.requested = requested
        self.has_checked_graph = False
        self.recomputes: bool | None = None
        self._chosen: dict[tuple[Use, Curvature, Hashable], Engine] = {}

    def __call__(
        self,
        use: Use,
        curvature: Curvature,
        probe: Callable[[Engine], None],
        *,
        of: Hashable = None,
    ) -> Engine:
        """The engine for this use; ``probe`` tries a candidate and raises where it fails.

        A choice holds for what it was made ``of``, the set of parameters.
        """
        name = curvature_name(curvature)  # whatever is sampled
        key = (use, name, of)
        if key not in self._chosen:
            self._chosen[key] = self._find(probe, use, name)
        return self._chosen[key]

    def _find(self, probe: Callable[[Engine], None], use: Use, curvature: Curvature) -> Engine:
        candidates = _candidates(self.requested, use, curvature)
        failures: dict[str, Exception] = {}
        for engine in candidates:
            if len(candidates) > 1:
                try:
                    probe(engine)
                except torch.OutOfMemoryError:
                    raise  # says nothing about the model
                except (RuntimeError, RemainderError) as error:
                    failures[engine.name] = error
                    continue
            why = f"asked for, for {use}" if self.requested != "auto" else f"best for {use}"
            if failures:
                why = _reasons(failures)
            failures.clear()  # their tracebacks hold this frame, and with it the failed graphs
            logger.info("Products of the %s by engine %s (%s).", curvature, engine.name, why)
            return engine
        errors = list(failures.values())
        if self.requested != "auto" or len(set(map(line, errors))) == 1:
            raise errors[-1]  # of the engine in its most able form; or not a matter of engines
        raise none_serves(failures, curvature) from errors[0]


def _reasons(failures: Mapping[str, Exception]) -> str:
    """Why the engines failed, those with the same reason together."""
    names: dict[str, list[str]] = {}
    for name, error in failures.items():
        names.setdefault(line(error), []).append(name)
    return "; ".join(f"{' and '.join(those)} failed: {reason}" for reason, those in names.items())
