"""The growth of a Krylov basis until the Ritz pairs at the spectrum's ends are accurate."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hvpopt.solvers.krylov import KrylovBasis, Ritz
from hvpopt.solvers.result import Status
from hvpopt.solvers.rows import Rows
from hvpopt.trees import TensorList


@dataclass(frozen=True)
class Ends:
    """How many pairs are sought at the ends of the spectrum."""

    num_top: int
    """Of the largest values."""
    num_bottom: int
    """Of the smallest."""

    @property
    def count(self) -> int:
        """Both."""
        return self.num_top + self.num_bottom

    def wanted(self, ritz: Ritz) -> tuple[list[int], list[int]]:
        """The indices of the largest Ritz values and of the smallest, the extreme one first."""
        m = len(ritz.values)
        top = [m - 1 - i for i in range(min(m, self.num_top))]
        return top, list(range(min(m, self.num_bottom)))

    def nearest(self, ritz: Ritz, count: int) -> list[int]:
        """The indices of so many Ritz values as are nearest to the ends that are sought."""
        extra = count - self.count
        at_top = self.num_top + (extra * self.num_top) // self.count
        top, bottom = Ends(at_top, count - at_top).wanted(ritz)
        return sorted({*top, *bottom})


def search(
    rows: Rows,
    basis: KrylovBasis,
    ends: Ends,
    *,
    least: int,
    max_steps: int,
    keep: int,
    is_close: Callable[[Ritz], Tensor],
    new_direction: Callable[[], TensorList],
) -> tuple[Ritz | None, Status]:
    """The last Ritz pairs, None where a product failed before there were enough, and how it ended.

    Args:
        rows: A.
        basis: has its starts; it is grown, and restarted where it holds no more.
        ends: what is sought.
        least: how many pairs are of use.
        max_steps: the most products.
        keep: how many Ritz vectors a restart keeps.
        is_close: which Ritz pairs are accurate, (m,).
        new_direction: where the basis spans an invariant subspace that is too small.
    """
    ritz: Ritz | None = None
    status = Status.STEP_LIMIT
    while rows.num_products < max_steps and status is Status.STEP_LIMIT:
        waiting = basis.pending()[: max_steps - rows.num_products]
        if ritz is not None and basis.needs_room(len(waiting)):
            basis.restart(ritz, ends.nearest(ritz, keep))
        if not all(basis.absorb(row) for row in rows.products(waiting)):
            status = Status.BREAKDOWN
            break
        is_whole = basis.num_products == basis.size  # the basis spans an invariant subspace
        if is_whole and basis.num_products < least:
            basis.append(new_direction())
        elif is_whole or basis.num_products >= ends.count:
            ritz = basis.ritz()
            top, bottom = ends.wanted(ritz)
            if is_whole or bool(is_close(ritz)[[*top, *bottom]].all()):
                status = Status.CONVERGED
    if ritz is None and basis.num_products >= least:
        ritz = basis.ritz()
    return ritz, status
