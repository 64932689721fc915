"""A step of a first-order method, backwards.

With s⁺ = Φ(s, y(s), g) and g = ∂E/∂y at y(s), cotangents s̄⁺ of the state after the step and ȳ of
the iterate before it give

    ḡ = (∂Φ/∂g)ᵀ s̄⁺,   (Hḡ, Cḡ) in one pass,   s̄ = (∂Φ/∂s)ᵀ s̄⁺ + (∂y/∂s)ᵀ (ȳ + Hḡ + (∂Φ/∂y)ᵀ s̄⁺),

and Cḡ is what the step adds to the gradients by x and θ. Only Hḡ and Cḡ are expensive. Gradient
descent, u⁺ = u − α g, has ḡ = −α s̄⁺: Domke (AISTATS 2012), algorithm 1; heavy ball: algorithm 3.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from hvpopt.engines.base import reverse
from hvpopt.nested.adjoints.base import AdjointReport, Gradients, Sums
from hvpopt.nested.book import Descent
from hvpopt.nested.descent import Run
from hvpopt.nested.joint import Products, joint_product
from hvpopt.nested.methods import State
from hvpopt.nested.points import Step


class Sweep:
    """The way back from the end of a descent to its start.

    Args:
        run: What was minimised.
        descent: What came of it.
        ybar: The cotangent of the last iterates, (batch, *shape).
        path: Those of all iterates, (num_steps + 1, batch, *shape), or None.
        report: Counts the products.
        products: How they are computed.
    """

    def __init__(
        self,
        run: Run,
        descent: Descent,
        ybar: Tensor,
        path: Tensor | None,
        report: AdjointReport,
        products: Products,
    ) -> None:
        self.run, self.report, self._products = run, report, products
        self.sums, self.path = Sums(run), path
        if path is not None:  # examples that have finished repeat their last iterate
            times = torch.arange(len(path), device=path.device).unsqueeze(1)
            over = (times >= descent.steps).to(path.dtype)
            ybar = ybar + (path * over.view(*over.shape, *[1] * (ybar.dim() - 1))).sum(0)
        self.cotangents = [c.clone() for c in self._of_point(descent.state, ybar)]
        size = run.step_size
        self.sizes = [size] if isinstance(size, Tensor) and size.requires_grad else []
        self._size_total: Tensor | None = None

    def _of_point(self, state: State, ybar: Tensor) -> list[Tensor]:
        """The cotangents of a state, of that of its y."""
        rest = [torch.zeros_like(s) for s in state[1:]]
        if not self.run.domain.is_reparametrised:
            return [ybar, *rest]
        with torch.enable_grad():
            u = state[0].detach().requires_grad_()
            (ubar,) = torch.autograd.grad(self.run.domain.point(u), u, ybar)
        return [ubar, *rest]

    def back_through(self, steps: Iterable[Step]) -> None:
        """Takes the cotangents back through steps, the last one first."""
        for step in steps:
            rows = step.rows
            ybar = None if self.path is None else at(self.path[step.number], rows)
            self.replace(rows, self._back(step, [at(c, rows) for c in self.cotangents], ybar))

    def replace(self, rows: Tensor | None, cotangents: list[Tensor]) -> None:
        """Puts those of some examples in their places."""
        if rows is None:
            self.cotangents = cotangents
            return
        for whole, part in zip(self.cotangents, cotangents, strict=True):
            whole[rows] = part

    def add_sizes(self, term: Tensor | None) -> None:
        """Adds a term of the gradient by the step size."""
        if term is not None:
            total = self._size_total
            self._size_total = term if total is None else total + term

    def _back(self, step: Step, cotangents: list[Tensor], ybar: Tensor | None) -> list[Tensor]:
        self.report.num_products += 1
        if self._products == "forward_over_reverse":
            return self._through_parts(step, cotangents, ybar)
        run = self.run
        tape = run.look(step.state, step.rows, "tape").tape
        assert tape is not None
        ends = [*run.taken(tape, step.number, step.factors)]
        if ybar is not None:
            ends, cotangents = [*ends, tape.y], [*cotangents, ybar]
        goes_on = step.number > 0 or run.y0.requires_grad
        state = tape.state if goes_on else ()
        by = [*state, *run.problem.leaves_of(tape.xs), *run.problem.theta, *self.sizes]
        found = reverse(ends, by, cotangents, retain_graph=False)
        if self.sizes:
            self.add_sizes(found.pop())
        self.sums.add(found[len(state) :], step.rows)
        return [f for f in found[: len(state)] if f is not None] if goes_on else cotangents

    def _through_parts(
        self, step: Step, cotangents: list[Tensor], ybar: Tensor | None
    ) -> list[Tensor]:
        """With (Hḡ, Cḡ) by itself, as forward mode gives it."""
        run = self.run
        with torch.enable_grad():
            state = tuple(s.clone().requires_grad_() for s in step.state)
            y = run.domain.point(state[0])
            g = step.g.clone().requires_grad_()
            alpha = run.lengths(step.number, step.rows, step.factors)
            after = run.method.advance(run.domain, state, y, g, alpha)
            (gbar,) = torch.autograd.grad(after, g, cotangents, retain_graph=True)
        joint = joint_product(run.problem, y.detach(), gbar, step.rows, products=self._products)
        self.sums.add(joint.Cv, step.rows)
        ybar = joint.Hv if ybar is None else ybar + joint.Hv
        by = [*state, *self.sizes]
        if run.domain.is_reparametrised:
            found = torch.autograd.grad([*after, y], by, [*cotangents, ybar])
        else:
            found = torch.autograd.grad(after, by, cotangents)
            found = (found[0] + ybar, *found[1:])
        if self.sizes:
            self.add_sizes(found[-1])
        return list(found[: len(state)])

    def gradients(self, *, reaches_start: bool) -> Gradients:
        """All that has been summed; that by y0 only where the steps reach back to it."""
        y0 = self.run.y0
        y0bar = None
        if reaches_start and y0.requires_grad:
            with torch.enable_grad():
                start = y0.detach().requires_grad_()
                u = self.run.domain.coordinates(start)
                (y0bar,) = torch.autograd.grad(u, start, self.cotangents[0])
        return self.sums.gradients(y0bar, self._size_total)


def at(values: Tensor, rows: Tensor | None) -> Tensor:
    """The values of some examples; None for all."""
    return values if rows is None else values[rows]
