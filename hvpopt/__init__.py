"""Second-order optimization for PyTorch: products, optimizers and curvature.

Importing this imports torch alone; Lightning and Hydra load where they are used.
"""

from hvpopt.closure import ClosureOracle
from hvpopt.dual import dual
from hvpopt.linearization import LinearizedClosure
from hvpopt.minimization import MinimizeResult, minimize
from hvpopt.optim.newton_cg import NewtonCG
from hvpopt.optim.report import NewtonCGReport
from hvpopt.optim.smd import SMD, SMDReport
from hvpopt.optim.trust_region import TrustRegionNewtonCG

__all__ = [
    "SMD",
    "ClosureOracle",
    "LinearizedClosure",
    "MinimizeResult",
    "NewtonCG",
    "NewtonCGReport",
    "SMDReport",
    "TrustRegionNewtonCG",
    "dual",
    "minimize",
]
