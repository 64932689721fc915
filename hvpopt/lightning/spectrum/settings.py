"""What is measured, and how closely."""

from dataclasses import dataclass
from typing import Literal, get_args

from hvpopt.lightning.spectrum.report import CurvatureKind
from hvpopt.options import check_count, check_range

Split = Literal["train", "val", "test"]
Mode = Literal["eval", "train"]
Weights = Literal["auto", "examples", "sum"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how closely.

    Args:
        curvature: "hessian", "ggn" or "fisher".
        split: whose data, "train", "val" or "test"; the loss is the training step's all the same.
        num_batches: over so many of the first batches; None for all.
        mode: "eval" or "train", which the module is put in. In training mode batch normalisation
            and dropout are as in training, the masks drawn once for each batch.
        weights: how the losses of batches combine: "examples" weighs them by their rows, "sum" adds
            them up, "auto" does what the call of torch's loss function says, or a comparison of a
            batch with its parts, and the report tells which.
        num_top: eigenvalues at the upper end.
        num_bottom: eigenvalues at the lower end, of the Hessian; the others have none below zero.
        max_steps: products for the eigenvalues, at most.
        rtol: relative error at which an eigenvalue is good enough.
        num_probes: products for the traces.
        density_probes: Lanczos runs for the density.
        density_steps: products of each.
        slice_points: points of a slice along an eigenvector; 0 for no slices.
        plane_points: points along each side of the plane; 0 for no plane.
        retain_graphs: keeps the graphs of all batches from product to product, which takes a third
            less time and more memory; None does so where they take at most 1 GiB.
        accelerator: of Lightning, where it is measured.
        progress: shows a bar.
        seed: of the random vectors.

    Raises:
        ValueError: for an argument out of range.
    """

    curvature: CurvatureKind = "hessian"
    split: Split = "train"
    num_batches: int | None = None
    mode: Mode = "eval"
    weights: Weights = "auto"
    num_top: int = 6
    num_bottom: int = 2
    max_steps: int = 100
    rtol: float = 1e-2
    num_probes: int = 10
    density_probes: int = 2
    density_steps: int = 20
    slice_points: int = 15
    plane_points: int = 11
    retain_graphs: bool | None = None
    accelerator: str = "auto"
    progress: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"curvature": CurvatureKind, "split": Split, "mode": Mode, "weights": Weights}
        for name, options in ((name, get_args(kind)) for name, kind in choices.items()):
            if getattr(self, name) not in options:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown: choose one of "
                    f"{', '.join(map(repr, options))}."
                )
        counts = ("num_top", "max_steps", "num_probes", "density_probes", "density_steps")
        for name in (*counts, *(["num_batches"] if self.num_batches is not None else [])):
            check_count(name, getattr(self, name))
        for name in ("num_bottom", "slice_points", "plane_points"):
            check_range(name, getattr(self, name), 0)
        check_range("rtol", self.rtol, 1e-12, 1.0)
        if self.max_steps < max(self.num_top, self.num_bottom):
            raise ValueError(
                f"max_steps={self.max_steps} products cannot give {self.num_top} eigenvalues at "
                f"the top and {self.num_bottom} at the bottom: set it to more."
            )


@dataclass(frozen=True)
class Label:
    """What a report says of where it comes from; the names are those of `SpectrumReport`."""

    name: str
    checkpoint: str = ""
    optimizer: str = ""
    epoch: int = 0
    step: int = 0
