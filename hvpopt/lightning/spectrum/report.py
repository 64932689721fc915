"""What was measured at a checkpoint, as plain numbers that JSON holds."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CurvatureKind = Literal["hessian", "ggn", "fisher"]
FORMAT = "hvpopt.spectrum/1"


@dataclass(frozen=True)
class Eigenvalue:
    """One eigenvalue."""

    value: float
    """Of the curvature of the loss over all data."""
    residual_bound: float
    """‖C v − λ v‖: an exact eigenvalue lies within so much."""
    cosine: float
    """Of its vector with the gradient; the sign of the vector is such that it is not negative."""


@dataclass(frozen=True)
class Estimate:
    """A random estimate."""

    value: float
    """The mean over the probes."""
    standard_error: float
    """Of that mean."""


@dataclass(frozen=True)
class LayerTrace:
    """The trace of one layer's diagonal block."""

    name: str
    """As in ``named_modules``."""
    num_params: int
    """Its entries."""
    trace: Estimate
    """Of its block."""


@dataclass(frozen=True)
class Density:
    """The spectral density, smoothed by a Gaussian."""

    grid: tuple[float, ...]
    """Eigenvalues at which it is given."""
    values: tuple[float, ...]
    """The density there, of integral 1."""
    spread: tuple[float, ...]
    """Its standard error over the probes."""
    sigma: float
    """The Gaussian's standard deviation."""
    edges: tuple[float, ...]
    """Of a histogram of the quadrature's nodes, unsmoothed."""
    mass: tuple[float, ...]
    """In each of its bins, of sum 1."""


@dataclass(frozen=True)
class Slice:
    """The loss along one eigenvector through the checkpoint."""

    label: str
    """Which eigenvector."""
    eigenvalue: float
    """Its curvature, for the quadratic model."""
    slope: float
    """The gradient along it."""
    distances: tuple[float, ...]
    """From the checkpoint, in the parameters' units."""
    losses: tuple[float, ...]
    """There."""


@dataclass(frozen=True)
class Plane:
    """The loss on the plane of the two top eigenvectors through the checkpoint."""

    across: tuple[float, ...]
    """Distances along the first."""
    up: tuple[float, ...]
    """Distances along the second."""
    losses: tuple[tuple[float, ...], ...]
    """Row i, column j: at ``across[i]``, ``up[j]``."""


@dataclass(frozen=True)
class SpectrumReport:
    """The curvature of a loss at one checkpoint."""

    name: str
    """What the checkpoint is called."""
    checkpoint: str
    """Its file."""
    module: str
    """The module's class."""
    optimizer: str
    """That trained it; empty where the checkpoint does not say."""
    epoch: int
    """Epochs behind it."""
    step: int
    """Optimizer steps behind it."""
    curvature: CurvatureKind
    """The matrix."""
    data: str
    """Over what: the loader and how much of it."""
    mode: str
    """"eval" or "train", of the module."""
    num_params: int
    """Entries of the parameters."""
    loss: float
    """Over all data."""
    gradient_norm: float
    """Of its gradient."""
    top: tuple[Eigenvalue, ...]
    """Largest first."""
    bottom: tuple[Eigenvalue, ...]
    """Smallest first; of the Hessian alone."""
    trace: Estimate
    """Of the whole matrix."""
    layers: tuple[LayerTrace, ...]
    """In the module's order."""
    density: Density
    """Of all eigenvalues."""
    negative_share: Estimate
    """Of eigenvalues below zero by more than the Gaussian's width."""
    slices: tuple[Slice, ...]
    """Empty where none were asked for."""
    plane: Plane | None
    """None where none was asked for."""
    num_products: int
    """Products with the matrix, each over all of the data."""
    num_evaluations: int
    """Of the loss, each over all of the data."""
    seconds: float
    """That the measurement took."""
    weights: str = ""
    """How the losses of batches combine; empty where a report does not say."""

    @property
    def largest_stable_lr(self) -> float:
        """2 / λ₁, above which gradient descent leaves a quadratic minimum; ∞ where λ₁ ≤ 0."""
        return 2 / self.top[0].value if self.top[0].value > 0 else math.inf

    def scalars(self) -> dict[str, float]:
        """The finite numbers by the names under which loggers get them."""
        values = {
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "trace": self.trace.value,
            "trace_standard_error": self.trace.standard_error,
            "negative_share": self.negative_share.value,
            "largest_stable_lr": self.largest_stable_lr,
            "products": float(self.num_products),
            "seconds": self.seconds,
            **{f"top_eigenvalue/{i}": e.value for i, e in enumerate(self.top, 1)},
            **{f"bottom_eigenvalue/{i}": e.value for i, e in enumerate(self.bottom, 1)},
            **{f"trace_of_layer/{layer.name}": layer.trace.value for layer in self.layers},
        }
        return {f"spectrum/{k}": v for k, v in values.items() if math.isfinite(v)}


def write_json(path: Path, reports: Sequence[SpectrumReport]) -> None:
    """Writes the reports; numbers that are not finite, which JSON lacks, as strings."""
    content = {"format": FORMAT, "reports": [_plain(dataclasses.asdict(r)) for r in reports]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> list[SpectrumReport]:
    """The reports in a file that `write_json` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path={path}: there is no such file.")
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        return [_report(entry) for entry in content["reports"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"ckpt_path={path} is no report of task=spectrum: {type(error).__name__} {error}."
        ) from error


def _report(entry: dict[str, Any]) -> SpectrumReport:
    fields = _numbers(entry)
    plane = fields["plane"]
    return SpectrumReport(
        **{
            **fields,
            "top": tuple(Eigenvalue(**e) for e in fields["top"]),
            "bottom": tuple(Eigenvalue(**e) for e in fields["bottom"]),
            "trace": Estimate(**fields["trace"]),
            "layers": tuple(
                LayerTrace(**{**e, "trace": Estimate(**e["trace"])}) for e in fields["layers"]
            ),
            "density": Density(**fields["density"]),
            "negative_share": Estimate(**fields["negative_share"]),
            "slices": tuple(Slice(**e) for e in fields["slices"]),
            "plane": None if plane is None else Plane(**plane),
        }
    )


_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """What `_plain` took apart: tuples, and numbers that are not finite."""
    if isinstance(value, dict):
        texts = ("name", "checkpoint", "label")
        return {k: v if k in texts else _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_numbers(item) for item in value)
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
