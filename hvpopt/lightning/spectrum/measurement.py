"""The curvature of a LightningModule's training loss over data, measured in one go."""

import itertools
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning as L

from hvpopt.lightning.attachment import attached, batch_for, loss_of_training_step, plain_trainer
from hvpopt.lightning.spectrum.fields import fields
from hvpopt.lightning.spectrum.losses import Losses
from hvpopt.lightning.spectrum.meter import Meter
from hvpopt.lightning.spectrum.report import CurvatureKind, SpectrumReport
from hvpopt.lightning.spectrum.retention import fits
from hvpopt.lightning.spectrum.settings import Label, Settings
from hvpopt.lightning.spectrum.weights import weighing
from hvpopt.operators import (
    CurvatureOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
)
from hvpopt.trees import TensorList

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
        UnknownReductionError: if batches have no rows to weigh their losses by.
        SplitNotFoundError, NoLikelihoodError: where the loss has no GGN or Fisher.
    """
    start = time.perf_counter()
    if not module.automatic_optimization:
        raise ValueError(
            f"Under manual optimization {type(module).__name__}.training_step steps its "
            "optimizers, so that it is no function of the parameters: set "
            "automatic_optimization = True and let it return the loss."
        )
    params: TensorList = [p for p in module.parameters() if p.requires_grad]
    if not params:
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient.")
    with attached(module, plain_trainer(module, settings.accelerator), datamodule) as trainer:
        if settings.num_batches is not None:
            data = list(itertools.islice(data, settings.num_batches))
        of_batch = loss_of_training_step(module, trainer)

        def loss(batch: Any) -> Any:
            return of_batch(batch_for(module, trainer, batch))

        module.eval()  # in which examples do not depend on each other
        weights = weighing(settings.weights, loss, params, data)
        module.train(settings.mode == "train")
        make = partial(_OPERATORS[settings.curvature], loss, params, num_terms=weights.num_terms)
        keep = settings.retain_graphs
        operator = make(data, retain_graphs=fits(make, params, data) if keep is None else keep)
        losses = Losses(loss, params, data, weights.num_terms)
        with operator, closing(Meter(operator, losses, settings, label.name)) as meter:
            found = fields(module, operator, meter, settings)
    return SpectrumReport(
        **asdict(label),
        module=type(module).__name__,
        curvature=settings.curvature,
        data=f"{settings.split} data, {_extent(data)}",
        weights="" if _is_single(data) else weights.text,
        mode=settings.mode,
        num_params=sum(p.numel() for p in params),
        num_products=meter.num_products,
        num_evaluations=meter.num_evaluations,
        seconds=time.perf_counter() - start,
        **found,
    )


def _extent(data: Iterable[Any]) -> str:
    if not isinstance(data, Sized):
        return "all batches"
    return "one batch" if _is_single(data) else f"{len(data)} batches"


def _is_single(data: Iterable[Any]) -> bool:
    return isinstance(data, Sized) and len(data) == 1
