"""What the optimizers share that divide by an estimate of the curvature's diagonal."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.closure import ClosureOracle
from hvpopt.closure.runs import NO_LOSS
from hvpopt.engines.choice import EngineName
from hvpopt.optim.base import ClosureOptimizer
from hvpopt.optim.checks import check_seed
from hvpopt.optim.probes import seed_of_step
from hvpopt.optim.report import Outcome, StepReport
from hvpopt.options import check_count, check_range
from hvpopt.trees import TensorList

_MAX_SAMPLED = 100_000

State = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DiagonalReport(StepReport):
    """What an optimizer with a diagonal of the curvature did in a step.

    Attributes:
        is_refreshed: whether the diagonal was estimated anew in this step.
        curvature_low, curvature_median, curvature_high: the 5%, 50% and 95% quantiles of the
            running diagonal, in the loss's units per squared parameter, where it was refreshed;
            of at most 100,000 evenly spaced entries.
    """

    is_refreshed: bool = False
    curvature_low: float = math.nan
    curvature_median: float = math.nan
    curvature_high: float = math.nan


@dataclass(frozen=True)
class Moved:
    """What a step makes of one parameter.

    Attributes:
        value: the new parameter.
        state: its new state, tensors and numbers.
        curvature: the running diagonal.
        figures: further numbers for the report, by name: sums over the entries.
    """

    value: Tensor
    state: State
    curvature: Tensor
    figures: dict[str, Tensor]


class DiagonalOptimizer(ClosureOptimizer):
    """Divides running means of the gradient by those of an estimated diagonal of the curvature.

    The diagonal is estimated anew every ``update_every`` steps, from random numbers that a seed
    and the number of the step determine, so that a resumed run goes on with the same. The steps in
    between cost one gradient and no more. A parameter that gets no gradient stays as it is, and so
    does one that got none in any step with an estimate.

    Args:
        params: parameters, named parameters, or groups.
        defaults: the groups' defaults; ``lr`` and ``weight_decay`` among them.
        update_every: steps from one estimate to the next.
        seed: of the estimates' random numbers.
        engine: see `hvpopt.closure.ClosureOracle`.
        max_consecutive_failures: so many failed steps in a row raise FloatingPointError.
    """

    report: ClassVar[type[DiagonalReport]] = DiagonalReport
    """The class of the reports; its fields may be figures of `Moved`, as means over all entries."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        update_every: int,
        seed: int,
        engine: EngineName,
        max_consecutive_failures: int,
    ) -> None:
        self._update_every = check_count("update_every", update_every)
        self._seed = check_seed(seed)
        super().__init__(
            params, defaults, engine=engine, max_consecutive_failures=max_consecutive_failures
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; raises as `ClosureOptimizer.add_param_group` does."""
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("num_updates", 0)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0.0)
        check_range("eps", group["eps"], 0.0)
        check_range("weight_decay", group["weight_decay"], 0.0)
        betas = group["betas"]
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas={betas!r}: expected two numbers, (beta1, beta2).")
        for beta in betas:
            check_range("betas", beta, 0.0, 0.9999999)

    @abstractmethod
    def _estimate(
        self, oracle: ClosureOracle, params: TensorList, seed: int
    ) -> tuple[Tensor, TensorList]:
        """Runs the closure for the loss, the gradients (in ``p.grad``), and a diagonal."""

    @abstractmethod
    def _moved(
        self, p: Tensor, grad: Tensor, diagonal: Tensor | None, group: dict[str, Any], state: State
    ) -> Moved:
        """The step of one parameter; ``diagonal`` is the new estimate in the steps that have one.

        ``state`` is empty before the parameter's first step, and is not to be written to.
        """

    def _advance(
        self, oracle: ClosureOracle, params: TensorList, start: TensorList
    ) -> DiagonalReport:
        num_updates = max(group["num_updates"] for group in self.param_groups)
        is_new = any(p not in self.state for p in params)
        is_due = is_new or num_updates % self._update_every == 0
        diagonals: Sequence[Tensor | None] = [None] * len(params)
        if is_due:
            seed = seed_of_step(self._seed, num_updates)
            loss, diagonals = self._estimate(oracle, params, seed)
            if self._update_every > 1:
                _check_returned(oracle.returned)
        else:
            loss, _ = oracle.gradient(alone=True)
        self._check_gradients(oracle, params)
        if failure := _failure(loss, params, diagonals):
            return self._report(oracle, failure, loss)

        groups = [g for g in self.param_groups for p in g["params"] if p.requires_grad]
        moved = {
            p: self._moved(p, p.grad, d, group, self.state.get(p, {}))
            for p, d, group in zip(params, diagonals, groups, strict=True)
            if p.grad is not None and (d is not None or self.state[p])
        }
        report = self._report(
            oracle,
            Outcome.STEPPED,
            loss,
            is_refreshed=is_due,
            **_figures(list(moved.values()), with_quantiles=is_due),
        )
        for p, new in moved.items():
            p.copy_(new.value)
        for p in params:  # an empty state says that there was an estimate, if not of its curvature
            self.state[p] = moved[p].state if p in moved else self.state.get(p, {})
        for group in self.param_groups:
            group["num_updates"] = num_updates + 1
        return report

    def _report(
        self, oracle: ClosureOracle, outcome: Outcome, loss: Tensor, **figures: Any
    ) -> DiagonalReport:
        return self.report(
            outcome=outcome,
            loss=float(loss),
            num_closure_runs=oracle.num_runs,
            num_products=oracle.num_products,
            **figures,
        )


def _check_returned(loss: object) -> None:
    """Asks for the loss, which the steps without an estimate have from nowhere else."""
    if not isinstance(loss, (Tensor, float, int)):
        raise TypeError(NO_LOSS.format(given=type(loss).__name__))


def _failure(
    loss: Tensor, params: TensorList, diagonals: Sequence[Tensor | None]
) -> Outcome | None:
    if not torch.isfinite(loss):
        return Outcome.NONFINITE_LOSS
    if not trees.all_finite([p.grad for p in params if p.grad is not None]):
        return Outcome.NONFINITE_GRADIENT
    is_finite = trees.all_finite([d for d in diagonals if d is not None])
    return None if is_finite else Outcome.NONFINITE_PRODUCT


def _figures(moved: Sequence[Moved], *, with_quantiles: bool) -> dict[str, float]:
    """The means of the figures over all entries, and quantiles, by one transfer from the device."""
    total = sum(new.value.numel() for new in moved)
    if total == 0:
        return {}
    device = moved[0].value.device
    numbers = {
        name: torch.stack([new.figures[name].to(device, torch.float64) for new in moved]).sum()
        / total
        for name in moved[0].figures
    }
    if with_quantiles:
        stride = 2 * (total // _MAX_SAMPLED) + 1
        sampled = [new.curvature.reshape(-1)[::stride].to(device).float() for new in moved]
        levels = torch.tensor([0.05, 0.5, 0.95], device=device)
        quantiles = torch.quantile(torch.cat(sampled), levels).double().unbind()
        names = ("curvature_low", "curvature_median", "curvature_high")
        numbers |= dict(zip(names, quantiles, strict=True))
    if not numbers:
        return {}
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))
