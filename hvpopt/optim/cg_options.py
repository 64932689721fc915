"""How accurately Newton-CG solves, from where, and how its damping moves: given, or usual."""

from dataclasses import dataclass

from hvpopt.optim.checks import check_stop
from hvpopt.optim.step import Step
from hvpopt.options import check_range
from hvpopt.solvers.stopping import ForcingTerm, RelativeProgress, StoppingRule, Worthwhile


@dataclass(frozen=True)
class CGOptions:
    """What `hvpopt.NewtonCG` was given for these options, with what is usual in place of None.

    Args:
        given_stop, given_start, given_factor: its ``cg_stop``, ``warm_start``, ``damping_factor``.
        plain: whether CG goes without a preconditioner.

    Raises:
        ValueError: for a number out of range, or a stopping rule that is none.
    """

    given_stop: StoppingRule | ForcingTerm | None
    given_start: float | None
    given_factor: float | None
    plain: bool

    def __post_init__(self) -> None:
        check_range("warm_start", self.warm_start, 0.0, 1.0)
        check_range("damping_factor", self.damping_factor, 1.0)
        if self.given_stop is not None:
            check_stop(self.given_stop)

    @property
    def warm_start(self) -> float:
        """What multiple of the last solution CG starts from."""
        usual = 0.95 if self.plain else 0.0
        return usual if self.given_start is None else self.given_start

    @property
    def damping_factor(self) -> float:
        """What λ falls by after a good step."""
        usual = 1.5 if self.plain else 3.0
        return usual if self.given_factor is None else self.given_factor

    @property
    def least_share(self) -> float:
        """The least λ on mini-batches, as a share of the first."""
        return 0.03 if self.plain else 3e-4

    def stop(self, step: Step) -> StoppingRule | ForcingTerm:
        """When CG has done enough at this step.

        `Worthwhile` weighs a product against the rest of a step. That is a run of the closure or
        two, which are cheap beside products, but not where the closure takes derivatives itself.
        """
        if self.given_stop is not None:
            return self.given_stop
        if self.plain:
            return Worthwhile(overhead=12.0) if step.num_batches else RelativeProgress()
        return Worthwhile(overhead=10.0 if step.objective.takes_derivatives else 1.0)
