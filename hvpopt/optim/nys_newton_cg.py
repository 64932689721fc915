"""Newton-CG with a Nyström preconditioner, for physics-informed networks."""

from typing import Any

from hvpopt.engines.choice import EngineName
from hvpopt.optim.newton_cg import NewtonCG
from hvpopt.preconditioners.nystrom import Nystrom
from hvpopt.solvers.stopping import RelativeProgress


class NysNewtonCG(NewtonCG):
    """`NewtonCG` as Rathore et al. (2024) end the training of a physics-informed network with it.

    On the Hessian, with a fixed damping and a Nyström preconditioner, after Adam and L-BFGS have
    come near a minimum (`hvpopt.Handover`). Where the Hessian is far from positive definite, at
    the start, `NewtonCG` as it is gets on faster.

    Args:
        params: parameters, named parameters, or groups.
        lr: multiple of the Newton direction that is tried first.
        damping: λ, fixed; the source tries 1e-5 to 1e-1.
        weight_decay: wd, in the loss's units.
        rank: of the preconditioner.
        every: steps from one sketch to the next.
        max_cg_steps: at most so many products a step.
        seed: of the sketches.
        engine: see `hvpopt.closure.ClosureOracle`.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for complex, integer or sparse parameters.

    Source: Rathore, Lei, Frangella, Lu and Udell, "Challenges in training PINNs: a loss landscape
    perspective" (ICML 2024), algorithm 4 and appendix E. It stops CG by its residual; here Martens'
    rule does.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        damping: float = 1e-2,
        weight_decay: float = 0.0,
        *,
        rank: int = 60,
        every: int = 20,
        max_cg_steps: int = 1000,
        seed: int = 0,
        engine: EngineName = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            damping,
            weight_decay,
            curvature="hessian",
            preconditioner=Nystrom(rank=rank, every=every),
            max_cg_steps=max_cg_steps,
            cg_stop=RelativeProgress(),
            momentum=0.0,
            damping_factor=1.0,
            sufficient_decrease=0.1,
            backtracking=0.5,
            seed=seed,
            engine=engine,
        )
