"""What a minimisation returns, and the ways it may end."""

from dataclasses import dataclass
from enum import Enum

from hvpopt.pytrees import Tree


class Ending(Enum):
    """How a minimisation ended: SciPy-like number, and the sentence to show to a reader."""

    CONVERGED = (0, "converged: the gradient is as small as was asked for")
    ROUNDING = (
        0,
        "converged: what the quadratic model still promises is below the rounding error of f",
    )
    ITERATION_LIMIT = (1, "stopped at max_iter iterations before the gradient was small enough")
    STALLED = (
        2,
        "stalled: no step decreases f although the gradient is not small; f or its gradient may "
        "be inaccurate, or not smooth here",
    )
    NOT_FINITE = (3, "broke down: f, its gradient or a Hessian product is NaN or infinite")
    UNBOUNDED = (4, "f seems unbounded below: it goes on falling however long the step is")
    SADDLE = (
        5,
        "stopped at a saddle point or maximum: the Hessian has a negative eigenvalue, but no "
        "step along its eigenvector decreases f beyond rounding",
    )
    PRODUCT_LIMIT = (6, "stopped at max_products Hessian products")
    RUNNING = (7, "in progress")
    STOPPED = (99, "stopped by the callback")

    @property
    def code(self) -> int:
        """SciPy's ``status``: 0 for success."""
        return self.value[0]

    @property
    def sentence(self) -> str:
        """SciPy's ``message``."""
        return self.value[1]


@dataclass(frozen=True)
class MinimizeResult:
    """The outcome of `minimize`, with the names of SciPy's ``OptimizeResult``."""

    x: Tree
    """The point, in the structure, shapes and dtypes of x0; detached."""
    fun: float
    """f(x)."""
    jac: Tree
    """∇f(x), like x."""
    success: bool
    """Whether x is a minimum to the tolerance asked for; never at a stall, nor at
    a saddle that Lanczos, or a look along directions without curvature, finds."""
    status: int
    """0 for success, else why not, as a number."""
    message: str
    """The same in a sentence."""
    nit: int
    """Iterations: points whose gradient and Hessian were used for a step that was taken."""
    nfev: int
    """Evaluations of f, those for gradients included."""
    njev: int
    """Evaluations of ∇f."""
    nhev: int
    """Products with ∇²f, those of the eigenvalue included."""
    min_eigenvalue: float | None = None
    """An upper bound of the Hessian's least eigenvalue at x, from Lanczos; None where it was not
    looked at."""
