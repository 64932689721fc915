"""What will and will not work, before a run: one batch, looked at from all sides."""

from hvpopt.lightning.doctor.examination import doctor
from hvpopt.lightning.doctor.report import DoctorReport, EngineFinding, Finding
from hvpopt.lightning.doctor.task import CannotTrainError, run

__all__ = ["CannotTrainError", "DoctorReport", "EngineFinding", "Finding", "doctor", "run"]
