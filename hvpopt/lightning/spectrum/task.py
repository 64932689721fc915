"""The tasks `spectrum` and `compare`: checkpoints to a page, a JSON file and TensorBoard."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from hvpopt.lightning.doctor.report import columns
from hvpopt.lightning.spectrum.boards import log_reports
from hvpopt.lightning.spectrum.figures import check_can_draw, figures
from hvpopt.lightning.spectrum.measurement import measure
from hvpopt.lightning.spectrum.page import page
from hvpopt.lightning.spectrum.reading import estimate, number
from hvpopt.lightning.spectrum.report import Eigenvalue, SpectrumReport, read_json, write_json
from hvpopt.lightning.spectrum.settings import Label, Settings
from hvpopt.lightning.spectrum.subjects import Subject, load_weights, loader_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Task(Settings):
    logger: Logger | None = None
    output_dir: str | Path = "."

    def _measured(self, subject: Subject) -> SpectrumReport:
        check_can_draw()  # before the work
        origin = load_weights(subject.ckpt_path, subject.module)
        path = str(subject.ckpt_path)
        label = Label(
            name=subject.name or path,
            checkpoint=path,
            optimizer=origin.optimizer,
            epoch=origin.epoch,
            step=origin.step,
        )
        data = loader_of(subject.data, self.split)
        report = measure(subject.module, data, label, self, datamodule=subject.data)
        if report.weights:
            log.info("%s: losses of the %s are %s.", report.name, report.data, report.weights)
        return report

    def _write(self, reports: list[SpectrumReport], title: str) -> None:
        folder = Path(self.output_dir)
        file = folder / "spectrum.html"
        pictures = figures(reports)
        file.write_text(page(reports, pictures, title), encoding="utf-8")
        write_json(folder / "spectrum.json", reports)
        log_reports(self.logger, reports, pictures)
        log.info("\n%s\n\n%s", columns(_rows(reports)), columns(self._places(file)))

    def _places(self, file: Path) -> list[list[str]]:
        rows = [["page", str(file)]]
        if isinstance(self.logger, TensorBoardLogger):
            rows.append(["curves", f"tensorboard --logdir {Path(self.logger.log_dir)}"])
        return rows


@dataclass(frozen=True, kw_only=True)
class Spectrum(_Task):
    """The task that reports on one checkpoint; the options are those of `Settings`.

    Calling it writes ``spectrum.html``, ``spectrum.json`` and the logs, and returns the report.

    Args:
        subjects: the one checkpoint, with its module and data.
        logger: gets the numbers, and TensorBoard the figures; None for none.
        output_dir: where the files go.

    Raises:
        ValueError: for an option out of range.

    Calling raises:
        FileNotFoundError, ValueError: if there is not one checkpoint, it cannot be read, or it
            belongs to another network; and as `hvpopt.lightning.spectrum.measurement.measure`.
    """

    subjects: Sequence[Subject]

    def __call__(self) -> SpectrumReport:
        """The report."""
        if len(self.subjects) != 1:
            raise ValueError(
                f"task=spectrum reads one checkpoint, and got {len(self.subjects)}: give one as "
                "ckpt_path=FILE, or several to task=compare."
            )
        report = self._measured(self.subjects[0])
        self._write([report], f"Spectrum of {report.name}")
        return report


@dataclass(frozen=True, kw_only=True)
class Compare(_Task):
    """The task that puts several checkpoints side by side; the options are those of `Settings`.

    Calling it writes the files of `Spectrum`, of one page for all, and returns the reports.

    Args:
        subjects: checkpoints; or paths of the ``spectrum.json`` of earlier runs, whose reports are
            taken as they are.
        logger: gets the numbers, and TensorBoard the figures; None for none.
        output_dir: where the files go.

    Raises:
        ValueError: for an option out of range.

    Calling raises:
        FileNotFoundError, ValueError: if there are fewer than two, and as `Spectrum`.
    """

    subjects: Sequence[Subject | str]

    def __call__(self) -> list[SpectrumReport]:
        """The reports, in the order of the subjects."""
        read = {s: read_json(Path(s)) for s in self.subjects if isinstance(s, str)}
        count = sum(len(read[s]) if isinstance(s, str) else 1 for s in self.subjects)
        if count < 2:
            raise ValueError(
                f"task=compare puts several checkpoints side by side, and got {count}: give at "
                "least two, ckpt_path=[FILE,FILE]."
            )
        reports: list[SpectrumReport] = []
        for subject in self.subjects:
            reports += read[subject] if isinstance(subject, str) else [self._measured(subject)]
        reports = _told_apart(reports)
        self._write(reports, "Spectra side by side")
        return reports


def _told_apart(reports: Sequence[SpectrumReport]) -> list[SpectrumReport]:
    """The reports with a number behind names that came before."""
    counts: dict[str, int] = {}
    renamed = []
    for report in reports:
        counts[report.name] = count = counts.get(report.name, 0) + 1
        renamed.append(replace(report, name=f"{report.name} ({count})") if count > 1 else report)
    return renamed


def _rows(reports: Sequence[SpectrumReport]) -> list[list[str]]:
    """The table for the console, a column a report."""
    rows = [["checkpoint", *(r.name for r in reports)]]
    return [
        *rows,
        ["loss", *(number(r.loss) for r in reports)],
        ["gradient norm", *(number(r.gradient_norm) for r in reports)],
        ["top eigenvalues", *(_first(r.top) for r in reports)],
        ["bottom eigenvalues", *(_first(r.bottom) for r in reports)],
        ["trace", *(estimate(r.trace) for r in reports)],
        ["products", *(str(r.num_products) for r in reports)],
        ["seconds", *(f"{r.seconds:.1f}" for r in reports)],
    ]


def _first(eigenvalues: Sequence[Eigenvalue]) -> str:
    return ", ".join(number(e.value) for e in eigenvalues[:3]) or "–"
