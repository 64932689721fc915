"""Which of Lightning's settings clash with second-order steps."""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch.optim import Optimizer

from hvpopt.engines.ranks import FSDP
from hvpopt.lightning.callbacks import CurvatureMonitor
from hvpopt.lightning.doctor.looking import one_line
from hvpopt.lightning.doctor.report import Finding, Verdict
from hvpopt.optim.base import ClosureOptimizer

_HALF = (
    "Lightning then runs the closure itself and scales the loss, so that the optimizer has none to "
    "take products from"
)


def examine_settings(
    trainer: L.Trainer,
    module: L.LightningModule,
    optimizers: Sequence[Optimizer],
    callbacks: Sequence[L.Callback],
) -> list[Finding]:
    """What of the Trainer's settings matters, worst first; one line if nothing does.

    Args:
        trainer: as given.
        module: what it is to train.
        optimizers: those that the module configures, as far as known.
        callbacks: the trainer's, of which it has none while it is silent.
    """
    needs_closure = [o for o in optimizers if isinstance(o, ClosureOptimizer)]
    name = type(needs_closure[0]).__name__ if needs_closure else ""
    findings = [
        *_precision(trainer, name),
        *_strategy(trainer, name),
        *_optimization(trainer, module, optimizers, name),
        *_clipping(trainer, module, name),
        *_accumulation(trainer, callbacks, name),
        *_callbacks(trainer, callbacks, module),
    ]
    order: list[Verdict] = ["failure", "warning", "note", "ok"]
    if not findings:
        return [Finding("Lightning's settings", "ok", "nothing that clashes")]
    return sorted(findings, key=lambda f: order.index(f.verdict))


def _precision(trainer: L.Trainer, name: str) -> Iterator[Finding]:
    precision = str(trainer.precision)
    if precision == "16-mixed":
        verdict: Verdict = "failure" if name else "warning"
        who = f"{name} gets no closure" if name else "an optimizer of hvpopt would get no closure"
        yield Finding(
            "precision", verdict, f"16-mixed: {who}. {_HALF}", "Use bf16-mixed or 32-true."
        )
    elif precision in ("16-true", "transformer-engine", "transformer-engine-float16"):
        yield Finding(
            "precision",
            "warning",
            f"{precision}: curvature products overflow and underflow where gradients do not",
            "Use bf16-mixed or 32-true.",
        )
    elif precision.startswith("bf16"):
        yield Finding(
            "precision", "note", f"{precision}: products carry two to three digits, CG still works"
        )


def _strategy(trainer: L.Trainer, name: str) -> Iterator[Finding]:
    strategy = trainer.strategy
    kinds = {kind.__name__ for kind in type(strategy).__mro__}
    if kinds & {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}:
        verdict: Verdict = "failure" if name else "warning"
        yield Finding("strategy", verdict, type(strategy).__name__, FSDP)
        return
    options: dict[str, Any] = getattr(strategy, "_ddp_kwargs", {})
    for option in ("find_unused_parameters", "static_graph"):
        if options.get(option):
            yield Finding(
                "strategy",
                "warning",
                f"DDP with {option}=True: products by the dual engine raise",
                f"Drop {option}, or choose engine='graph'.",
            )
    if trainer.world_size > 1:
        yield Finding(
            "strategy",
            "note",
            f"{type(strategy).__name__} on {trainer.world_size} processes, of which one was looked "
            "at; products are averaged over them",
        )


def _optimization(
    trainer: L.Trainer, module: L.LightningModule, optimizers: Sequence[Optimizer], name: str
) -> Iterator[Finding]:
    if len(optimizers) > 1:
        yield Finding(
            "optimizers",
            "note",
            f"{len(optimizers)} optimizers: engines and products were looked at with the sum of "
            "the losses, by the first one's parameters",
        )
    if not module.automatic_optimization:
        yield Finding(
            "optimization",
            "note",
            "manual: the module steps its optimizers itself",
            "Give them a closure that computes the loss, clears the gradients, calls "
            "self.manual_backward and returns the loss: optimizer.step(closure=closure)."
            if name
            else "",
        )
    if name and type(module).optimizer_step is not L.LightningModule.optimizer_step:
        yield Finding(
            "optimizer_step",
            "note",
            f"{type(module).__name__} overrides optimizer_step, which must hand on its closure",
        )


def _accumulation(
    trainer: L.Trainer, callbacks: Sequence[L.Callback], name: str
) -> Iterator[Finding]:
    micro_batches = trainer.accumulate_grad_batches
    scheduled = any(isinstance(c, GradientAccumulationScheduler) for c in callbacks)
    if name and (micro_batches > 1 or scheduled):
        how_many = "scheduled" if scheduled else f"over {micro_batches} micro-batches"
        yield Finding(
            "accumulation",
            "note",
            f"{how_many}: the gradient is of all micro-batches, the curvature of the last",
        )


def _clipping(trainer: L.Trainer, module: L.LightningModule, name: str) -> Iterator[Finding]:
    if not name:
        return
    hook = L.LightningModule.configure_gradient_clipping
    if trainer.gradient_clip_val:
        text = f"gradient_clip_val={trainer.gradient_clip_val} clips the gradient"
    elif type(module).configure_gradient_clipping is not hook:
        text = f"{type(module).__name__} overrides configure_gradient_clipping"
    else:
        return
    yield Finding(
        "clipping",
        "warning",
        f"{text}, and not the curvature: {name} then takes steps that are too short",
        "Leave it out: damping and line search bound the step.",
    )


def _callbacks(
    trainer: L.Trainer, callbacks: Sequence[L.Callback], module: L.LightningModule
) -> Iterator[Finding]:
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            yield Finding(
                "callbacks",
                "note",
                "StochasticWeightAveraging: batch-norm statistics of its average are made anew at "
                "the end",
            )
        if isinstance(callback, CurvatureMonitor):
            yield from _monitor(trainer, callback, module)


def _monitor(
    trainer: L.Trainer, monitor: CurvatureMonitor, module: L.LightningModule
) -> Iterator[Finding]:
    try:
        monitor.check(trainer, module)
    except ValueError as error:
        yield Finding("callbacks", "failure", "CurvatureMonitor refuses the fit", str(error))
        return
    try:
        monitor.try_probe(trainer, module)
    except Exception as error:  # the module's own words for the batch
        text = f"CurvatureMonitor's probe: its loss raised {type(error).__name__}"
        remedy = f"{one_line(error)} Give batches as the train loader yields them."
        yield Finding("callbacks", "failure", text, remedy)
