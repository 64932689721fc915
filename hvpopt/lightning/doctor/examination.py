"""The examination of a module on one batch."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvpopt import trees
from hvpopt.lightning.attachment import attached, batch_for, loss_of_training_step
from hvpopt.lightning.doctor.curvature import (
    automatic_choice,
    examine_likelihood,
    examine_split,
)
from hvpopt.lightning.doctor.determinism import examine_determinism
from hvpopt.lightning.doctor.double import check_in_double
from hvpopt.lightning.doctor.engines import Engines, examine_engines
from hvpopt.lightning.doctor.looking import one_line, sentence
from hvpopt.lightning.doctor.products import ProductCheck, examine_products
from hvpopt.lightning.doctor.report import DoctorReport, Finding
from hvpopt.lightning.doctor.settings import examine_settings
from hvpopt.lightning.doctor.step import try_step
from hvpopt.lightning.doctor.subject import Subject, differences
from hvpopt.options import check_range
from hvpopt.silence import trainer_of
from hvpopt.trees import TensorList


def doctor(
    module: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: Optimizer | None = None,
    trainer: L.Trainer | None = None,
    seconds: float = 0.5,
    seed: int = 0,
) -> DoctorReport:
    """What will and will not work when ``module`` trains with second-order steps on such batches.

    Runs the training step on the batch as a fit would, and looks at: the products of each engine
    (which module and operation stand in the way, and the remedy), their agreement with differences
    of gradients, their time and memory, whether the loss is deterministic, the split that the GGN
    needs, Lightning's settings, the automatic choice of an engine, and one step of the optimizer.
    ``str()`` of the report is the table.

    It looks only: parameters, gradients, buffers, metrics, attributes of the modules, random
    numbers, optimizer and trainer are afterwards what they were. (Files, and objects of your own
    that change inside themselves, are out of its sight.)

    Args:
        module: a LightningModule, which needs no trainer; or any module, with ``loss``.
        batch: as the train loader yields it.
        loss: from a batch to a scalar; by default the module's ``training_step``.
        optimizer: what is to train; by default what ``configure_optimizers`` returns, where there
            is one. Of an optimizer given here a copy makes the step.
        trainer: whose precision, device and settings are meant; by default the module's own, or a
            plain one for the module's device.
        seconds: for timing each engine and matrix.
        seed: of the direction that products are compared in.

    Raises:
        TypeError: for a module without a training step and no ``loss``.
        ValueError: if no parameter requires a gradient, or ``seconds`` is out of range.

    Examples:
        >>> net = torch.nn.Linear(3, 2)
        >>> batch = (torch.eye(3), torch.tensor([0, 1, 1]))
        >>> cross_entropy = torch.nn.functional.cross_entropy
        >>> report = doctor(net, batch, loss=lambda b: cross_entropy(net(b[0]), b[1]))
        >>> report.can_train, report.engine("graph", "ggn").is_supported
        (True, True)
    """
    check_range("seconds", seconds, 0.0)
    module = getattr(module, "_orig_mod", module)  # products run compiled modules eagerly
    _check(module, loss)
    given = trainer or (trainer_of(module) if isinstance(module, L.LightningModule) else None)
    callbacks = list(getattr(given, "callbacks", ()))  # none of which is called in here
    with attached(module, given) as active:
        module.train()
        examination = _Examination(module, active, batch, loss, optimizer)
        return examination.report(callbacks, seconds, seed)


def _check(module: nn.Module, loss: Callable[[Any], Tensor] | None) -> None:
    if loss is None and not isinstance(module, L.LightningModule):
        raise TypeError(
            f"{type(module).__name__} is no LightningModule, and it is not known how its loss is "
            "computed: give loss=, a function from the batch to a scalar tensor."
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient.")


class _Examination:
    """One examination; findings gather in the order in which they are shown."""

    def __init__(
        self,
        module: nn.Module,
        trainer: L.Trainer,
        batch: Any,
        loss: Callable[[Any], Tensor] | None,
        optimizer: Optimizer | None,
    ) -> None:
        self._module, self._trainer = module, trainer
        self._findings: list[Finding] = []
        optimizers = self._optimizers_of(optimizer)
        params: TensorList = [p for p in module.parameters() if p.requires_grad]
        if optimizers:
            groups = optimizers[0].param_groups
            params = [p for g in groups for p in g["params"] if p.requires_grad] or params
        of_batch: Callable[[Any], Tensor | None] | None = loss
        if of_batch is None:
            assert isinstance(module, L.LightningModule)
            of_batch = loss_of_training_step(module, trainer)
        self._of_batch, self._batch = of_batch, batch_for(module, trainer, batch)
        of_this = partial(of_batch, self._batch)
        self._subject = Subject(module, trainer, params, of_this, optimizers)

    def _optimizers_of(self, given: Optimizer | None) -> list[Optimizer]:
        """The optimizers, connected with the trainer."""
        strategy, module = self._trainer.strategy, self._module
        default = L.LightningModule.configure_optimizers
        if given is not None:
            shared = {id(p): p for p in module.parameters()}
            strategy.optimizers = [copy.deepcopy(given, shared)]
        elif isinstance(module, L.LightningModule) and (
            type(module).configure_optimizers is not default
        ):
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".*configure_optimizers.*returned `None`")
                    strategy.setup_optimizers(self._trainer)
            except Exception as error:  # the user's own code
                self._fail("optimizer", "configure_optimizers", error)
                return []
        else:
            return []
        found = [o for o in strategy.optimizers if type(o).__name__ != "_MockOptimizer"]
        if not found and module.automatic_optimization:
            text = "configure_optimizers returned None, with which Lightning trains nothing"
            remedy = "Return an optimizer, such as hvpopt.NewtonCG(self.parameters())."
            self._findings.append(Finding("optimizer", "note", text, remedy))
        return found

    def report(self, callbacks: Sequence[L.Callback], seconds: float, seed: int) -> DoctorReport:
        """All findings."""
        subject, module = self._subject, self._module
        loss, grad_norm = self._loss()
        engines, check = Engines((), math.nan, math.nan), ProductCheck(math.nan)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            v = trees.normal_like(subject.params, torch.Generator().manual_seed(seed))
            reference, check = self._reference(v)
            engines = examine_engines(subject, v, reference, seconds=seconds)
            self._findings += examine_determinism(subject)
            self._findings += examine_products(engines.findings, check)
            self._findings += [examine_split(subject), examine_likelihood(subject)]
            for curvature in ("hessian", "ggn"):
                self._findings.append(automatic_choice(subject, curvature))
        if isinstance(module, L.LightningModule):
            optimizers = subject.optimizers
            self._findings += examine_settings(self._trainer, module, optimizers, callbacks)
        if subject.optimizers and not any(f.verdict == "failure" for f in self._findings):
            self._findings.append(try_step(subject))
        return DoctorReport(
            module=type(module).__name__,
            num_params=sum(p.numel() for p in subject.params),
            dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in subject.params})),
            device=str(subject.device),
            optimizer=", ".join(type(o).__name__ for o in subject.optimizers),
            loss=loss,
            grad_norm=grad_norm,
            gradient_seconds=engines.gradient_seconds,
            gradient_bytes=engines.gradient_bytes,
            difference_error=check.difference_error,
            engines=engines.findings,
            findings=tuple(self._findings),
        )

    def _reference(self, v: TensorList) -> tuple[TensorList, ProductCheck]:
        """H v by differences of gradients, in float64 where they are too rough otherwise."""
        subject = self._subject
        found = differences(subject, v)
        check = ProductCheck(found.error)
        if not check.is_rough or all(p.dtype == torch.float64 for p in subject.params):
            return found.product, check
        try:
            double = check_in_double(subject, self._of_batch, self._batch, v)
        except Exception as error:  # of a module that does not run in float64
            return found.product, replace(check, refusal=sentence(error))
        check = ProductCheck(double.reference.error, errors_in_double=double.errors)
        return double.reference.product, check

    def _loss(self) -> tuple[float, float]:
        """The loss and the norm of its gradient; NaN where there is none."""
        subject = self._subject
        step = "training_step" if isinstance(self._module, L.LightningModule) else "the loss"
        try:
            loss, gradient = subject.gradient()
        except Exception as error:  # the user's own code
            self._fail("loss", step, error)
            return math.nan, math.nan
        norm = float(trees.norm(gradient))
        if subject.num_backwards == 0:
            text = f"{step} gave none for this batch, and backward was not called"
            self._findings.append(Finding("loss", "failure", text, "Give another batch."))
        elif not math.isfinite(loss):
            text = f"{loss}: divisions by zero, logarithms of zero, inputs that are not finite?"
            self._findings.append(Finding("loss", "failure", text))
        elif not math.isfinite(norm):
            text = f"{loss:.4g}, and its gradient is not finite: a root or a norm at zero?"
            self._findings.append(Finding("loss", "failure", text))
        elif norm == 0:
            text = f"{loss:.4g}, and its gradient is zero: does it depend on the parameters?"
            self._findings.append(Finding("loss", "warning", text))
        else:
            text = f"{loss:.4g}, the gradient's norm {norm:.4g}"
            self._findings.append(Finding("loss", "ok", text))
        return loss, norm

    def _fail(self, subject: str, what: str, error: Exception) -> None:
        text = f"{what} raised {type(error).__name__}"
        self._findings.append(Finding(subject, "failure", text, one_line(error)))
