"""The batches that the curvature is measured on, and the operator over them."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from inspect import signature
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hvpopt.engines.choice import EngineChoice, EngineName
from hvpopt.lightning.monitors.portable import is_portable, size_in_bytes
from hvpopt.operators import CurvatureOperator, GGNOperator, HessianOperator
from hvpopt.operators.data import Batches

Loss = Callable[[L.LightningModule, Any], Any]

_OPERATORS: dict[str, type[CurvatureOperator]] = {"hessian": HessianOperator, "ggn": GGNOperator}
_MAX_STORED = 16 * 2**20


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
        curvature: "hessian" or "ggn".
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
        curvature: Literal["hessian", "ggn"],
        engine: EngineName,
        loss: Loss | None,
        seed: int,
    ) -> None:
        if curvature not in _OPERATORS:
            raise ValueError(f"curvature={curvature!r} is unknown: choose 'hessian' or 'ggn'.")
        if isinstance(probe, str) and probe != "val":
            raise ValueError(f"probe={probe!r} is unknown: give 'val', a batch, or a loader.")
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
            self._candidate = tree_map(_cloned, batch), batch_idx

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
            with _seeded(self._seed + trainer.global_rank, module.device):
                self._operator = held = _OPERATORS[self._curvature](
                    self._loss_of(trainer, module),
                    params,
                    self._items,
                    engine=self._engine,
                    num_terms=_num_examples,
                )
        return held

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
                if own is not None:
                    return own(module, item[0])
                output = module.training_step(*item[:accepted])
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
            source = _first_loader(trainer.val_dataloaders)  # which has this rank's batches
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
                items.append((_on_device(trainer, batch), index))
        return items

    def state_dict(self) -> dict[str, Any]:
        """A probe that was taken from training, of every rank; empty where it is not needed.

        A batch that is no container of tensors and plain values, or larger than 16 MiB, is not
        kept: a resumed run then takes its own first batch.
        """
        if self._source is not None or self._items is None:
            return {}
        item: Any = tree_map(_on_cpu, self._items[0])
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


def is_loader(probe: Any) -> bool:
    """Whether something holds batches and is no batch."""
    is_batch = isinstance(probe, (Tensor, Mapping, Sequence))
    return not is_batch and (isinstance(probe, Iterable) or hasattr(probe, "__getitem__"))


def _first_loader(loaders: Any) -> Any:
    while isinstance(loaders, (list, tuple, dict)) and loaders:
        loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders))
    return loaders or None


def _on_device(trainer: L.Trainer, batch: Any) -> Any:
    """A batch as Lightning hands it to ``training_step``."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch)


def _num_examples(item: tuple[Any, int]) -> float:
    """The rows of the batch's first tensor: as Lightning weighs what modules log."""
    sizes = (len(x) for x in tree_leaves(item[0]) if isinstance(x, Tensor) and x.dim() > 0)
    return float(next(sizes, 1))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """While active, random numbers come from the seed; afterwards all is as it was."""
    with isolate_rng():
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
