"""Races of optimizers at equal wall-clock: ``hvpopt task=race race=digits``.

A `Race` (`race.py`) builds equal problems of its task (`pinn.py`, `fits.py`, `autoencoder.py`,
`adding.py`, `streams.py`) for all contestants (`contestants.py`), tunes those that have a grid,
lets them run in turns (`turns.py`), and writes a table, JSON and curves (`report.py`, `plots.py`).
A `ClassicalRace` (`classical.py`) counts iterations on classical functions instead.
"""

from .adding import Adding
from .autoencoder import Autoencoder
from .classical import ClassicalRace
from .fits import DigitsMLP, LogisticRegression, Regression
from .pinn import Pinn
from .race import Race, run
from .streams import DriftingDigits, FourRegions

__all__ = [
    "Adding",
    "Autoencoder",
    "ClassicalRace",
    "DigitsMLP",
    "DriftingDigits",
    "FourRegions",
    "LogisticRegression",
    "Pinn",
    "Race",
    "Regression",
    "run",
]
