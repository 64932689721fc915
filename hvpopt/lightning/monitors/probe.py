"""The batches that the curvature is measured on, and the operator over them."""

import itertools
from collections.abc import Callable, Mapping
from contextlib import closing
from inspect import signature
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_map

from hvpopt.engines.choice import EngineChoice, EngineName
from hvpopt.lightning.attachment import batch_for
from hvpopt.lightning.monitors.batches import (
    check_probe,
    cloned,
    first_loader,
    is_loader,
    num_rows,
    on_cpu,
)
from hvpopt.lightning.monitors.portable import is_portable, size_in_bytes
from hvpopt.lightning.monitors.randomness import seeded
from hvpopt.operators import CurvatureOperator, FisherOperator, GGNOperator, HessianOperator
from hvpopt.operators.data import Batches

Loss = Callable[[L.LightningModule, Any], Any]

_OPERATORS: dict[str, Callable[..., CurvatureOperator]] = {
    "hessian": HessianOperator,
    "ggn": GGNOperator,
    "fisher": FisherOperator,
}
_MAX_STORED = 16 * 2**20
_WHICH = "This was CurvatureMonitor's probe, which must be batches as the train loader yields them."


class SkippedBatchError(Exception):
    """Raised where a module skips a batch of the probe."""


class Probe:
    """Fixed batches, and the curvature of a module's training loss over them as an operator.

    The loss is the module's own ``training_step``, in the mode that the module is in; random
    numbers (dropout masks) are the same at every evaluation. Batches count by their examples.
    Evaluations leave no trace (`hvpopt.operators.CurvatureOperator`).

    Args:
        probe: a batch as the train loader yields it; a loader, of which the first batches are
            read (each rank takes its share); "val" for the first validation loader of the trainer;
            None for the first training batch that is not skipped.
        num_batches: how many batches of a loader.
        curvature: "hessian", "ggn" or "fisher".
        engine: see `hvpopt.closure.ClosureOracle`.
        loss: from module and batch to the loss, in the place of ``training_step``.
        seed: of the random numbers in the loss.

    Raises:
        ValueError: for an unknown curvature, probe or engine.
        TypeError: for a loss that is no function.
    """

    def __init__(
        self,
        probe: Any,
        *,
        num_batches: int,
        curvature: Literal["hessian", "ggn", "fisher"],
        engine: EngineName,
        loss: Loss | None,
        seed: int,
    ) -> None:
        if curvature not in _OPERATORS:
            names = ", ".join(map(repr, _OPERATORS))
            raise ValueError(f"curvature={curvature!r} is unknown: choose one of {names}.")
        check_probe(probe)
        if loss is not None and not callable(loss):
            raise TypeError(f"loss={loss!r}; expected a function of module and batch.")
        EngineChoice(engine)  # refuses an unknown word here, and not during training
        self._source, self._num_batches = probe, num_batches
        self._curvature, self._engine, self._loss = curvature, engine, loss
        self._seed = seed
        self._candidate: tuple[Any, int] | None = None
        self._items: list[tuple[Any, int]] | None = None
        self._operator: CurvatureOperator | None = None
        self._loaded: Mapping[str, Any] = {}

    def check(self, module: L.LightningModule) -> None:
        """Refuses a ``training_step`` that cannot be evaluated on a batch.

        Raises:
            ValueError: under manual optimization, or where it reads its batches itself.
        """
        if self._loss is not None:
            return
        name = type(module).__name__
        remedy = "CurvatureMonitor(loss=lambda module, batch: ...)"
        if not module.automatic_optimization:
            raise ValueError(
                f"CurvatureMonitor evaluates {name}.training_step on a probe batch, but under "
                f"manual optimization that would step the optimizers: give it a loss, {remedy}, "
                "or set automatic_optimization = True."
            )
        if "dataloader_iter" in signature(module.training_step).parameters:
            raise ValueError(
                f"CurvatureMonitor evaluates {name}.training_step on a probe batch, but that takes "
                f"its batches from a dataloader_iter: give it a loss and a probe, {remedy}."
            )

    def check_source(self, trainer: L.Trainer) -> None:
        """Refuses to wait for validation batches that never come.

        Raises:
            ValueError: for ``probe="val"`` in a fit without validation.
        """
        if isinstance(self._source, str) and not trainer.enable_validation:
            raise ValueError(
                "CurvatureMonitor(probe='val') measures on the first validation batches, and this "
                "fit has no validation: give it a loader or a batch, or give the fit validation "
                "data and the module a validation_step."
            )

    def offer(self, batch: Any, batch_idx: int) -> None:
        """Notes a training batch before its step, where the first one is to be the probe."""
        if self._source is None and self._items is None:
            self._candidate = tree_map(cloned, batch), batch_idx

    def accept(self) -> None:
        """Takes the batch that was noted: its step was not skipped."""
        if self._candidate is not None:
            self._items, self._candidate = [self._candidate], None

    def operator(self, trainer: L.Trainer, module: L.LightningModule) -> CurvatureOperator | None:
        """The operator by the parameters that are trained; None where there is no batch yet."""
        if self._items is None:
            self._items = self._read(trainer)
        if self._items is None:
            return None
        params = [p for p in module.parameters() if p.requires_grad]
        held = self._operator
        if held is None or list(map(id, held.params)) != list(map(id, params)):
            with seeded(self._seed + trainer.global_rank, module.device):
                self._operator = held = _OPERATORS[self._curvature](
                    self._loss_of(trainer, module),
                    params,
                    self._items,
                    engine=self._engine,
                    num_terms=_num_terms,
                )
        return held

    def try_out(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Evaluates the loss on what was given, unless that comes with the fit.

        Raises:
            Exception: whatever the module raises for such a batch.
        """
        if self._source is None or isinstance(self._source, str):
            return
        held = self._items
        try:
            operator = self.operator(trainer, module)
            if operator is not None:
                operator.loss()
        except SkippedBatchError:
            pass
        finally:
            self.reset()
            self._items = held

    def reset(self) -> None:
        """Forgets the operator: the module may be another."""
        self._operator = None

    def _loss_of(
        self, trainer: L.Trainer, module: L.LightningModule
    ) -> Callable[[tuple[Any, int]], Any]:
        parameters = signature(module.training_step).parameters.values()
        takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        accepted, own = 2 if takes_any else len(parameters), self._loss

        def loss(item: tuple[Any, int]) -> Any:
            with trainer.precision_plugin.train_step_context():
                try:
                    if own is not None:
                        return own(module, item[0])
                    output = module.training_step(*item[:accepted])
                except Exception as error:
                    if self._source is not None:
                        error.add_note(_WHICH)
                    raise
            if output is None:
                raise SkippedBatchError
            return dict(output) if isinstance(output, Mapping) else output

        return loss

    def _read(self, trainer: L.Trainer) -> list[tuple[Any, int]] | None:
        """The batches of what was given, on the device; None where they are not there yet."""
        source = self._source
        if source is None:
            return None
        step = 1
        if isinstance(source, str):
            source = first_loader(trainer.val_dataloaders)  # which has this rank's batches
            if source is None:
                return None
        elif is_loader(source):
            step = trainer.world_size
        else:
            source = [source]
        params = list(trainer.lightning_module.parameters())
        items = []
        with closing(Batches(source, params).passes("probe")) as batches, isolate_rng():
            first = trainer.global_rank if step > 1 else 0
            for index, batch in itertools.islice(batches, first, self._num_batches, step):
                items.append((batch_for(trainer.lightning_module, trainer, batch), index))
        if not items and trainer.world_size == 1:
            raise ValueError(
                f"CurvatureMonitor's probe, a {type(source).__name__}, yields no batch: give it a "
                "loader of at least one, or a batch."
            )
        return items

    def state_dict(self) -> dict[str, Any]:
        """A probe that was taken from training, of every rank; empty where it is not needed.

        A batch that is no container of tensors and plain values, or larger than 16 MiB, is not
        kept: a resumed run then takes its own first batch.
        """
        if self._source is not None or self._items is None:
            return {}
        item: Any = tree_map(on_cpu, self._items[0])
        if not is_portable(item) or size_in_bytes(item) > _MAX_STORED:
            item = None
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"ranks": [item]}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, item)
        return {"ranks": ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keeps what `state_dict` returned until training starts."""
        self._loaded = state

    def resume(self, trainer: L.Trainer) -> None:
        """Takes the batch of an earlier run, where it was kept for as many ranks."""
        state, self._loaded = self._loaded, {}
        if not state or self._source is not None:
            return
        ranks = state["ranks"]
        if len(ranks) != trainer.world_size or None in ranks:
            rank_zero_info(
                "The checkpoint does not hold the batch on which the curvature was measured: the "
                "measurements go on with the first batch of this run."
            )
            return
        batch, batch_idx = ranks[trainer.global_rank]
        self._items = [(move_data_to_device(batch, trainer.strategy.root_device), batch_idx)]


def _num_terms(item: tuple[Any, int]) -> float:
    """Batches count by their examples; one without rows, as one."""
    rows = num_rows(item[0])
    return 1.0 if rows is None else float(rows)
