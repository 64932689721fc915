"""The reports in the loggers: scalars everywhere, histograms and figures in TensorBoard."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from hvpopt.lightning.spectrum.report import SpectrumReport


def log_reports(
    logger: Logger | None, reports: Sequence[SpectrumReport], figures: Mapping[str, Any]
) -> None:
    """Hands reports to a logger, each at its checkpoint's step.

    Scalars are named ``spectrum/...`` (`SpectrumReport.scalars`). TensorBoard also gets the raw
    histogram ``spectrum/eigenvalues`` of all eigenvalues, in which counts are the quadrature's
    weights, and the figures ``spectrum/NAME``. Of several reports each is a run of its own, with
    the figures of all of them side by side in the run above.

    Args:
        logger: None for none.
        reports: at least one.
        figures: of matplotlib, of all reports together, by name.
    """
    if logger is None:
        return
    if not isinstance(logger, TensorBoardLogger):
        for report in reports:
            prefix = f"{report.name}/" if len(reports) > 1 else ""
            scalars = {f"{prefix}{name}": value for name, value in report.scalars().items()}
            logger.log_metrics(scalars, step=report.step)
        return
    folder = Path(logger.log_dir)
    for report in reports:
        with _writer(folder / _file_name(report.name) if len(reports) > 1 else folder) as writer:
            for name, value in report.scalars().items():
                writer.add_scalar(name, value, report.step)
            _add_histogram(writer, report)
    step = max(report.step for report in reports)
    with _writer(folder) as writer:
        for name, figure in figures.items():
            writer.add_figure(f"spectrum/{name}", figure, step, close=False)


@contextmanager
def _writer(folder: Path) -> Iterator[SummaryWriter]:
    writer = SummaryWriter(str(folder))
    try:
        yield writer
    finally:
        writer.close()


def _add_histogram(writer: SummaryWriter, report: SpectrumReport) -> None:
    density, n = report.density, report.num_params
    if not all(map(math.isfinite, density.mass)):
        return
    middles = [(a + b) / 2 for a, b in zip(density.edges[:-1], density.edges[1:], strict=True)]
    counts = [n * share for share in density.mass]
    pairs = list(zip(counts, middles, strict=True))
    writer.add_histogram_raw(
        "spectrum/eigenvalues",
        min=density.edges[0],
        max=density.edges[-1],
        num=sum(counts),
        sum=sum(c * x for c, x in pairs),
        sum_squares=sum(c * x * x for c, x in pairs),
        bucket_limits=list(density.edges[1:]),
        bucket_counts=counts,
        global_step=report.step,
    )


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.=" else "_" for c in name)
