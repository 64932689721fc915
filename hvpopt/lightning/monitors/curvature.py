"""The monitor of the loss's curvature."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch

from hvpopt.engines.choice import EngineName
from hvpopt.lightning.monitors.album import Album
from hvpopt.lightning.monitors.base import Monitor, current_step, writers
from hvpopt.lightning.monitors.ledger import Ledger
from hvpopt.lightning.monitors.look import Effort, Look
from hvpopt.lightning.monitors.measures import take
from hvpopt.lightning.monitors.probe import Loss, Probe, SkippedBatchError
from hvpopt.lightning.monitors.schedule import Schedule
from hvpopt.lightning.monitors.stability import StabilityAlert
from hvpopt.options import check_count, check_range

logger = logging.getLogger("hvpopt")


class CurvatureMonitor(Monitor):
    """Logs the curvature of the loss while any optimizer trains, and shows it in TensorBoard.

    At the first and every n-th optimizer step, and when training ends, it measures the Hessian
    (or the Gauss-Newton or Fisher matrix) of the module's own ``training_step`` on a fixed probe,
    as far as the budget allows, and logs under the names that `hvpopt.lightning.callbacks` lists.
    Scalars go to every logger; TensorBoard also gets a custom layout of them, the spectrum as a
    histogram over time and as a picture, a heat map of the layers' traces, and slices of the loss
    along the top eigenvectors. Pictures need matplotlib.

    Training goes on as without it: parameters, gradients, random numbers, buffers, metrics and
    logs are the same to the bit. Under data parallelism the curvature is that of all ranks'
    batches; with accumulation of gradients, that of one micro-batch. From one measurement to the
    next it keeps the probe, and up to four vectors of the parameters' size to start from.

    Args:
        every_n_steps: n, optimizer steps from one measurement to the next.
        metrics: what to measure: "sharpness" (the top eigenvalue, beside the learning rate's
            stability threshold), "trace", "alignment" (of the gradient with the top
            eigenvectors), "spectrum", "layers" (their traces), "layer_sharpness" (their top
            eigenvalues), "slices". As a mapping, with a number k each: at every k-th measurement
            only. By default all but "layer_sharpness", those that cost much less often.
        probe: a batch as the train loader yields it; a loader, of which the first ``num_batches``
            are read and kept; "val" for the trainer's validation loader; by default the first
            training batch.
        budget: the share of the training time that measurements and their pictures may cost; one
            that does not fit waits. The first measurement, and the pictures when training ends,
            are made in any case, and paid for before there is another. None for no limit.
        num_batches: how many batches of a loader.
        curvature: "hessian", "ggn" or "fisher".
        engine: see `hvpopt.closure.ClosureOracle`.
        loss: a function of module and batch, in the place of ``training_step``; under manual
            optimization, where that would step the optimizers, one is needed.
        max_lanczos_steps, rtol: products for an eigenvalue, at most, and its relative tolerance.
        num_probes: random vectors for traces, a product each.
        num_density_probes, density_steps: random vectors for the spectrum, and products for each.
        alert_after: warns after so many measurements in a row in which the sharpness is above the
            stability threshold (`stability.StabilityAlert`); None never.
        prefix: what the names begin with; monitors of one trainer differ in it.
        seed: of the random vectors, the same at every measurement.

    Raises:
        ValueError: for an argument out of range, or an unknown metric.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        metrics: Sequence[str] | Mapping[str, int] | None = None,
        probe: Any = None,
        budget: float | None = 0.05,
        num_batches: int = 1,
        curvature: Literal["hessian", "ggn", "fisher"] = "hessian",
        engine: EngineName = "auto",
        loss: Loss | None = None,
        max_lanczos_steps: int = 20,
        rtol: float = 1e-2,
        num_probes: int = 10,
        num_density_probes: int = 2,
        density_steps: int = 20,
        alert_after: int | None = 3,
        prefix: str = "curvature",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._schedule = Schedule(every_n_steps, metrics, budget)
        self._effort = Effort(
            max_lanczos_steps=check_count("max_lanczos_steps", max_lanczos_steps),
            rtol=check_range("rtol", rtol, 1e-12, 1.0),
            num_probes=check_count("num_probes", num_probes),
            num_density_probes=check_count("num_density_probes", num_density_probes),
            density_steps=check_count("density_steps", density_steps),
            seed=seed,
        )
        self._probe = Probe(
            probe,
            num_batches=check_count("num_batches", num_batches),
            curvature=curvature,
            engine=engine,
            loss=loss,
            seed=seed,
        )
        if not prefix or "/" in prefix or prefix.startswith("optimizer"):
            raise ValueError(
                f"prefix={prefix!r}: expected a word without a slash that does not begin with "
                "'optimizer', as OptimizerMonitor's names do."
            )
        self._prefix = prefix
        self._alert = (
            None if alert_after is None else StabilityAlert(check_count("alert_after", alert_after))
        )
        self._album = Album(prefix)
        self._memory: dict[str, Any] = {}
        self._ledger = Ledger()

    @property
    def state_key(self) -> str:
        """Tells the monitors of a trainer apart in a checkpoint."""
        return self._generate_state_key(prefix=self._prefix)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses what cannot be measured, before training begins; raises as `check`."""
        if stage == "fit":
            self.check(trainer, pl_module)
        self._forget()

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets pass what can be measured in a fit.

        Raises:
            ValueError: for a module under manual optimization, or whose ``training_step`` reads
                its batches itself, without a loss of the monitor's own; for validation batches as
                the probe of a fit without validation.
        """
        self._probe.check(pl_module)
        self._probe.check_source(trainer)

    def try_probe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates the loss on a probe that was given, a batch or a loader; leaves no trace.

        Raises:
            Exception: whatever the module raises for such a batch.
        """
        self._probe.try_out(trainer, pl_module)

    def _forget(self) -> None:
        """Lets go of the module's parameters and of vectors of their size."""
        self._probe.reset()
        self._memory.clear()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock, from where a resumed run had stopped it."""
        self._probe.resume(trainer)
        self._schedule.budget.begin()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the batch, which may become the probe."""
        self._probe.offer(batch, batch_idx)

    def watch(self, trainer: L.Trainer, module: L.LightningModule, was_trained: bool) -> None:
        """Measures, when it is time."""
        if was_trained or not module.automatic_optimization:  # which returns nothing
            self._probe.accept()
        if names := self._schedule.due(trainer):
            self.publish(trainer, self.measure(trainer, module, names))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures once more what fits, draws what has not been drawn, and stops the clock."""
        if names := self._schedule.closing(trainer):
            self.publish(trainer, self.measure(trainer, pl_module, names))
        self._draw(trainer, at_end=True)
        self._schedule.budget.end()
        self._forget()
        super().on_train_end(trainer, pl_module)

    def measure(
        self, trainer: L.Trainer, pl_module: L.LightningModule, names: Sequence[str]
    ) -> dict[str, float]:
        """The scalars of these metrics at the current parameters, by the names for loggers.

        What else is found goes to TensorBoard. Empty where there is no probe yet, or the module
        skips it.
        """
        _synchronize(pl_module.device)
        start = time.perf_counter()
        look = self._look(trainer, pl_module, names)
        if look is None:
            return {}
        self._album.add(look, current_step(trainer), writers(trainer))
        self._warn(trainer, look)
        seconds = time.perf_counter() - start
        rest = seconds - sum(look.seconds.values())
        self._schedule.spend(trainer.global_step, {**look.seconds, "reading": rest})
        seconds += self._draw(trainer)
        found = {name: value for name, value in look.scalars.items() if math.isfinite(value)}
        found.update(
            products=float(look.num_products),
            seconds=seconds,
            time_share=self._schedule.budget.spent_share,
        )
        self._ledger.add(found, look.num_products)
        return {f"{self._prefix}/{name}": value for name, value in found.items()}

    def _look(
        self, trainer: L.Trainer, module: L.LightningModule, names: Sequence[str]
    ) -> Look | None:
        operator = self._probe.operator(trainer, module)
        if operator is None:
            return None
        look = Look(operator, module, trainer.optimizers[0], names, self._effort, self._memory)
        try:
            take(look)
        except SkippedBatchError:
            return None
        finally:
            operator.close()
        return look

    def _warn(self, trainer: L.Trainer, look: Look) -> None:
        if self._alert is not None and look.sharpness is not None:
            line = self._alert(trainer.global_step, look.sharpness)
            if line is not None and trainer.is_global_zero:
                logger.warning(line)

    def _draw(self, trainer: L.Trainer, *, at_end: bool = False) -> float:
        """Draws where there is much new and it fits; returns the seconds that it took."""
        album, budget, start = self._album, self._schedule.budget, time.perf_counter()
        # the first time, importing matplotlib is most of it
        fits = at_end or budget.allows(["pictures"], unknown=1.0)
        if not fits or not album.is_worth_drawing(at_end=at_end):
            return 0.0
        album.draw(writers(trainer), current_step(trainer), at_end=at_end)
        seconds = time.perf_counter() - start
        budget.spend("pictures", seconds)
        return seconds

    def section(self, trainer: L.Trainer) -> str:
        """What was measured last, and what all measurements have cost."""
        num_alerts = 0 if self._alert is None else self._alert.num_alerts
        text = self._ledger.text(self._schedule.budget, num_alerts)
        return f"### Curvature (`{self._prefix}/...`)\n\n{text}" if text else ""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, to be read with ``weights_only=True``."""
        return {
            "schedule": self._schedule.state_dict(),
            "alert": None if self._alert is None else self._alert.state_dict(),
            "album": self._album.state_dict(),
            "probe": self._probe.state_dict(),
            "ledger": self._ledger.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._schedule.load_state_dict(state_dict["schedule"])
        if self._alert is not None and state_dict["alert"] is not None:
            self._alert.load_state_dict(state_dict["alert"])
        self._album.load_state_dict(state_dict["album"])
        self._probe.load_state_dict(state_dict["probe"])
        self._ledger.load_state_dict(state_dict["ledger"])


def _synchronize(device: torch.device) -> None:
    """Waits for what the device has still to do, so that the time is that of the measurement."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
