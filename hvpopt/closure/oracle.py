"""A training closure seen as a function of the parameters, for one optimizer step."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvpopt.closure.checks import checked_parameters
from hvpopt.closure.rows import Rows, WatchedRows, Which, moved_gradient
from hvpopt.closure.runs import ClosureRuns, EngineRunner, NoBackwardError
from hvpopt.engines.base import Engine, Trace
from hvpopt.engines.blame import explained
from hvpopt.engines.choice import EngineChoice, EngineName, Use
from hvpopt.engines.interception import Backward
from hvpopt.engines.split import Curvature, LossSplit, curvature_name
from hvpopt.linearization import LinearizedClosure
from hvpopt.trees import TensorList


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
        local: keeps this rank's own values, in the scale of the closure's own loss.

    Raises:
        ValueError: for no parameters, or one that requires no gradient.
        TypeError: for a parameter that is no tensor.

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
        local: bool = False,
    ) -> None:
        self.params = checked_parameters(params)
        self._choice = engine if isinstance(engine, EngineChoice) else EngineChoice(engine)
        self._runs = ClosureRuns(
            closure, self.params, self._choice, leave_no_trace=leave_no_trace, local=local
        )
        self._trace: Trace | None = None
        self._watched: WatchedRows | None = None
        self.num_products = 0

    def __enter__(self) -> "ClosureOracle":
        self._runs.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self._runs.close()
        self._trace = self._watched = None

    def trace(
        self, curvature: Curvature = "hessian", *, rows: Rows | None = None
    ) -> LinearizedClosure:
        """The loss, its gradient, and the operator of the Hessian or GGN, for many products.

        Args:
            curvature: which matrix.
            rows: a part of the batch, whose GGN and gradient `of_part` then has, too.

        Raises:
            ValueError: for rows with another curvature than the GGN, or with too few of them.
            NoBackwardError: if the closure returns a loss without calling ``backward``.
            UnsupportedOperationError: where an operation lacks a derivative; so may products.
            SplitNotFoundError: for the GGN, if no loss function of torch.nn.functional was called.
            ShardedModuleError: for a module under FSDP.
        """
        if rows is not None and curvature != "ggn":
            raise ValueError(f"curvature={curvature!r}: rows have parts of the GGN alone.")
        watched = None if rows is None else WatchedRows(rows)
        engine = self._engine("many products", curvature)
        with self._explaining(curvature):
            self._trace = trace = engine.trace(EngineRunner(self._runs, watched=watched), curvature)
        self._watched = watched
        return LinearizedClosure(
            loss=self._runs.scaled([trace.loss])[0],
            grad=self._runs.grads(),
            batch_grad=self._runs.scaled(trace.batch_grad),
            product=partial(self._product, curvature, id(trace)),
            has_remainder=trace.has_remainder,
            takes_derivatives=self._runs.takes_derivatives,
        )

    def of_part(
        self, point: LinearizedClosure, which: Which, *, gradient: bool = True
    ) -> LinearizedClosure:
        """The last trace, ``point``, with GGN and gradient of a part of its rows, or of the rest.

        The loss stays. Without ``gradient`` the gradients stay, too, which saves a backward pass.

        Raises:
            RuntimeError: after a trace without rows.
        """
        if self._watched is None:
            raise RuntimeError("The trace had no rows: trace('ggn', rows=Rows(0.5, seed=0)).")
        part = self._watched.restricted(point, which)
        if not gradient:
            return part
        with self._runs.recomputation():
            excess = self._watched.excess(which, self.params)
        return moved_gradient(part, self._runs.scaled(excess))

    def trace_along(
        self, v: TensorList, curvature: Curvature = "hessian"
    ) -> tuple[Tensor, TensorList, TensorList]:
        """The loss, its gradient, and the product with ``v``; with the dual engine in one run.

        Raises:
            As `trace`.
        """
        engine = self._engine("one product", curvature)
        with self._explaining(curvature):
            loss, product = engine.trace_along(EngineRunner(self._runs), v, curvature)
        self.num_products += 1
        loss, *product = self._runs.scaled([loss, *product])
        return loss, self._runs.grads(), product

    def gradient(self, *, alone: bool = False) -> tuple[Tensor, TensorList]:
        """The loss and its gradient, without a graph for products, by the run that counts.

        Args:
            alone: this is the oracle's only run. The closure then runs as any torch optimizer
                would run it, with torch's fastest kernels and compiled modules.

        Raises:
            NoBackwardError: if the closure returns a loss without calling ``backward``.
            TypeError: alone, if the closure returns no scalar.
        """
        losses: list[Tensor] = []

        def on_backward(loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
            losses.append(loss.detach().clone())
            plain(loss, **options)

        if alone:
            losses.append(self._runs.run_alone())
        else:
            EngineRunner(self._runs)(on_backward)
        return self._runs.scaled([torch.stack(losses).sum()])[0], self._runs.grads()

    def evaluate(self) -> Tensor:
        """The loss at the current parameters, a scalar, without a backward pass.

        NaN where the closure leaves out ``backward``, as one does that skips a loss that is none.
        """
        losses: list[Tensor] = []
        try:
            self._runs.run(lambda loss, plain, /, **_: losses.append(loss.detach()), first=False)
        except NoBackwardError:
            if self._runs.num_backwards is None:
                raise
            like = self.params[0].detach() if self._trace is None else self._trace.loss
            losses.append(like.new_full((), math.nan))
        return self._runs.scaled([torch.stack(losses).sum()])[0]

    def run_again(
        self,
        on_backward: Backward,
        *,
        split: LossSplit | None = None,
        around: AbstractContextManager[object] | None = None,
    ) -> None:
        """One more run, without a trace, inside ``around``, with ``on_backward`` as its backward.

        Raises:
            NoBackwardError: if the closure returns a loss without calling ``backward``.
        """
        self._runs.run(on_backward, split=split, around=around, first=False)

    def average(self, tensors: Sequence[Tensor]) -> TensorList:
        """The mean over the ranks of ``DistributedDataParallel``."""
        return self._runs.ranks.average(tensors)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The modules that the closure uses, as far as they have been met."""
        world = self._runs.world
        return [] if world is None else world.modules

    @property
    def loss_scale(self) -> int:
        """What the losses that ``backward`` is called on must be multiplied by.

        Lightning divides them by the micro-batches, and all that is returned here is not.
        """
        return self._runs.loss_scale

    @property
    def returned(self) -> Any:
        """What the closure returned in the run that counts."""
        return self._runs.returned

    @property
    def num_runs(self) -> int:
        """How often the closure was run."""
        return self._runs.num_runs

    def _engine(self, use: Use, curvature: Curvature) -> Engine:
        curvature_name(curvature)

        def probe(engine: Engine) -> None:
            run = EngineRunner(self._runs, probing=True)
            v = [torch.ones_like(p, requires_grad=False) for p in self.params]
            with self._explaining(curvature):
                if use == "one product":
                    engine.trace_along(run, v, curvature)
                else:
                    engine.trace(run, curvature).product(v)

        same = frozenset(map(id, self.params))
        try:
            return self._choice(use, curvature, probe, of=same)
        except NoBackwardError:  # raised again by the run that counts, which sets `returned`
            self._runs.run(lambda loss, plain, /, **_: None, first=True)
            raise

    def _product(self, curvature: Curvature, trace: int, v: TensorList) -> TensorList:
        if id(self._trace) != trace:
            raise RuntimeError(
                "The graph of this linearization was released with its oracle, or by a later trace."
            )
        assert self._trace is not None
        self.num_products += 1
        with self._explaining(curvature):
            return self._runs.scaled(self._trace.product(v))

    @contextmanager
    def _explaining(self, curvature: Curvature) -> Iterator[None]:
        """While active, what torch says of missing derivatives is said in the user's terms."""
        try:
            yield
        except RuntimeError as error:
            explanation = explained(
                error,
                requested=self._choice.requested,
                curvature=curvature,
                run=EngineRunner(self._runs, probing=True),
                modules=lambda: self.modules,
            )
            if explanation is None:
                raise
            try:
                raise explanation from error
            finally:
                del explanation  # whose traceback holds this frame, and with it the failed graph
