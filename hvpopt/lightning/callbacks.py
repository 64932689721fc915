"""Lightning callbacks that show what an optimizer does and how the loss is curved."""

import time
from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map

from hvpopt.closure import ClosureOracle
from hvpopt.curvature.trace import trace
from hvpopt.engines.choice import EngineChoice, EngineName
from hvpopt.optim.report import StepReport
from hvpopt.options import check_range
from hvpopt.solvers.lanczos import top_eigenpairs


def _log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Hands the metrics to every logger, at the step of Lightning's own monitors."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


class OptimizerMonitor(L.Callback):
    """Logs every step's report of hvpopt's optimizers as ``optimizer/NAME``, to all loggers.

    The figures that matter most (damping and CG steps of Newton-CG) also show in the progress
    bar. Each kind of failed step is warned of once, with its sentence. Optimizers without a
    report are left alone.
    """

    def __init__(self) -> None:
        self._logged: dict[int, StepReport] = {}
        self._warned: set[str] = set()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs the reports of the steps that this batch ended."""
        for index, optimizer in enumerate(trainer.optimizers):
            report = getattr(optimizer, "last_report", None)
            if not isinstance(report, StepReport) or self._logged.get(index) is report:
                continue
            self._logged[index] = report
            prefix = "optimizer" if len(trainer.optimizers) == 1 else f"optimizer_{index}"
            metrics = report.metrics()
            _log(trainer, {f"{prefix}/{name}": value for name, value in metrics.items()})
            for name in report.progress_fields:
                if name in metrics:
                    pl_module.log(name, metrics[name], prog_bar=True, logger=False, on_step=True)
            if report.outcome.failed and report.outcome.name not in self._warned:
                self._warned.add(report.outcome.name)
                rank_zero_warn(f"Step {trainer.global_step} failed. {report.outcome.value}")


class CurvatureMonitor(L.Callback):
    """Logs the top eigenvalue and the trace of the Hessian while any optimizer trains.

    Every ``every_n_steps`` optimizer steps, on a fixed probe batch, in training mode, it logs

        curvature/top_eigenvalue   the largest eigenvalue (Lanczos),
        curvature/trace            Hutchinson's estimate, with curvature/trace_standard_error,
        curvature/products, curvature/seconds   what the measurement cost.

    Training goes on as without it: gradients, random numbers, buffers, metrics and logs stay.

    Args:
        every_n_steps: optimizer steps from one measurement to the next; the first step is one.
        max_lanczos_steps: at most so many products for the eigenvalue.
        num_probes: products for the trace.
        rtol: relative tolerance of the eigenvalue.
        probe: a batch as the train loader yields it; the first training batch by default.
        engine: see `hvpopt.closure.ClosureOracle`.
        seed: of the random vectors, the same at every measurement.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        max_lanczos_steps: int = 20,
        num_probes: int = 10,
        rtol: float = 1e-2,
        probe: Any = None,
        engine: EngineName = "auto",
        seed: int = 0,
    ) -> None:
        self._every = int(check_range("every_n_steps", every_n_steps, 1))
        self._max_lanczos_steps = int(check_range("max_lanczos_steps", max_lanczos_steps, 1))
        self._num_probes = int(check_range("num_probes", num_probes, 1))
        self._rtol = check_range("rtol", rtol, 1e-12, 1.0)
        self._probe = self._candidate = probe
        self._batch_idx = 0
        self._on_device = False
        self._choice = EngineChoice(engine)
        self._seed = seed
        self._last_step = -1

    @property
    def state_key(self) -> str:
        """Tells monitors of different intervals apart in a checkpoint."""
        return self._generate_state_key(every_n_steps=self._every)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses manual optimization before training begins.

        Raises:
            ValueError: for a module under manual optimization.
        """
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"CurvatureMonitor evaluates {type(pl_module).__name__}.training_step on a probe "
                "batch, but under manual optimization that would step the optimizers: remove the "
                "monitor, or set automatic_optimization = True."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Takes the first batch that is not skipped as the probe, where none was given."""
        if self._probe is None:
            self._candidate, self._batch_idx = tree_map(_cloned, batch), batch_idx

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measures, when it is time."""
        if self._probe is None:
            if not outputs:  # training_step returned None
                return
            self._probe, self._on_device = self._candidate, True
        step = trainer.global_step
        due = step == 1 or step % self._every == 0
        if step == 0 or not due or step == self._last_step:
            return
        self._last_step = step
        if not self._on_device:
            self._probe = trainer.strategy.batch_to_device(self._probe)
            self._on_device = True
        _log(trainer, self.measure(trainer, pl_module))

    def measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """The figures at the current parameters, by the names under which they are logged."""
        start = time.perf_counter()
        params = [p for p in pl_module.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(self._seed)

        closure = partial(
            _backward_of_training_step, pl_module, trainer, (self._probe, self._batch_idx)
        )
        with ClosureOracle(closure, params, engine=self._choice, leave_no_trace=True) as oracle:
            point = oracle.trace("hessian")
            pairs = top_eigenpairs(
                point.product,
                params,
                max_steps=self._max_lanczos_steps,
                rtol=self._rtol,
                generator=generator,
            )
            estimate = trace(
                point.product, params, num_probes=self._num_probes, generator=generator
            )
            return {
                "curvature/top_eigenvalue": float(pairs.values[0]),
                "curvature/trace": estimate.value,
                "curvature/trace_standard_error": estimate.standard_error,
                "curvature/products": float(oracle.num_products),
                "curvature/seconds": time.perf_counter() - start,
            }


def _backward_of_training_step(
    pl_module: L.LightningModule, trainer: L.Trainer, arguments: tuple[Any, int]
) -> Tensor:
    """A run of the module on a batch and its index, scaled as in Lightning's own closure."""
    accepted = len(signature(pl_module.training_step).parameters)
    output: Any = trainer.strategy.training_step(*arguments[:accepted])
    loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
    loss = loss / trainer.accumulate_grad_batches
    loss.backward()
    return loss


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
