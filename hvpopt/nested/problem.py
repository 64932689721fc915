"""The energy of an inner problem as one function, the same at every step.

While y moves, nothing else does: random numbers (dropout masks) are drawn anew from the same state
at each evaluation, and torch's generators are left as one evaluation leaves them; batch
normalisation uses its running statistics, and does not update them. So the examples stay
independent. In a backward pass the energy is the same function again, under the same autocast.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hvpopt.engines.base import reverse, unit_cotangent
from hvpopt.engines.split import inner_problem
from hvpopt.engines.support import differentiable_kernels, graph_nodes
from hvpopt.nested.energy import (
    Energy,
    Once,
    check_energies,
    check_rows,
    kinked_nodes,
    relu_like,
)
from hvpopt.nested.surroundings import (
    Watch,
    batch_norms,
    eval_mode,
    is_compiled,
    random_state,
    tensors_of,
)
from hvpopt.products.surroundings import ordinary_args, rewinder

Kind = Literal["values", "leaves", "chain", "attached"]

_warned_of_kinks, _looked_at_rows = Once(), Once()


class InnerProblem:
    """E(x, ·; θ) for one batch.

    Args:
        energy: The energy.
        x: Its first argument.
        y: Where the energy is met for the first time, (batch, *shape).
        allows_captured: Whether the energy may use tensors that were computed outside of it.

    Attributes:
        inputs: The tensors of x that require gradients, as given.
        theta: The leaves that require gradients and are behind the energy.
        num_gradients: Gradients by y so far.
        num_rows: The examples that they were of, summed.
        tape_bytes: About how much the graph of a gradient of all examples holds.

    Raises:
        TypeError: If the energy returns no tensor of floating point.
        ValueError: If it does not return (batch,), does not depend on y, an example's energy
            depends on others, x has other batch sizes, or a batch norm has no running statistics.
            Whether it depends on others is looked at once for each energy.
    """

    def __init__(self, energy: Energy, x: Any, y: Tensor, *, allows_captured: bool) -> None:
        self.energy = energy
        leaves, self._spec = pytree.tree_flatten(x)
        self._leaves = list(ordinary_args(tuple(leaves)))
        self._places = [i for i, v in enumerate(self._leaves) if isinstance(v, Tensor)]
        self._full = [self._leaves[i] for i in self._places]
        _check_batch(x, y)
        self._by = [i for i, v in enumerate(self._full) if v.requires_grad]
        self.inputs = [self._full[i] for i in self._by]
        self._values = [v.detach() for v in self._full]
        self._detached = [v.detach().requires_grad_(v.requires_grad) for v in self._full]
        self._y = y.detach()
        self._rewind: Callable[[], None] | None = None
        self._frozen = batch_norms(energy)
        self._autocast = (
            y.device.type,
            torch.is_autocast_enabled(y.device.type),
            torch.get_autocast_dtype(y.device.type),
        )
        self._needs_kernels = (
            self._autocast[1]
            or is_compiled(energy)
            or any(t.is_inference() for t in tensors_of(energy))
        )
        self.num_gradients = self.num_rows = self.tape_bytes = 0
        self.theta: list[Tensor] = []
        with self.active(), torch.enable_grad():
            self._probe(allows_captured)
        self._versions = self._current_versions()

    def _probe(self, allows_captured: bool) -> None:
        """Meets the energy once: what it depends on, draws, and needs."""
        y = self._y.clone().requires_grad_()
        before, rewind = random_state(y), rewinder([y])
        mark: Any = (y + 0).grad_fn
        watch = Watch()
        with watch:
            energies = check_energies(self._evaluate(self._detached, y), y)
        if any(not torch.equal(a, b) for a, b in zip(before, random_state(y), strict=True)):
            self._rewind = rewind
        self._needs_kernels |= watch.found
        self.tape_bytes = 2 * watch.num_bytes  # forward and backward
        nodes = list(graph_nodes([energies]))
        variables = {id(v): v for n in nodes if (v := getattr(n, "variable", None)) is not None}
        if id(y) not in variables:
            raise ValueError(
                "The energy does not depend on y by operations that autograd follows: expected "
                "E(x, y) computed from y without detach(), .data or no_grad."
            )
        captured = [
            n.name()
            for n in nodes
            if not hasattr(n, "variable") and n._sequence_nr() < mark._sequence_nr()
        ]
        if captured and not allows_captured:
            raise ValueError(
                "The energy uses a tensor that was computed outside of it and requires a gradient "
                f"(by {captured[0]}): pass it in x, with the batch axis first, or choose "
                "adjoint='unrolled'."
            )
        ours = {id(y), *map(id, self._detached)}
        self.theta = [v for key, v in variables.items() if key not in ours]
        if isinstance(self.energy, nn.Module):
            known = set(map(id, self.theta))
            self.theta += [
                p for p in self.energy.parameters() if p.requires_grad and id(p) not in known
            ]
        if _looked_at_rows(self.theta[0] if self.theta else self.energy):  # wrappers come and go
            check_rows(energies, y)
        self._warn_of_kinks(energies)

    def _warn_of_kinks(self, energies: Tensor) -> None:
        kinks = kinked_nodes(energies)
        if kinks and _warned_of_kinks(self.energy):
            names = relu_like(self.energy) if isinstance(self.energy, nn.Module) else []
            warnings.warn(
                f"The energy is not smooth ({', '.join(names or kinks)}): its second derivatives "
                "miss the kinks, so that gradients through the inference are not those of the "
                "minimiser. Use Softplus, SiLU or Tanh.",
                UserWarning,
                stacklevel=6,
            )

    def _current_versions(self) -> list[int]:
        return [0 if t.is_inference() else t._version for t in self.theta]

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, the energy may be evaluated and differentiated."""
        with ExitStack() as stack:
            if self._needs_kernels:
                stack.enter_context(differentiable_kernels())
            elif torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(eval_mode(self._frozen))
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """While active, as in a backward pass, the energy is what it was in the forward pass.

        Raises:
            RuntimeError: If parameters were changed in place since then.
        """
        if self._current_versions() != self._versions:
            raise RuntimeError(
                "Parameters of the energy were changed in place between the inference and the "
                "backward pass, which evaluates the energy again: call backward before the "
                "optimizer's step, or choose adjoint='unrolled'."
            )
        device, enabled, dtype = self._autocast
        after = None if self._rewind is None else rewinder([self._y])
        with ExitStack() as stack:
            if enabled or torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, dtype, enabled))
            stack.enter_context(self.active())
            stack.enter_context(torch.enable_grad())
            yield
        if after is not None:
            after()

    def select(self, rows: Tensor | None, kind: Kind = "leaves") -> list[Tensor]:
        """The tensors of x for some examples.

        Args:
            rows: Which, (k,); None for all. All are given where the energy draws random numbers.
            kind: "values" without gradients, "leaves" of their own where the inputs require
                gradients, "chain" in the graph of `leaves`, or "attached" in that of what was
                given.
        """
        source = self._full if kind == "attached" else self._detached
        if kind == "values":
            source = self._values
        if rows is None or self._rewind is not None:
            return source
        chosen = [v[rows] for v in source]
        if kind == "leaves":
            pairs = zip(chosen, source, strict=True)
            return [v.detach().requires_grad_(w.requires_grad) for v, w in pairs]
        return chosen

    def rows_of(self, v: Tensor, rows: Tensor | None) -> Tensor:
        """The part of a tensor, shaped like one of x, that `select` would give."""
        return v if rows is None or self._rewind is not None else v[rows]

    @property
    def leaves(self) -> list[Tensor]:
        """What stands for `inputs` in chains."""
        return self.leaves_of(self._detached)

    def leaves_of(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Those of `select`'s tensors that stand for `inputs`."""
        return [xs[i] for i in self._by]

    def spread(self, grad: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
        """The gradient by an input of all examples, of that by those selected."""
        if rows is None or self._rewind is not None:
            return grad
        return torch.zeros_like(like).index_copy_(0, rows, grad)

    def energies(self, xs: Sequence[Tensor], y: Tensor, rows: Tensor | None) -> Tensor:
        """E of some examples (k,), of y (k, *shape).

        Where the energy draws random numbers all examples are computed, so that each meets its
        own dropout mask.
        """
        if self._rewind is None:
            return check_energies(self._evaluate(xs, y), y)
        self._rewind()
        if rows is None:
            return check_energies(self._evaluate(xs, y), y)
        everyone = self._y.index_copy(0, rows, y)
        return check_energies(self._evaluate(xs, everyone), everyone)[rows]

    def gradient(
        self, xs: Sequence[Tensor], y: Tensor, rows: Tensor | None, *, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """E and ∂E/∂y of some examples, (k,) and (k, *shape); y requires a gradient."""
        self.num_gradients += 1
        self.num_rows += len(self._y) if self._rewind is not None else len(y)
        energies = self.energies(xs, y, rows)
        one = unit_cotangent(energies) if create_graph else torch.ones_like(energies)
        (g,) = reverse([energies], [y], [one], retain_graph=create_graph, create_graph=create_graph)
        return energies, torch.zeros_like(y) if g is None else g

    def _evaluate(self, xs: Sequence[Tensor], y: Tensor) -> Any:
        with inner_problem():
            if self._spec.is_leaf() and xs:
                return self.energy(xs[0], y)
            leaves = list(self._leaves)
            for place, v in zip(self._places, xs, strict=True):
                leaves[place] = v
            return self.energy(pytree.tree_unflatten(leaves, self._spec), y)


def _check_batch(x: Any, y: Tensor) -> None:
    for path, v in pytree.tree_leaves_with_path(x):
        if isinstance(v, Tensor) and (v.dim() == 0 or len(v) != len(y)):
            raise ValueError(
                f"x{pytree.keystr(path)} has shape {tuple(v.shape)} for a batch of {len(y)}: "
                "expected the batch axis first in every tensor of x; what all examples share is a "
                "parameter or a buffer of the energy."
            )
