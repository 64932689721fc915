"""What is measured: each way to each product of one network, as a task without arguments."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from hvpopt import ClosureOracle, products
from hvpopt.engines.choice import EngineChoice, EngineName

from .bounds import FlopBound
from .models import Problem

Curvature = Literal["hessian", "ggn"]

ONE_SHOT_HVP = "one-shot loss + gradient + HVP"
REPEATED_HVP = "repeated HVP, one application"
ONE_SHOT_GGN = "one-shot GGN product"
REPEATED_GGN = "repeated GGN product, one application"


@dataclass(frozen=True)
class Task:
    """One way to one product."""

    what: str
    """Which product, one of the four constants above."""
    engine: str
    """By which engine."""
    bound: float
    """Its FLOP bound, in gradients."""
    run: Callable[[], object]
    """Computes it once; for a repeated product, applies what was built before."""
    whole: Callable[[], object]
    """Computes it with all that it keeps alive, for the peak memory."""


@contextmanager
def tasks(problem: Problem, bound: FlopBound) -> Iterator[list[Task]]:
    """All ways to all products of ``problem``; what the repeated ones keep lives inside.

    A finite difference takes two gradients for a product whatever the network, and one more
    where the gradient is wanted too.
    """
    one_shot: tuple[tuple[EngineName, float], ...] = (
        ("dual", bound.one_shot_hvp),
        ("graph", bound.one_shot_hvp),
        ("finite_difference", 3.0),
    )
    repeated: tuple[tuple[EngineName, float], ...] = (
        ("graph", bound.repeated_hvp),
        ("finite_difference", 2.0),
    )
    ggn_engines: tuple[EngineName, ...] = ("dual", "graph")
    with ExitStack() as stack:
        functional_one_shot, functional_repeated = _functional_hvps(problem, bound)
        yield [
            *(_one_shot(problem, e, "hessian", ONE_SHOT_HVP, cost) for e, cost in one_shot),
            functional_one_shot,
            *(_repeated(stack, problem, e, "hessian", REPEATED_HVP, c) for e, c in repeated),
            functional_repeated,
            *(_one_shot(problem, e, "ggn", ONE_SHOT_GGN, bound.one_shot_ggn) for e in ggn_engines),
            _functional_ggn(problem, bound),
            # the dual engine's Jv is forward mode, which runs the network again
            _repeated(stack, problem, "dual", "ggn", REPEATED_GGN, bound.one_shot_ggn),
            _repeated(stack, problem, "graph", "ggn", REPEATED_GGN, bound.repeated_ggn),
        ]


def _one_shot(
    problem: Problem, engine: EngineName, curvature: Curvature, what: str, bound: float
) -> Task:
    """A fresh oracle and one ``trace_along``, as an optimizer's step does it."""
    parameters = list(problem.module.parameters())
    v = [torch.randn_like(p) for p in parameters]
    choice = EngineChoice(engine)  # kept, as by an optimizer, so that it is probed only once

    def run() -> object:
        with ClosureOracle(problem.closure, parameters, engine=choice) as oracle:
            return oracle.trace_along(v, curvature)

    return Task(what, engine, bound, run, run)


def _repeated(
    stack: ExitStack,
    problem: Problem,
    engine: EngineName,
    curvature: Curvature,
    what: str,
    bound: float,
) -> Task:
    """A product of an oracle that stays open; its memory includes what was built for it."""
    problem = problem.copy()
    parameters = list(problem.module.parameters())
    v = [torch.randn_like(p) for p in parameters]
    choice = EngineChoice(engine)
    oracle = stack.enter_context(ClosureOracle(problem.closure, parameters, engine=choice))
    point = oracle.trace(curvature)

    def whole() -> object:
        with ClosureOracle(problem.closure, parameters, engine=choice) as fresh:
            return fresh.trace(curvature).product(v)

    return Task(what, engine, bound, lambda: point.product(v), whole)


def _functional_hvps(problem: Problem, bound: FlopBound) -> tuple[Task, Task]:
    """`products.grad_and_hvp` and `products.linearize` over ``functional_call``."""
    params = problem.params()
    v = {name: torch.randn_like(p) for name, p in params.items()}
    point = products.linearize(problem.value, params)

    def one_shot() -> object:
        return products.grad_and_hvp(problem.value, params, v)

    return (
        Task(ONE_SHOT_HVP, "products.grad_and_hvp", bound.one_shot_hvp, one_shot, one_shot),
        Task(
            REPEATED_HVP,
            "products.linearize",
            bound.repeated_hvp,
            lambda: point.hvp(v),
            lambda: products.linearize(problem.value, params).hvp(v),
        ),
    )


def _functional_ggn(problem: Problem, bound: FlopBound) -> Task:
    """`products.ggnvp` over ``functional_call``, without loss and gradient."""
    params = problem.params()
    v = {name: torch.randn_like(p) for name, p in params.items()}

    def run() -> object:
        with torch.no_grad():
            return products.ggnvp(problem.output, problem.loss, params, v)

    return Task(ONE_SHOT_GGN, "products.ggnvp", bound.one_shot_ggn, run, run)
