"""Problems with other losses, and how their Fisher products are checked."""

from collections.abc import Callable

import torch
from problems import EXACT, Problem, flat
from torch import Tensor

from hvpopt.closure import ClosureOracle

KINDS = ["fisher", "fisher_mc", "empirical_fisher"]
LABELS = torch.arange(6) % 3
ONES = torch.ones(6, 3, dtype=torch.float64)


def with_loss(task: Problem, loss: Callable[[Tensor], Tensor]) -> Problem:
    task.loss = loss
    return task


def products(task: Problem, v: list[Tensor], curvature, engine: str) -> list[Tensor]:
    """The product from `trace` and from `trace_along`."""
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        product = oracle.trace(curvature).product(v)
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        along = oracle.trace_along(v, curvature)[2]
    return [flat(product), flat(along)]


def check(task: Problem, matrix: Tensor, curvature, engines=EXACT) -> None:
    """Lets pass what agrees with a dense matrix under each engine."""
    v = task.tangent()
    for engine in engines:
        for product in products(task, v, curvature, engine):
            torch.testing.assert_close(product, matrix @ flat(v), rtol=1e-9, atol=1e-11)
