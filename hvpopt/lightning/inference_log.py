"""Figures and a plot of an inference, for loggers."""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from hvpopt.nested.adjoints import AdjointReport
from hvpopt.nested.inference import Inference
from hvpopt.nested.status import InferenceStatus

__all__ = ["adjoint_figures", "inference_figures", "plot_energies"]


def inference_figures(inference: Inference, *, prefix: str = "inference") -> dict[str, float]:
    """Means over the batch of steps, residual and energy, the fractions that converged and
    diverged, and the gradient evaluations, by name."""
    figures = {
        "steps": float(inference.steps.float().mean()),
        "residual": float(inference.residuals.mean()),
        "energy": float(inference.energies.mean()),
        "converged": inference.fraction(InferenceStatus.CONVERGED),
        "diverged": inference.fraction(InferenceStatus.DIVERGED),
        "gradients": float(inference.num_gradients),
        "row_gradients": float(inference.num_rows),
    }
    return {f"{prefix}/{name}": value for name, value in figures.items()}


def adjoint_figures(report: AdjointReport) -> dict[str, float]:
    """The products of an adjoint, and the mean residual of its linear solve where there is one."""
    figures = {"adjoint/products": float(report.num_products)}
    if report.residuals is not None:
        figures["adjoint/residual"] = float(report.residuals.mean())
    return figures if report.num_products else {}


def plot_energies(inference: Inference, trainer: lightning.Trainer) -> None:
    """Plots energies along the steps of an inference, relative to the last: the median over the
    batch and its quartiles. To TensorBoard, where the trainer logs there."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    path = _above_last(inference.energy_path)
    if not loggers or not trainer.is_global_zero or path.numel() == 0:
        return
    from matplotlib.figure import Figure

    low, middle, high = torch.quantile(path, torch.tensor([0.25, 0.5, 0.75]), dim=1).tolist()
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(range(len(low)), low, high, alpha=0.3, linewidth=0)
    axes.plot(middle)
    axes.set(xlabel="step of inference", ylabel="energy above the last")
    axes.set_yscale("symlog", linthresh=1e-2)
    for logger in loggers:
        logger.experiment.add_figure("val/energy_path", figure, trainer.global_step)


def _above_last(path: Tensor) -> Tensor:
    """Energies less those of the last step, of the rows that stayed finite."""
    path = path.detach().float().cpu()
    path = path[:, path.isfinite().all(0)]
    return path - path[-1]
