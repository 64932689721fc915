"""What is measured: hvpopt's ways to each product of one network."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hvpopt import ClosureOracle, products
from hvpopt.dual import dual
from hvpopt.engines.choice import EngineChoice, EngineName
from hvpopt.operators import CurvatureOperator, GGNOperator, HessianOperator

from .bounds import FlopBound
from .models import Params, Problem

Curvature = Literal["hessian", "ggn"]
Layout = Literal["one", "list", "rows", "columns"]
Prepare = Callable[[Problem, ExitStack], Callable[[], object]]


@dataclass(frozen=True)
class Product:
    """What is computed, by whichever engine."""

    what: str
    """How tables call it."""
    curvature: Curvature
    """Of which matrix."""
    is_repeated: bool = False
    """Whether something is built once, which the time of one application leaves out."""
    count: int = 1
    """How many vectors are multiplied; times are then those of one."""


ONE_SHOT_HVP = Product("one-shot loss + gradient + HVP", "hessian")
REPEATED_HVP = Product("repeated HVP, one application", "hessian", is_repeated=True)
ONE_SHOT_GGN = Product("one-shot GGN product", "ggn")
REPEATED_GGN = Product("repeated GGN product, one application", "ggn", is_repeated=True)
SINGLE = (ONE_SHOT_HVP, REPEATED_HVP, ONE_SHOT_GGN, REPEATED_GGN)
COUNTS = (8, 32)
HVPS = {k: Product(f"{k} HVPs at one point, each", "hessian", True, k) for k in COUNTS}
GGNS = {k: Product(f"{k} GGN products at one point, each", "ggn", True, k) for k in COUNTS}


@dataclass(frozen=True)
class Task:
    """One way to one product."""

    product: Product
    """Which product."""
    engine: str
    """By which engine, hvpopt's or another library's."""
    bound: float
    """Its FLOP bound, in gradients; for several vectors, of each."""
    prepare: Prepare
    """Builds what is kept, alive until the stack closes, and returns what computes the product.

    The problem is the task's own.
    """
    layout: Layout = "one"
    """How several products are returned: as a list, or one tree with one a row or a column."""
    is_exact: bool = True
    """Whether it is no approximation."""
    is_ours: bool = True
    """Whether it is hvpopt's."""

    def read(self, result: Any, index: int = 0) -> Tensor:
        """The product with the direction of this index, flat, from what the task returned."""
        if self.layout == "list":
            return flat(result[index])
        tree = result[2] if isinstance(result, tuple) and len(result) == 3 else result
        if self.layout == "one":
            return flat(tree)
        axis = 0 if self.layout == "rows" else -1
        return flat([x.select(axis, index) for x in _leaves(tree)])


def flat(product: Any) -> Tensor:
    """The product's tensors as one vector, in the parameters' order."""
    return torch.cat([x.reshape(-1) for x in _leaves(product)])


def _leaves(product: Tensor | Mapping[str, Tensor] | Sequence[Tensor]) -> Iterable[Tensor]:
    if isinstance(product, Tensor):
        return [product]
    return product.values() if isinstance(product, Mapping) else product


def tasks(bound: FlopBound) -> list[Task]:
    """hvpopt's ways to one product from a closure and from a function.

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
    return [
        *(_one_shot(ONE_SHOT_HVP, engine, cost) for engine, cost in one_shot),
        Task(ONE_SHOT_HVP, "products.grad_and_hvp", bound.one_shot_hvp, _grad_and_hvp),
        *(_repeated(REPEATED_HVP, engine, cost) for engine, cost in repeated),
        Task(REPEATED_HVP, "products.linearize", bound.repeated_hvp, _linearized),
        *(_one_shot(ONE_SHOT_GGN, engine, bound.one_shot_ggn) for engine in ggn_engines),
        Task(ONE_SHOT_GGN, "products.ggnvp", bound.one_shot_ggn, _ggnvp),
        # the dual engine's Jv is forward mode, which runs the network again
        _repeated(REPEATED_GGN, "dual", bound.one_shot_ggn),
        _repeated(REPEATED_GGN, "graph", bound.repeated_ggn),
    ]


def further_tasks(bound: FlopBound) -> list[Task]:
    """hvpopt's other ways to one product: a context for own loops, and linear operators."""
    hessian, ggn = partial(_operator, kind=HessianOperator), partial(_operator, kind=GGNOperator)
    return [
        Task(ONE_SHOT_HVP, "hvpopt.dual", bound.one_shot_hvp, _dual),
        Task(REPEATED_HVP, "HessianOperator", bound.repeated_hvp, hessian),
        Task(REPEATED_GGN, "GGNOperator", bound.repeated_ggn, ggn),
    ]


