"""Second-order optimization for PyTorch: products, optimizers and curvature.

Importing this imports torch alone; Lightning and Hydra load where they are used.
"""

from typing import TYPE_CHECKING, Any

from hvpopt.closure import ClosureOracle
from hvpopt.dual import dual
from hvpopt.linearization import LinearizedClosure
from hvpopt.minimization import MinimizeResult, minimize
from hvpopt.optim.adahessian import AdaHessian
from hvpopt.optim.diagonal import DiagonalReport
from hvpopt.optim.handover import Handover
from hvpopt.optim.newton_cg import NewtonCG
from hvpopt.optim.nys_newton_cg import NysNewtonCG
from hvpopt.optim.report import NewtonCGReport
from hvpopt.optim.smd import SMD, SMDReport
from hvpopt.optim.sophia import SophiaG, SophiaH, SophiaReport
from hvpopt.optim.stages import Stage
from hvpopt.optim.trust_region import TrustRegionNewtonCG

if TYPE_CHECKING:
    from hvpopt.lightning.doctor import doctor as doctor

__all__ = [
    "SMD",
    "AdaHessian",
    "ClosureOracle",
    "DiagonalReport",
    "Handover",
    "LinearizedClosure",
    "MinimizeResult",
    "NewtonCG",
    "NewtonCGReport",
    "NysNewtonCG",
    "SMDReport",
    "SophiaG",
    "SophiaH",
    "SophiaReport",
    "Stage",
    "TrustRegionNewtonCG",
    "dual",
    "minimize",
]


def __getattr__(name: str) -> Any:
    """Loads what needs Lightning where it is used."""
    if name == "doctor":
        from hvpopt.lightning.doctor import doctor

        return doctor
    raise AttributeError(f"module 'hvpopt' has no attribute {name!r}")
