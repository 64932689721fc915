"""The runs of a training closure: the first, which counts, and further ones without a trace."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.closure.rows import WatchedRows
from hvpopt.engines import support
from hvpopt.engines.base import fill
from hvpopt.engines.choice import EngineChoice
from hvpopt.engines.interception import Backward, EndOfRun, Interception
from hvpopt.engines.location import check_checkpointing
from hvpopt.engines.ranks import Ranks, check_not_sharded
from hvpopt.engines.split import LossSplit
from hvpopt.isolation import World
from hvpopt.trees import TensorList

NO_BACKWARD = (
    "The closure never called loss.backward() (torch.autograd.backward and torch.autograd.grad do "
    "not count): let it compute the loss, clear the gradients, call loss.backward() and return "
    "the loss."
)


NO_LOSS = (
    "The closure returned a {given}, where the loss is expected: let it return the scalar tensor "
    "on which it called backward()."
)


class NoBackwardError(RuntimeError):
    """Raised where a closure returns a loss without having called ``backward``."""


class ClosureRuns:
    """Runs a closure between `open` and `close`, and knows what was met in it.

    Args:
        closure: the training closure.
        params: the parameters that an engine differentiates by.
        choice: remembers what has been checked, and whether products run layers again.
        leave_no_trace: the first run is a further one too.
        local: keeps this rank's own values, in the scale of the closure's own loss.

    Attributes:
        world: what the runs must leave as it was; None before `open` and after `close`.
        ranks: the ranks that share the closure's module, known from the first ``backward`` on.
        num_backwards: how many ``backward`` calls the first run made; None before.
        returned: what the closure returned in the first run.
        num_runs: how many there were, with those of probes.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        params: TensorList,
        choice: EngineChoice,
        *,
        leave_no_trace: bool,
        local: bool,
    ) -> None:
        self._closure, self.params, self._choice = closure, params, choice
        self._leave_no_trace, self._local = leave_no_trace, local
        self.world: World | None = None
        self.ranks = Ranks()
        self.num_backwards: int | None = None
        self.is_counting = False
        self.other_leaves: TensorList = []
        self._removed: list[Tensor | None] = []
        self.returned: Any = None
        self.num_runs = 0
        self.takes_derivatives = False
        self._checkpoints = False

    def open(self) -> None:
        """Remembers how the world stands."""
        check_not_sharded(self.params)
        self.world = World(self._closure, self.params)
        if self._leave_no_trace:
            self.world.hold_random_numbers()

    def close(self) -> None:
        """Forgets it."""
        self.world = None

    def run(
        self,
        on_backward: Backward,
        *,
        split: LossSplit | None = None,
        around: AbstractContextManager[object] | None = None,
        first: bool,
    ) -> None:
        """Runs the closure with ``on_backward`` in the place of ``loss.backward()``.

        Raises:
            NoBackwardError: if it is not called.
        """
        if self.world is None:
            raise RuntimeError("Use a ClosureOracle as a context manager: with ClosureOracle(...).")
        counts = first and not self._leave_no_trace
        world = self.world.first_run() if counts else self.world.further_run()
        stop_after = None if first else self.num_backwards
        seen = Interception(self._checked(on_backward), split=split, stop_after=stop_after)
        self.num_runs += 1
        self.is_counting = counts
        try:
            with torch.enable_grad(), support.differentiable_kernels() as kernels, world:
                with around or nullcontext(), seen:
                    returned = self._closure()
                if first:
                    self._removed = [p.grad for p in self.params] if self._leave_no_trace else []
        except EndOfRun:
            returned = None
        finally:
            self.is_counting = False
        if first:
            self.returned = returned
        self._checkpoints |= kernels.checkpoints
        if seen.num_backwards == 0:
            raise NoBackwardError(NO_BACKWARD)
        if first:
            self.num_backwards = seen.num_backwards
            self.takes_derivatives = seen.takes_derivatives

    def run_alone(self) -> Tensor:
        """Runs the closure as it is, for good, and returns its loss; no other run may follow.

        Raises:
            NoBackwardError: if it leaves the gradients as they were, or clears them for no loss.
            TypeError: if it returns no scalar.
        """
        assert self.world is not None
        self.num_runs += 1
        before = [(p.grad, p.grad._version) for p in self.params if p.grad is not None]
        with torch.enable_grad():
            self.returned = self._closure()
        after = [(p.grad, p.grad._version) for p in self.params if p.grad is not None]
        is_stale = len(before) == len(after) > 0 and all(
            a is b and i == j for (a, i), (b, j) in zip(before, after, strict=True)
        )
        if is_stale or (self.returned is None and not after):
            raise NoBackwardError(NO_BACKWARD)
        self.ranks = Ranks(() if self._local else self.world.modules)
        if isinstance(self.returned, (Tensor, float, int)):
            loss = torch.as_tensor(self.returned).detach()
            if loss.numel() == 1:
                return loss.reshape(())
        raise TypeError(NO_LOSS.format(given=type(self.returned).__name__))

    def _checked(self, on_backward: Backward) -> Backward:
        def handle(loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
            assert self.world is not None
            if self.num_backwards is None:
                check_not_sharded(self.world.modules)
                self.ranks = Ranks(() if self._local else self.world.modules)
            if not self._choice.has_checked_graph:
                check_checkpointing(loss, self.world.modules)
                self._choice.has_checked_graph = True
            if self.is_counting:
                self.other_leaves = self._leaves_besides_params(loss)
                self.world.hold(self.other_leaves)
            on_backward(loss, plain, **options)

        return handle

    def _leaves_besides_params(self, loss: Tensor) -> TensorList:
        ours = set(map(id, self.params))
        leaves = (getattr(node, "variable", None) for node in support.graph_nodes([loss]))
        return [leaf for leaf in leaves if leaf is not None and id(leaf) not in ours]

    def grads(self) -> TensorList:
        """What the first run left in ``p.grad``."""
        if not self._leave_no_trace:
            return fill([p.grad for p in self.params], self.params)
        return self.ranks.average(fill(self._removed, self.params))

    @property
    def loss_scale(self) -> int:
        """What undoes Lightning's division of the loss by the micro-batches."""
        assert self.world is not None
        return 1 if self._local else self.world.accumulation

    def scaled(self, tensors: Sequence[Tensor]) -> TensorList:
        """Averaged over ranks, and undoing Lightning's division by the micro-batches."""
        tensors = self.ranks.average(tensors)
        return list(tensors) if self.loss_scale == 1 else trees.scale(tensors, self.loss_scale)

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        """A context for a product: a further run, where checkpointed layers run again in it.

        Whether they do is seen in the first product, and remembered by the choice.
        """
        assert self.world is not None
        if self._choice.recomputes is False and not torch.is_inference_mode_enabled():
            yield
            return
        with support.differentiable_kernels(), self.world.further_run() as has_run:
            yield
        self._choice.recomputes = bool(has_run) or self._checkpoints


class EngineRunner:
    """Runs the closure for an engine (`hvpopt.engines.base.Runner`).

    Args:
        runs: of the closure.
        probing: whether every run is a further one, else the first may be the one that counts.
        watched: the rows that products may be restricted to.
    """

    def __init__(
        self, runs: ClosureRuns, *, probing: bool = False, watched: WatchedRows | None = None
    ) -> None:
        self._runs, self._probing, self._watched = runs, probing, watched
        self._has_run = False
        self._first = not probing and runs.num_backwards is None
        self.params = runs.params

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._runs.ranks.size

    @property
    def is_first(self) -> bool:
        """Whether the run under way is the one that counts."""
        return self._runs.is_counting

    @property
    def wants_gradient(self) -> bool:
        """Whether what the run under way leaves in ``p.grad`` is looked at."""
        return self._runs.num_backwards is None and not self._probing

    @property
    def other_leaves(self) -> TensorList:
        """In the run that counts, what else ``loss.backward()`` would give gradients."""
        return self._runs.other_leaves if self.is_first else []

    def recomputation(self) -> AbstractContextManager[None]:
        """A context for products that may run parts of the closure again."""
        return self._runs.recomputation()

    def untraced(self) -> AbstractContextManager[object]:
        """A context for what else may run parts of the closure."""
        assert self._runs.world is not None
        return self._runs.world.further_run()

    def average(self, tensors: Sequence[Tensor]) -> TensorList:
        """The mean over ranks."""
        return self._runs.ranks.average(tensors)

    def __call__(
        self,
        on_backward: Backward,
        *,
        split: LossSplit | None = None,
        around: AbstractContextManager[object] | None = None,
    ) -> None:
        """One run, inside the context ``around``, with ``on_backward`` as its backward."""
        first, self._first = self._first, False
        if self._watched is not None and split is not None:
            around = self._watched.around(split, around)
            if not self._has_run:
                on_backward = self._watched.seeing(split, on_backward)
        self._has_run = True
        self._runs.run(on_backward, split=split, around=around, first=first)
