"""One optimizer step, as training would make it, and back."""

import math

import lightning as L

from hvpopt import trees
from hvpopt.lightning.doctor.looking import chosen_engines, messages, one_line
from hvpopt.lightning.doctor.report import Finding
from hvpopt.lightning.doctor.subject import Subject
from hvpopt.optim.report import StepReport


def try_step(subject: Subject) -> Finding:
    """Whether the optimizer makes a step; parameters and everything else go back afterwards.

    A LightningModule's goes through its own ``optimizer_step`` and the trainer's precision, so
    that what training would meet there is met here.
    """
    optimizer = subject.optimizers[0]
    title, name = "one step", type(optimizer).__name__
    start = trees.clone(subject.params)
    with messages() as heard, subject.world.further_run():
        try:
            _step(subject)
            moved = float(trees.norm(trees.add(trees.clone(subject.params), start, -1.0)))
        except Exception as error:  # whatever training would end with
            text = f"{name} raised {type(error).__name__}"
            return Finding(title, "failure", text, one_line(error))
        finally:
            trees.copy_(subject.params, start)
    report = getattr(optimizer, "last_report", None)
    chosen = chosen_engines(heard)
    if not math.isfinite(moved):
        text = f"{name} moved the parameters to where they are not finite"
        return Finding(title, "failure", text, "Lower the learning rate.")
    if not isinstance(report, StepReport):
        return Finding(title, "ok", f"{name} moved the parameters by {moved:.2g}")
    engine = f" by engine {chosen}" if chosen else ""
    counts = f"{report.num_products} products{engine}, {report.num_closure_runs} closure runs"
    text = f"{name}: {counts}; parameters moved by {moved:.2g}"
    if report.outcome.failed:
        return Finding(title, "failure", f"{name}: {counts}", report.outcome.value)
    if moved == 0:
        text = f"{name}: {counts}. {report.outcome.value}"
    return Finding(title, "ok", text)


def _step(subject: Subject) -> None:
    module, trainer = subject.module, subject.trainer
    if not isinstance(module, L.LightningModule):
        subject.optimizers[0].step(subject.closure)  # type: ignore[arg-type]
    elif subject.is_manual:
        subject.loss()
    else:
        (optimizer,) = trainer.strategy._lightning_optimizers
        module.optimizer_step(trainer.current_epoch, 0, optimizer, subject.closure)
