"""The Hessian of an inner problem in the coordinates that move, one block for each example.

With y = y(u), g = ∂E/∂y and G(u) = pull(u, y(u), g), the gradient of F, the product is

    ∂²F/∂u² v = (∂pull/∂u)ᵀ v + (∂y/∂u)ᵀ (H ḡ + (∂pull/∂y)ᵀ v),   ḡ = (∂pull/∂g)ᵀ v,

so that all second derivatives of the energy are in H ḡ. Where bounds are active, the product is
between projections on the free directions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hvpopt.nested.domains import Domain
from hvpopt.nested.joint import Joint, Products, Tape, joint_product, taped
from hvpopt.nested.logits import LogitDomain
from hvpopt.nested.problem import InnerProblem


class InnerHessian:
    """∂²F/∂u² at a point, as an operator on rows of vectors (k, n).

    Args:
        problem: Whose energy.
        domain: Its coordinates.
        u: The point in them, (k, *shape).
        rows: Which examples, (k,); None for all.
        tape: The energy's gradient there, where it was computed before.
        products: How; by reverse over reverse the gradient's graph is kept from one product to
            the next, and rebuilt for those examples that are left when half have gone.
        drops_curved_map: Leaves out the term with ∂²y/∂u², which vanishes at an interior solution:
            the operator is then positive definite wherever H is, as on logits ∂²F/∂u² is not.

    Attributes:
        grad: P ∂F/∂u, (k, n).
        num_products: The products so far.
    """

    def __init__(
        self,
        problem: InnerProblem,
        domain: Domain,
        u: Tensor,
        rows: Tensor | None = None,
        *,
        tape: Tape | None = None,
        products: Products = "reverse_over_reverse",
        drops_curved_map: bool = False,
    ) -> None:
        self._problem, self._domain, self._products = problem, domain, products
        self._drops_curved_map = drops_curved_map
        self.num_products = 0
        self._u, self._rows = u.detach(), rows
        with torch.no_grad():
            self._y = domain.point(self._u)
        if tape is None:
            tape = taped(problem, self._y, rows)
        self._tape, self._places, self._g = tape, None, tape.g.detach()
        self._kept: tuple[Tape, Tensor | None] = (tape, None)
        self._free = domain.free(self._u, self._y, self._g)
        with torch.no_grad():
            self.grad = self.project(domain.pull(self._u, self._y, self._g).flatten(1))

    def project(self, v: Tensor) -> Tensor:
        """P v of all examples, (k, n)."""
        return v if self._free is None else self._free(v.view_as(self._u)).flatten(1)

    def __call__(self, v: Tensor, places: Tensor | None = None) -> Tensor:
        """P ∂²F/∂u² P v for the examples in some places among those at hand; None for all."""
        self.num_products += 1
        if self._free is not None and places is not None:
            everyone = torch.zeros_like(self._u).flatten(1)
            v = self.project(everyone.index_copy(0, places, v))[places]
        elif self._free is not None:
            v = self.project(v)
        with torch.enable_grad():
            product = self._product(v, places, lambda v: self._hvp(v, places))
        if self._free is None:
            return product
        if places is None:
            return self.project(product)
        everyone = torch.zeros_like(self._u).flatten(1)
        return self.project(everyone.index_copy(0, places, product))[places]

    def _product(self, v: Tensor, places: Tensor | None, hvp: Callable[[Tensor], Tensor]) -> Tensor:
        at = slice(None) if places is None else places
        v = v.view_as(self._u[at])
        if not self._domain.is_reparametrised:
            return hvp(v).flatten(1)
        if self._drops_curved_map:
            assert isinstance(self._domain, LogitDomain)
            y, domain = self._y[at], self._domain
            product = hvp(domain.width * domain.spread(y, v))
            return domain.spread(y, domain.natural(v, product)).flatten(1)
        u, g = self._u[at].clone().requires_grad_(), self._g[at].clone().requires_grad_()
        y = self._domain.point(u)
        (gbar,) = torch.autograd.grad(pull := self._domain.pull(u, y, g), g, v, retain_graph=True)
        (found,) = torch.autograd.grad([pull, y], u, [v, hvp(gbar)])
        return found.flatten(1)

    def _hvp(self, v: Tensor, places: Tensor | None) -> Tensor:
        """H v."""
        at = slice(None) if places is None else places
        if self._products == "forward_over_reverse":
            return joint_product(
                self._problem, self._y[at], v, self._of(places), products=self._products
            ).Hv
        tape, held = self._kept
        if held is not None and (places is None or not bool(torch.isin(places, held).all())):
            tape, held = self._tape, None
        if places is not None and 2 * len(places) <= len(tape.y):
            tape, held = taped(self._problem, self._y[places], self._of(places)), places
            self._kept = (tape, held)
        if places is None or (held is not None and len(held) == len(places)):
            return tape.hvp(v)
        spots = places if held is None else torch.searchsorted(held, places)
        spread = torch.zeros_like(tape.y, requires_grad=False).index_copy_(0, spots, v)
        return tape.hvp(spread)[spots]

    def _of(self, places: Tensor | None) -> Tensor | None:
        """The examples of places, numbered in the batch."""
        if places is None:
            return self._rows
        return places if self._rows is None else self._rows[places]

    def joint(self, v: Tensor) -> Joint:
        """(P ∂²F/∂u² P v, the derivative of ⟨G, P v⟩ by x and θ), for all examples at hand.

        The last product: the graph is freed.
        """
        self.num_products += 1
        found: list[Joint] = []

        def hvp(gbar: Tensor) -> Tensor:
            if self._products == "forward_over_reverse":
                joint = joint_product(
                    self._problem, self._y, gbar, self._rows, products=self._products
                )
            else:
                joint = self._tape.joint(self._problem, gbar)
            found.append(joint)
            return joint.Hv

        with torch.enable_grad():
            product = self._product(self.project(v), None, hvp)
        return Joint(self.project(product), found[0].Cv)
