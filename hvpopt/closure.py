"""A training closure as an oracle: its loss, gradient, and Hessian or GGN products.

The closure is the zero-argument function that every torch optimizer's ``step`` receives: it
computes a loss, clears the gradients, calls ``backward()`` and returns the loss. It is what
Lightning passes under automatic optimization.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from hvpopt import trees
from hvpopt.engines import support
from hvpopt.engines.base import Engine, Trace, fill
from hvpopt.engines.choice import EngineChoice, EngineName, Use
from hvpopt.engines.interception import Backward, EndOfRun, Interception
from hvpopt.engines.ranks import Ranks, check_not_sharded
from hvpopt.engines.split import Curvature, LossSplit
from hvpopt.isolation import World
from hvpopt.linearization import LinearizedClosure
from hvpopt.trees import TensorList

NO_BACKWARD = (
    "The closure never called loss.backward() (torch.autograd.backward and torch.autograd.grad do "
    "not count): let it compute the loss, clear the gradients, call loss.backward() and return "
    "the loss."
)


class NoBackwardError(RuntimeError):
    """Raised where a closure returns a loss without having called ``backward``."""


class ClosureOracle:
    """A training closure seen as a function of the parameters, for one optimizer step.

    The first of `trace` and `trace_along` is the run that counts. Every other run sees the same
    function (dropout masks, buffers) and leaves no trace (gradients, random numbers, buffers,
    metrics, logs). Use it as a context manager; leaving releases the graph.

    Args:
        closure: computes the loss, clears gradients, calls ``backward()``, returns the loss.
        params: the parameters to differentiate by, all requiring gradients.
        engine: "auto", "dual", "graph", "finite_difference", or an `EngineChoice`, which
            remembers from one oracle to the next what a model supports.
        leave_no_trace: also removes the traces of the first run, so that the oracle only looks.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> def closure():
        ...     w.grad = None
        ...     loss = (w**3).sum()
        ...     loss.backward()
        ...     return loss
        >>> with ClosureOracle(closure, [w]) as oracle:
        ...     point = oracle.trace()
        ...     point.product([torch.tensor([1.0, 1.0])])
        [tensor([ 6., 12.])]
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        params: Sequence[Tensor],
        *,
        engine: EngineName | EngineChoice = "auto",
        leave_no_trace: bool = False,
    ) -> None:
        self._closure = closure
        self._leave_no_trace = leave_no_trace
        self.params = list(params)
        self._choice = engine if isinstance(engine, EngineChoice) else EngineChoice(engine)
        self._world: World | None = None
        self._ranks = Ranks()
        self._num_backwards: int | None = None
        self._probing = False
        self._is_counting = False
        self._leaves: TensorList = []
        self._trace: Trace | None = None
        self.returned: Any = None
        self.num_runs = 0
        self.num_products = 0

    def __enter__(self) -> "ClosureOracle":
        check_not_sharded(self.params)
        self._world = World(self._closure, self.params)
        return self

    def __exit__(self, *exc: object) -> None:
        self._world = self._trace = None

    def trace(self, curvature: Curvature = "hessian") -> LinearizedClosure:
        """The loss, its gradient, and the operator of the Hessian or GGN, for many products.

        Raises:
            NoBackwardError: if the closure returns a loss without calling ``backward``.
            SplitNotFoundError: for the GGN, if no loss function of torch.nn.functional was called.
            ShardedModuleError: for a module under FSDP.
        """
        engine = self._engine("many products", curvature)
        self._trace = engine.trace(self._runner(), curvature)
        batch_grad = self._scaled(self._trace.batch_grad)
        return LinearizedClosure(
            loss=self._scaled([self._trace.loss])[0],
            grad=batch_grad if self._leave_no_trace else self._grads(),
            batch_grad=batch_grad,
            product=self._product,
            has_remainder=self._trace.has_remainder,
        )

    def trace_along(
        self, v: TensorList, curvature: Curvature = "hessian"
    ) -> tuple[Tensor, TensorList, TensorList]:
        """The loss, its gradient, and the product with ``v``; with the dual engine in one run.

        Raises:
            As `trace`.
        """
        engine = self._engine("one product", curvature)
        loss, product = engine.trace_along(self._runner(), v, curvature)
        self.num_products += 1
        loss, *product = self._scaled([loss, *product])
        return loss, self._grads(), product

    def evaluate(self) -> Tensor:
        """The loss at the current parameters, a scalar, without a backward pass."""
        losses: list[Tensor] = []
        self._run(lambda loss, plain, /, **_: losses.append(loss.detach()), first=False)
        return self._scaled([torch.stack(losses).sum()])[0]

    def average(self, tensors: Sequence[Tensor]) -> TensorList:
        """The mean over the ranks of ``DistributedDataParallel``."""
        return self._ranks.average(tensors)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The modules that the closure uses, as far as they have been met."""
        return [] if self._world is None else self._world.modules

    def _grads(self) -> TensorList:
        return fill([p.grad for p in self.params], self.params)

    def _scaled(self, tensors: Sequence[Tensor]) -> TensorList:
        """Averaged over ranks, and undoing Lightning's division by the micro-batches."""
        assert self._world is not None
        tensors = self._ranks.average(tensors)
        scale = self._world.accumulation
        return list(tensors) if scale == 1 else trees.scale(tensors, scale)

    def _product(self, v: TensorList) -> TensorList:
        if self._trace is None:
            raise RuntimeError("The graph of this linearization was released with its oracle.")
        self.num_products += 1
        with support.differentiable_kernels(), support.without_hooks(self.params):
            return self._scaled(self._trace.product(v))

    def _engine(self, use: Use, curvature: Curvature) -> Engine:
        if curvature not in ("hessian", "ggn"):
            raise ValueError(f"curvature={curvature!r} is unknown: choose 'hessian' or 'ggn'.")

        def probe(engine: Engine) -> None:
            self._probing = True
            try:
                v = [torch.ones_like(p, requires_grad=False) for p in self.params]
                if use == "one product":
                    engine.trace_along(self._runner(), v, curvature)
                else:
                    engine.trace(self._runner(), curvature).product(v)
            finally:
                self._probing = False

        convolves = any(isinstance(m, _ConvNd) for m in self.modules)
        same = frozenset(map(id, self.params))
        try:
            return self._choice(use, curvature, probe, convolves=convolves, of=same)
        except NoBackwardError:  # raised again by the run that counts, which sets `returned`
            self._run(lambda loss, plain, /, **_: None, first=True)
            raise

    def _runner(self) -> "_Runner":
        return _Runner(self)

    def _run(
        self,
        on_backward: Backward,
        *,
        split: LossSplit | None = None,
        around: AbstractContextManager[object] | None = None,
        first: bool,
    ) -> None:
        if self._world is None:
            raise RuntimeError("Use a ClosureOracle as a context manager: with ClosureOracle(...).")
        counts = first and not self._leave_no_trace
        world = self._world.first_run() if counts else self._world.further_run()
        stop_after = None if first else self._num_backwards
        seen = Interception(self._checked(on_backward), split=split, stop_after=stop_after)
        self.num_runs += 1
        self._is_counting = counts
        try:
            with torch.enable_grad(), support.differentiable_kernels(), world:
                with around or nullcontext(), seen:
                    returned = self._closure()
        except EndOfRun:
            returned = None
        finally:
            self._is_counting = False
        if first:
            self.returned = returned
        if seen.num_backwards == 0:
            raise NoBackwardError(NO_BACKWARD)
        if first:
            self._num_backwards = seen.num_backwards

    def _checked(self, on_backward: Backward) -> Backward:
        def handle(loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
            assert self._world is not None
            if self._num_backwards is None:
                check_not_sharded(self.modules)
                self._ranks = Ranks(self.modules)
            if not self._choice.has_checked_graph:
                support.check_checkpointing(loss)
                self._choice.has_checked_graph = True
            if self._is_counting:
                self._leaves = self._other_leaves(loss)
                self._world.hold(self._leaves)
            on_backward(loss, plain, **options)

        return handle

    def _other_leaves(self, loss: Tensor) -> TensorList:
        ours = set(map(id, self.params))
        leaves = (getattr(node, "variable", None) for node in support.graph_nodes([loss]))
        return [leaf for leaf in leaves if leaf is not None and id(leaf) not in ours]


class _Runner:
    """Runs the oracle's closure for an engine: the first time for good."""

    def __init__(self, oracle: ClosureOracle) -> None:
        self._oracle = oracle
        self._first = not oracle._probing and oracle._num_backwards is None
        self.params = oracle.params
        self.average = oracle.average

    @property
    def size(self) -> int:
        return self._oracle._ranks.size

    @property
    def is_first(self) -> bool:
        return self._oracle._is_counting

    @property
    def other_leaves(self) -> TensorList:
        return self._oracle._leaves if self.is_first else []

    def __call__(
        self,
        on_backward: Backward,
        *,
        split: LossSplit | None = None,
        around: AbstractContextManager[object] | None = None,
    ) -> None:
        first, self._first = self._first, False
        self._oracle._run(on_backward, split=split, around=around, first=first)
