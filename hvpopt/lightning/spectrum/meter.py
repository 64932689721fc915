"""Counts the passes over the data, and shows them in a bar."""

from collections.abc import Sequence

from torch import Tensor
from tqdm import tqdm

from hvpopt.lightning.spectrum.losses import Losses
from hvpopt.lightning.spectrum.settings import Settings
from hvpopt.operators import CurvatureOperator, LinearOperator
from hvpopt.trees import TensorList


class Meter:
    """Counts the passes over the data, and shows them.

    Args:
        operator: whose products are counted.
        losses: which are counted, too.
        settings: which say what is planned.
        name: of what is measured.

    Attributes:
        num_products: with the matrix so far.
        num_evaluations: of the loss so far.
    """

    def __init__(
        self, operator: CurvatureOperator, losses: Losses, settings: Settings, name: str
    ) -> None:
        self._operator, self._losses = operator, losses
        self.num_products = self.num_evaluations = 0
        s = settings
        num_slices = 2 + (s.curvature == "hessian") if s.slice_points else 0
        self._planned = {
            "eigenvalues": s.max_steps,
            "traces": s.num_probes,
            "density": s.density_probes * s.density_steps,
            "slices": num_slices * s.slice_points,
            "plane": s.plane_points**2,
        }
        total = sum(self._planned.values())
        self._bar = tqdm(total=total, leave=False, disable=not s.progress)
        self._name = name
        self._done = 0

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()

    def begin(self, phase: str) -> None:
        """What is planned before a phase is done, or was not needed."""
        phases = list(self._planned)
        done = sum(self._planned[p] for p in phases[: phases.index(phase)])
        self._bar.set_description(f"{self._name}: {phase}")
        self._bar.update(done - self._bar.n)

    def matrix(self) -> LinearOperator:
        """The operator, with its products counted."""

        def matvec(v: TensorList) -> TensorList:
            self.num_products += 1
            self._bar.update()
            return self._operator.matvec(v)

        def matmat(vs: TensorList) -> TensorList:
            self.num_products += len(vs[0])
            self._bar.update(len(vs[0]))
            return self._operator.matmat(vs)

        return LinearOperator(self._operator.like, matvec, matmat=matmat)

    def loss(self, _: Sequence[Tensor]) -> Tensor:
        """The loss where the parameters are."""
        self.num_evaluations += 1
        self._bar.update()
        return self._losses()
