"""The curvature of a LightningModule's training loss over data, measured in one go."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

import lightning as L
import torch

from hvpopt.lightning.attachment import attached, batch_for, loss_of_training_step, plain_trainer
from hvpopt.lightning.spectrum.fields import fields
from hvpopt.lightning.spectrum.meter import Meter
from hvpopt.lightning.spectrum.report import CurvatureKind, SpectrumReport
from hvpopt.lightning.spectrum.settings import Label, Settings, Weights
from hvpopt.operators import (
    CurvatureOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    UnknownReductionError,
)
from hvpopt.operators.points import NumTerms

_OPERATORS: dict[CurvatureKind, Callable[..., CurvatureOperator]] = {
    "hessian": HessianOperator,
    "ggn": GGNOperator,
    "fisher": FisherOperator,
}


def measure(
    module: L.LightningModule,
    data: Iterable[Any],
    label: Label,
    settings: Settings,
    *,
    datamodule: L.LightningDataModule | None = None,
) -> SpectrumReport:
    """The report on a module's training loss over batches, at its present parameters.

    The module's ``training_step`` runs as it is, and nothing is left of it: parameters, gradients,
    buffers, metrics and random numbers are afterwards what they were.

    Args:
        module: whose ``training_step`` gives the loss.
        data: batches, in anything that can be iterated again and again.
        label: where the parameters come from.
        settings: what is measured.
        datamodule: through whose hooks batches go, as in training.

    Raises:
        ValueError: if there is no batch, or no parameter that requires a gradient; under manual
            optimization.
        UnknownReductionError: if it cannot be told how the losses of batches combine.
        SplitNotFoundError, NoLikelihoodError: where the loss has no GGN or Fisher.
    """
    start = time.perf_counter()
    if not module.automatic_optimization:
        raise ValueError(
            f"Under manual optimization {type(module).__name__}.training_step steps its "
            "optimizers, so that it is no function of the parameters: set "
            "automatic_optimization = True and let it return the loss."
        )
    params = [p for p in module.parameters() if p.requires_grad]
    if not params:
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient.")
    with attached(module, plain_trainer(module, settings.accelerator), datamodule) as trainer:
        if settings.num_batches is not None:
            data = list(itertools.islice(data, settings.num_batches))
        module.train(settings.mode == "train")
        of_batch = loss_of_training_step(module, trainer)
        operator = _OPERATORS[settings.curvature](
            lambda batch: of_batch(batch_for(module, trainer, batch)),
            params,
            data,
            num_terms=_NUM_TERMS[settings.weights],
            retain_graphs=settings.retain_graphs,
        )
        with operator, _explaining(), closing(Meter(operator, settings, label.name)) as meter:
            found = fields(module, operator, meter, settings)
    return SpectrumReport(
        **asdict(label),
        module=type(module).__name__,
        curvature=settings.curvature,
        data=f"{settings.split} data, {_extent(data)}",
        mode=settings.mode,
        num_params=sum(p.numel() for p in params),
        num_products=meter.num_products,
        num_evaluations=meter.num_evaluations,
        seconds=time.perf_counter() - start,
        **found,
    )


def _num_examples(batch: Any) -> float:
    """The rows of a batch's first tensor with dimensions."""
    leaves = torch.utils._pytree.tree_leaves(batch)
    rows = [len(x) for x in leaves if isinstance(x, torch.Tensor) and x.dim() > 0]
    if not rows:
        raise ValueError(
            f"The batch, a {type(batch).__name__}, holds no tensor whose rows are its examples: "
            "choose weights='sum', or a loss function of torch.nn.functional."
        )
    return float(rows[0])


_NUM_TERMS: dict[Weights, NumTerms] = {"auto": None, "examples": _num_examples, "sum": "sum"}


@contextmanager
def _explaining() -> Iterator[None]:
    """While active, an unknown reduction is told with the option that settles it."""
    try:
        yield
    except UnknownReductionError as error:
        raise UnknownReductionError(
            f"{error} Choose weights='examples' (task.weights=examples) where each batch's loss "
            "is a mean over its examples, or weights='sum'."
        ) from error


def _extent(data: Iterable[Any]) -> str:
    if not isinstance(data, Sized):
        return "all batches"
    return "one batch" if len(data) == 1 else f"{len(data)} batches"
