"""What the optimizers that need a closure share: validation, isolation, failures, reports."""

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvpopt import trees
from hvpopt.closure import ClosureOracle, NoBackwardError
from hvpopt.engines.choice import EngineChoice, EngineName
from hvpopt.engines.ranks import check_not_sharded
from hvpopt.optim.checks import check_group_options
from hvpopt.optim.closures import is_automatic, is_missing, leaves_backward_out
from hvpopt.optim.report import Outcome, StepReport
from hvpopt.options import check_count
from hvpopt.trees import TensorList

logger = logging.getLogger("hvpopt")

NO_CLOSURE = (
    "{name}.step() was called without a closure, but computes its products from one. Under "
    "Lightning's precision='16-mixed' the closure never reaches the optimizer: use 'bf16-mixed' "
    "or '32-true'. Under manual optimization, and in a loop of your own, call "
    "optimizer.step(closure=closure), where closure computes the loss, clears the gradients, calls "
    "backward() and returns the loss."
)

NOT_CALLABLE = (
    "{name}.step() was called with a {given}, where the closure itself is expected: "
    "optimizer.step(closure), neither optimizer.step(closure()) nor optimizer.step(loss)."
)


SKIPPED = StepReport(outcome=Outcome.SKIPPED, loss=math.nan, num_closure_runs=1)

_FLAGS = ("maximize", "foreach", "fused", "capturable", "differentiable", "momentum", "nesterov")


