"""The curvature at a checkpoint as a report: a page with pictures, numbers, TensorBoard entries."""

from hvpopt.lightning.spectrum.measurement import measure
from hvpopt.lightning.spectrum.report import SpectrumReport, read_json, write_json
from hvpopt.lightning.spectrum.settings import Label, Settings
from hvpopt.lightning.spectrum.subjects import Subject
from hvpopt.lightning.spectrum.task import Compare, Spectrum

__all__ = [
    "Compare",
    "Label",
    "Settings",
    "Spectrum",
    "SpectrumReport",
    "Subject",
    "measure",
    "read_json",
    "write_json",
]
