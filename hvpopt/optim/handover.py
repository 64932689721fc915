"""A schedule of optimizers in the form of one: Adam, then L-BFGS, then Newton-CG."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from hvpopt.closure import ClosureOracle
from hvpopt.engines.ranks import Ranks
from hvpopt.optim.base import NO_CLOSURE, ClosureOptimizer
from hvpopt.optim.closures import is_missing
from hvpopt.optim.report import StepReport
from hvpopt.optim.stages import Position, Stage, checked_stages

logger = logging.getLogger("hvpopt")


class Handover(Optimizer):
    """Optimizers that take turns on the same parameters, each from where the one before ended.

    To Lightning and to a training loop it is one torch optimizer, whose ``step(closure)`` is that
    of the current stage. A stage that has handed over does not return; its state is freed.

    ``param_groups`` are those of the first stage, and so learning-rate schedulers act on the first
    stage alone: those after it, which find their step lengths by line searches as a rule, keep the
    learning rates that they were made with. Lightning's LearningRateMonitor shows the current
    stage's. Options in a parameter group go to every stage, but its ``lr`` to the first alone.

    Args:
        params: parameters, named parameters, or groups.
        stages: in their order, as a list or by names, of which None leaves one out; each but the
            last must have an end, and the last none.

    Attributes:
        last_report: of the last step, where the stage that made it writes reports; else None.

    Raises:
        TypeError: for stages that are none.
        ValueError: for no stages, one without an end before the last, or an end of the last; and
            whatever the optimizers raise, `torch.optim.LBFGS` for several groups, say.

    Examples:
        >>> from hvpopt.optim.newton_cg import NewtonCG
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = Handover(
        ...     [w], [Stage(torch.optim.Adam, steps=2, lr=0.1), Stage(NewtonCG, damping=0.0)]
        ... )
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(w, torch.ones(2))
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(3):
        ...     loss = optimizer.step(closure)
        >>> torch.allclose(w, torch.ones(2))
        True
    """

    def __init__(self, params: Any, stages: Sequence[Stage] | Mapping[str, Stage | None]) -> None:
        self._stages = checked_stages(stages)
        self._optimizers: list[Optimizer] = []
        self._position = Position()
        self.last_report: StepReport | None = None
        super().__init__(params, {})
        for i, stage in enumerate(self._stages):
            self._optimizers.append(stage.make([_for_stage(i, g) for g in self.param_groups]))
        self.defaults = self._optimizers[0].defaults
        self._share()

    def _share(self) -> None:
        """Shows the first stage's groups and the current one's state as one's own."""
        self.param_groups = self._optimizers[0].param_groups
        self.state = self.optimizer.state

    @property
    def optimizer(self) -> Optimizer:
        """The current stage's optimizer."""
        return self._optimizers[self._position.stage]

    @property
    def num_products(self) -> int:
        """Curvature products of all stages since they were made."""
        return sum(getattr(optimizer, "num_products", 0) for optimizer in self._optimizers)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes a step of the current stage's optimizer and returns what that returns.

        Raises:
            TypeError: without a closure, where this stage looks at the loss, or one that is still
                to come needs products.
        """
        if self._position.is_over(self._stage):
            self._hand_over()
        self._share()
        if is_missing(closure):
            self._check_goes_without_closure()
        stage, tolerance = self._stage, self._stage.stall_tolerance
        try:
            loss = self.optimizer.step(closure)
        finally:
            self.last_report = getattr(self.optimizer, "last_report", None)
        self._position.num_steps += 1
        if closure is not None and tolerance is not None:
            average = partial(self._mean_over_ranks, closure)
            self._position.watch(loss, stage.stall_window, tolerance, average)
        return loss

    def _check_goes_without_closure(self) -> None:
        """Refuses at the first step what would end the training at a later stage."""
        for optimizer in self._optimizers[self._position.stage :]:
            if isinstance(optimizer, ClosureOptimizer):
                raise TypeError(NO_CLOSURE.format(name=_name(optimizer)))
        if self._stage.stall_tolerance is not None:
            raise TypeError(
                f"Handover.step() was called without a closure, but the stage "
                f"{_name(self.optimizer)} ends when its loss stalls: call step(closure), or give "
                "the stage steps= in place of stall_tolerance=. Under Lightning's "
                "precision='16-mixed' the closure never reaches the optimizer."
            )

    @property
    def _stage(self) -> Stage:
        return self._stages[self._position.stage]

    def _hand_over(self) -> None:
        position, before = self._position, self.optimizer
        why = f" (its loss stalled at {position.last_mean:.6g})" if position.is_stalled else ""
        self._position = Position(stage=position.stage + 1)
        before.state.clear()
        logger.info(
            "%s takes over from %s after %d steps%s.",
            _name(self.optimizer),
            _name(before),
            position.num_steps,
            why,
        )

    def _mean_over_ranks(self, closure: Callable[[], Any], value: float) -> float:
        """The mean over the ranks that train together, so that all hand over in the same step."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return value
        params = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        with ClosureOracle(closure, params) as oracle:
            ranks = Ranks(oracle.modules)
        (mean,) = ranks.average([torch.tensor(value, dtype=torch.float64, device=params[0].device)])
        return float(mean)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to every stage.

        Raises:
            ValueError: where a stage is `torch.optim.LBFGS`, which has one group only.
        """
        if not self._optimizers:  # while the optimizer is made
            return super().add_param_group(param_group)
        if any(isinstance(optimizer, LBFGS) for optimizer in self._optimizers):
            raise ValueError(
                "A stage is torch.optim.LBFGS, which has one parameter group only: make the "
                "Handover with all the parameters, frozen ones too."
            )
        params = param_group["params"]
        if isinstance(params, Iterable) and not isinstance(params, (Tensor, set)):
            param_group = {**param_group, "params": list(params)}
        counts = [len(optimizer.param_groups) for optimizer in self._optimizers]
        try:
            for i, optimizer in enumerate(self._optimizers):
                optimizer.add_param_group(_for_stage(i, param_group))
        except Exception:
            for optimizer, count in zip(self._optimizers, counts, strict=True):
                del optimizer.param_groups[count:]
            raise

    def state_dict(self) -> dict[str, Any]:
        """All stages' states, and which is current since when; plain numbers and tensors."""
        return {
            **super().state_dict(),
            "state": {},
            "names": [_name(optimizer) for optimizer in self._optimizers],
            "stages": [optimizer.state_dict() for optimizer in self._optimizers],
            "position": asdict(self._position),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: if it is of other optimizers.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        ours, theirs = [_name(o) for o in self._optimizers], state_dict.get("names", "no Handover")
        if theirs != ours:
            raise ValueError(f"The state is of {theirs}, and this is a Handover of {ours}.")
        for optimizer, state in zip(self._optimizers, state_dict["stages"], strict=True):
            optimizer.load_state_dict(state)
        self._position = Position(**state_dict["position"])
        self._share()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: also the fields that torch's optimizers leave out."""
        kept = ("defaults", "last_report", "_stages", "_position")
        optimizers = [(type(o), _fields(o)) for o in self._optimizers]
        return {**{name: getattr(self, name) for name in kept}, "_optimizers": optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizers = []
        for cls, fields in state["_optimizers"]:
            optimizers.append(cls.__new__(cls))
            optimizers[-1].__setstate__(fields)
        super().__setstate__({**state, "_optimizers": optimizers})
        self._share()

    def __repr__(self) -> str:
        marks = ["*" if optimizer is self.optimizer else " " for optimizer in self._optimizers]
        lines = [f"{mark} {o!r}" for mark, o in zip(marks, self._optimizers, strict=True)]
        return "\n".join(["Handover (* is the current stage)", *lines])


def _name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__


def _fields(optimizer: Optimizer) -> dict[str, Any]:
    """Without hooks and a scheduler's wrapper of ``step``, as in torch's own copies."""
    own = vars(optimizer).items()
    return {k: v for k, v in own if k != "step" and not k.startswith("_optimizer_")}


def _for_stage(index: int, group: dict[str, Any]) -> dict[str, Any]:
    """A copy of a parameter group for a stage: a learning rate means something else to each."""
    return {k: v for k, v in group.items() if index == 0 or k != "lr"}