class ClosureOptimizer(Optimizer):
    """A torch optimizer whose step reads loss, gradient and curvature off the closure.

    Args:
        params: parameters, named parameters, or parameter groups.
        defaults: the groups' defaults.
        engine: see `hvpopt.closure.ClosureOracle`.
        max_consecutive_failures: so many steps in a row may fail (a loss that is not finite, say)
            before an error ends the training.

    Attributes:
        last_report: the `StepReport` of the last step; None before the first.
        num_steps, num_products, num_closure_runs: totals since the optimizer was made.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        engine: EngineName = "auto",
        max_consecutive_failures: int = 5,
    ) -> None:
        check_count("max_consecutive_failures", max_consecutive_failures)
        self._choice = EngineChoice(engine)
        self._max_failures = max_consecutive_failures
        self._num_failures = 0
        self._warned: set[int] = set()
        self.last_report: StepReport | None = None
        self.num_steps = self.num_products = self.num_closure_runs = 0
        self._own = (*vars(self), "_own")
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: torch's optimizers would leave their own fields out."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, after its options and parameters are checked.

        Raises:
            ValueError: for an option out of range, misspelt, or that is not a group's.
            TypeError: for parameters that are complex, integer, or sparse.
            ShardedModuleError: for parameters that FSDP has sharded.
        """
        check_group_options(type(self), param_group, self.defaults)
        self._check_group({**self.defaults, **param_group})
        for flag in _FLAGS:
            if param_group.get(flag):
                raise ValueError(
                    f"{type(self).__name__} has no option {flag!r}: remove it from the group."
                )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_not_sharded(group["params"])
            names = group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                _check_parameter(name, p, type(self).__name__)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for an option out of range."""

    @abstractmethod
    def _advance(self, oracle: ClosureOracle, params: TensorList, start: TensorList) -> StepReport:
        """Traces the oracle, moves ``params`` from ``start``, and says what happened."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step and returns the closure's loss, as at the parameters before the step.

        A loss that is a tensor comes back detached, so that keeping it keeps no graph.

        Args:
            closure: computes the loss, clears the gradients, calls ``backward()``, and returns
                the loss; see `hvpopt.closure`.

        Raises:
            TypeError: without a closure, or for what is none.
            NoBackwardError: if the closure returns a loss without calling ``backward()``.
            FloatingPointError: after ``max_consecutive_failures`` failed steps in a row.
            RuntimeError: if no parameter requires a gradient, or none gets one.
        """
        if is_missing(closure):
            raise TypeError(NO_CLOSURE.format(name=type(self).__name__))
        if not callable(closure):
            name, given = type(self).__name__, type(closure).__name__
            raise TypeError(NOT_CALLABLE.format(name=name, given=given))
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not params:
            raise RuntimeError("No parameter of the optimizer requires a gradient.")
        if leaves_backward_out(closure):
            with torch.enable_grad():
                returned = closure()
            self._account(SKIPPED, may_skip=True)
            return _detached(returned)
        start = trees.clone(params)
        undo = self._undoing(params, start)
        with ClosureOracle(closure, params, engine=self._choice) as oracle:
            try:
                report = self._advance(oracle, params, start)
            except BaseException as error:
                undo()
                is_skipped = isinstance(error, NoBackwardError) and oracle.returned is None
                report = StepReport(
                    outcome=Outcome.SKIPPED if is_skipped else Outcome.INTERRUPTED,
                    loss=math.nan,
                    num_closure_runs=oracle.num_runs,
                    num_products=oracle.num_products,
                )
                if not is_skipped:
                    self.last_report = report
                    raise
        torch.autograd.graph.increment_version(params)
        self._account(report, may_skip=is_automatic(closure))
        return _detached(oracle.returned)

    def _undoing(self, params: TensorList, start: TensorList) -> Callable[[], None]:
        """What puts parameters, state and options back to where they are now.

        States hold tensors that steps replace and do not write to, so that references do.
        """
        states = {p: dict(state) for p, state in self.state.items()}
        options = [dict(group) for group in self.param_groups]

        def undo() -> None:
            trees.copy_(params, start)
            self.state.clear()
            self.state.update(states)
            for group, before in zip(self.param_groups, options, strict=False):
                group.clear()
                group.update(before)

        return undo

    def _account(self, report: StepReport, *, may_skip: bool) -> None:
        self.last_report = report
        self.num_steps += 1
        self.num_products += report.num_products
        self.num_closure_runs += report.num_closure_runs
        if report.outcome is Outcome.SKIPPED and may_skip:
            return
        self._num_failures = self._num_failures + 1 if report.outcome.failed else 0
        if self._num_failures >= self._max_failures:
            raise FloatingPointError(
                f"{self._num_failures} steps of {type(self).__name__} in a row failed. The last: "
                f"{report.outcome.value}"
            )

    def _check_gradients(self, oracle: ClosureOracle, params: Iterable[Tensor]) -> None:
        """Warns once of each parameter without gradient; refuses sparse gradients."""
        params = list(params)
        without = [p for p in params if p.grad is None]
        if len(without) == len(params):
            raise RuntimeError(
                "No parameter of the optimizer got a gradient from the closure: does the loss "
                "depend on the parameters that the optimizer was given?"
            )
        for p in params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise TypeError(
                    f"Parameter {self._name(oracle, p)} has a sparse gradient, of which there is "
                    "no curvature product: build the embedding with sparse=False."
                )
        for p in without:
            if id(p) not in self._warned:
                self._warned.add(id(p))
                logger.warning(
                    "Parameter %s got no gradient from the closure: it stays as it is.",
                    self._name(oracle, p),
                )

    def _name(self, oracle: ClosureOracle, parameter: Tensor) -> str:
        names = [
            name
            for module in oracle.modules
            for name, p in module.named_parameters()
            if p is parameter
        ]
        if names:
            return repr(max(names, key=len))
        index = [p is parameter for g in self.param_groups for p in g["params"]].index(True)
        return f"number {index} (shape {tuple(parameter.shape)})"

    def _decay_of_used(self, params: TensorList) -> list[float]:
        """The weight decay of each parameter; none where it got no gradient, and so stays."""
        decay = self._per_parameter("weight_decay")
        return [0.0 if p.grad is None else wd for p, wd in zip(params, decay, strict=True)]

    def _per_parameter(self, option: str) -> list[Any]:
        """A group option for each parameter that requires a gradient."""
        return [g[option] for g in self.param_groups for p in g["params"] if p.requires_grad]


def _detached(returned: Any) -> Any:
    return returned.detach() if isinstance(returned, Tensor) else returned


def _check_parameter(name: str, p: Tensor, optimizer: str) -> None:
    if p.layout != torch.strided:
        raise TypeError(f"Parameter {name} is sparse ({p.layout}): {optimizer} needs dense ones.")
    if not p.dtype.is_floating_point:
        raise TypeError(
            f"Parameter {name} has dtype {p.dtype}: {optimizer} needs real floating-point "
            "parameters (torch.view_as_real gives those of a complex one)."
        )