def compiled_tasks(bound: FlopBound) -> list[Task]:
    """hvpopt's products by ``torch.compile``, which are slow to come and quick to repeat."""
    one_shot = partial(_grad_and_hvp, compile=True)
    repeated = partial(_linearized, compile=True)
    return [
        Task(ONE_SHOT_HVP, "products.grad_and_hvp, compiled", bound.one_shot_hvp, one_shot),
        Task(REPEATED_HVP, "products.linearize, compiled", bound.repeated_hvp, repeated),
    ]


def many_vector_tasks(bound: FlopBound, count: int) -> list[Task]:
    """hvpopt's ways to products with ``count`` vectors at one point."""
    hvps, ggns = HVPS[count], GGNS[count]
    hvp, ggn = bound.repeated_hvp, bound.repeated_ggn

    def of(prepare: Callable[..., Callable[[], object]], **options: Any) -> Prepare:
        return partial(prepare, count=count, **options)

    return [
        _repeated(hvps, "graph", hvp),
        Task(hvps, "products.linearize, at once", hvp, of(_linearized), "rows"),
        Task(hvps, "products.grad_and_hvp, at once", hvp, of(_grad_and_hvp), "rows"),
        Task(hvps, "HessianOperator, matrix", hvp, of(_operator, kind=HessianOperator), "rows"),
        _repeated(ggns, "dual", bound.one_shot_ggn),
        _repeated(ggns, "graph", ggn),
        Task(ggns, "products.ggnvp, at once", ggn, of(_ggnvp), "rows"),
        Task(ggns, "GGNOperator, matrix", ggn, of(_operator, kind=GGNOperator), "rows"),
    ]


def _one_shot(product: Product, engine: EngineName, bound: float) -> Task:
    """A fresh oracle and one ``trace_along``, as an optimizer's step does it."""
    choice = EngineChoice(engine)  # kept, as by an optimizer, so that it is probed only once

    def prepare(problem: Problem, stack: ExitStack) -> Callable[[], object]:
        parameters, v = list(problem.module.parameters()), list(problem.direction().values())

        def run() -> object:
            with ClosureOracle(problem.closure, parameters, engine=choice) as oracle:
                return oracle.trace_along(v, product.curvature)

        return run

    is_exact = engine != "finite_difference"
    return Task(product, engine, bound, prepare, is_exact=is_exact)


def _repeated(product: Product, engine: EngineName, bound: float) -> Task:
    """Products of an oracle that stays open, one after the other."""
    choice = EngineChoice(engine)

    def prepare(problem: Problem, stack: ExitStack) -> Callable[[], object]:
        parameters = list(problem.module.parameters())
        vs = [list(problem.direction(i).values()) for i in range(product.count)]
        oracle = stack.enter_context(ClosureOracle(problem.closure, parameters, engine=choice))
        point = oracle.trace(product.curvature)
        if product.count == 1:
            return lambda: point.product(vs[0])
        return lambda: [point.product(v) for v in vs]

    several = product.count > 1
    name = f"{engine}, one by one" if several else engine
    layout: Layout = "list" if several else "one"
    return Task(product, name, bound, prepare, layout, is_exact=engine != "finite_difference")


def _dual(problem: Problem, stack: ExitStack) -> Callable[[], object]:
    parameters, v = list(problem.module.parameters()), list(problem.direction().values())

    def run() -> object:
        with dual(parameters, v) as along:
            problem.closure()
        return along.hvp

    return run


def _operator(
    problem: Problem, stack: ExitStack, kind: type[CurvatureOperator], count: int = 1
) -> Callable[[], object]:
    """An operator over one batch, of which the first product makes the graph."""
    operator = stack.enter_context(
        kind(
            lambda batch: problem.criterion(problem.module(batch[0]), batch[1]),
            problem.module.parameters(),
            [(problem.inputs, problem.targets)],
        )
    )
    v, vs = list(problem.direction().values()), list(_tangents(problem, count).values())
    operator.matvec(v)
    return lambda: operator.matvec(v) if count == 1 else operator.matmat(vs)


def _tangents(problem: Problem, count: int) -> Params:
    """A direction, or several as rows, which the functional products take alike."""
    return problem.direction() if count == 1 else problem.directions(count)


def _grad_and_hvp(
    problem: Problem, stack: ExitStack, count: int = 1, compile: bool = False
) -> Callable[[], object]:
    params, v = problem.params(), _tangents(problem, count)

    def run() -> object:
        return products.grad_and_hvp(problem.value, params, v, compile=compile)

    if compile:
        run()
    return run


def _linearized(
    problem: Problem, stack: ExitStack, count: int = 1, compile: bool = False
) -> Callable[[], object]:
    point = products.linearize(problem.value, problem.params(), compile=compile)
    v = _tangents(problem, count)
    return lambda: point.hvp(v)


def _ggnvp(problem: Problem, stack: ExitStack, count: int = 1) -> Callable[[], object]:
    """Without loss and gradient."""
    params, v = problem.params(), _tangents(problem, count)

    def run() -> object:
        with torch.no_grad():
            return products.ggnvp(problem.output, problem.loss, params, v)

    return run
