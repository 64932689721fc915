"""What the curvature matrices of a loss over a dataset share: weights, passes, graphs."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.engines.choice import EngineChoice, EngineName
from hvpopt.engines.split import Curvature
from hvpopt.operators.base import LinearOperator
from hvpopt.operators.data import Batches
from hvpopt.operators.dataset import DatasetLoss
from hvpopt.operators.means import is_first_rank
from hvpopt.operators.points import NumTerms
from hvpopt.operators.vectors import Block
from hvpopt.pytrees import check_params
from hvpopt.trees import TensorList


class NonDeterministicError(RuntimeError):
    """Raised where two evaluations at the same parameters differ."""


class CurvatureOperator(LinearOperator):
    """A curvature matrix of the mean loss over a dataset, known by its products.

    The loss is any function of a batch that uses the module itself; nothing is rewritten, and
    batch normalisation, dropout, attention and recurrent layers work. An evaluation leaves no
    trace: parameters, gradients, buffers, random numbers, metrics and logs stay as they are. All
    evaluations see one function: dropout masks are drawn from the random state at construction.

    Weights: for a loss that is a mean over terms (examples, pixels, tokens), results are those of
    the joined batch, with a smaller last batch, ignored targets and class weights, too: batch b
    counts with its number of terms w_b,

        C = Σ_b w_b C_b / Σ_b w_b,

    which is read off the call of torch's loss function inside ``loss``
    (`hvpopt.engines.reduction`). A penalty that is added to the mean then counts once. For a sum
    over terms, batches add up. What else is averaged by hand beside torch's loss function is taken
    to have as many terms.

    Costs: with one batch the graph is kept between products; otherwise a product runs every batch
    again, one at a time. ``close()``, or leaving a ``with`` block, releases the graph; later
    products make it anew. A kept graph is made anew, too, where parameters, buffers or training
    modes of the loss's modules have changed, or batches in a list. Of anything else that the loss
    reads (edits of ``.data``, other tensors, numbers, a dropout rate) it hears by ``close()``.

    Where ``torch.distributed`` is initialised, each rank gives its own batches, and results are
    those of all of them: all ranks must then call alike. Each call makes one collective. Give the
    bare module to the loss, not the one wrapped by ``DistributedDataParallel``.

    Args:
        loss: ``loss(batch)``, a real scalar tensor, or a dict with it under "loss"; such as
            ``lambda b: F.cross_entropy(net(b[0]), b[1])`` or
            ``lambda b: module.training_step(b, 0)``.
        params: the parameters to differentiate by, all requiring gradients. They give the order
            of vectors, and are what ``block`` takes.
        data: batches, in anything that can be iterated again and again, such as a list or a
            ``DataLoader``; for one batch ``[batch]``. A loader that shuffles yields the same order
            in each pass. A loader of one batch is read once, unless ``micro_batch_size`` is given.
        engine: "auto", "dual", "graph" or "finite_difference".
        num_terms: a function from a batch to the number of terms that its loss is a mean of, for
            losses not computed by torch.nn.functional; "sum" where the losses of batches add up.
        micro_batch_size: splits each batch into chunks of so many examples (`split_batch`), which
            saves memory. Batch normalisation in training mode couples the examples of a batch:
            the result is then not the same function's.
        retain_graphs: keeps the graphs of all batches, not only of a single one.
        over_ranks: False for this rank's own batches alone.
        progress: shows a bar over the batches of each pass.

    Raises:
        TypeError: If ``data`` is a bare batch or can be read only once, or parameters are not real
            floating-point tensors.
        ValueError: If there is no parameter, one is given twice, or one requires no gradient.

    Evaluations raise:
        UnknownReductionError: If there are several batches, and it cannot be told how their losses
            combine; ``num_terms`` says it.
    """

    _curvature: Curvature = "hessian"

    def __init__(
        self,
        loss: Callable[[Any], Any],
        params: Iterable[Tensor],
        data: Iterable[Any],
        *,
        engine: EngineName = "auto",
        num_terms: NumTerms = None,
        micro_batch_size: int | None = None,
        retain_graphs: bool = False,
        over_ranks: bool = True,
        progress: bool = False,
    ) -> None:
        params = _checked_params(params)
        if num_terms is not None and num_terms != "sum" and not callable(num_terms):
            raise TypeError(
                f"num_terms={num_terms!r}; expected a function from a batch to its number of "
                "terms, 'sum', or None."
            )
        batches = Batches(
            data,
            params,
            micro_batch_size=micro_batch_size,
            progress=progress and is_first_rank(),
        )
        self._over(
            DatasetLoss(
                loss,
                params,
                batches,
                curvature=self._curvature,
                choice=EngineChoice(engine),
                num_terms=num_terms,
                keep=retain_graphs or batches.is_single,
                over_ranks=over_ranks,
            )
        )

    def _over(self, dataset: DatasetLoss) -> None:
        super().__init__(dataset.params, dataset.product, matmat=dataset.products)
        self._dataset = dataset
        weakref.finalize(self, dataset.close).atexit = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the graphs that are kept; the operator works on."""
        self._dataset.close()

    @property
    def params(self) -> TensorList:
        """The parameters, in the order of vectors."""
        return self.like

    def loss(self) -> Tensor:
        """The mean loss over the dataset at the current parameters, a scalar, detached."""
        return self._dataset.loss()

    def gradient(self) -> TensorList:
        """The mean loss's gradient, one tensor a parameter, detached."""
        return self._dataset.gradient()

    def block(self, which: Block) -> "CurvatureOperator":
        """The matrix by some parameters alone, which costs less than the whole.

        Args:
            which: indices or a slice; or parameters, a module, a parameter group.

        Raises:
            TypeError: If ``which`` is something else.
            ValueError: If it names nothing, something twice, or no parameter of the operator.
        """
        places = self._space.chosen(which)
        part = object.__new__(CurvatureOperator)
        part._over(self._dataset.restricted([self.like[i] for i in places]))
        return part

    def check_deterministic(self, *, rtol: float = 1e-4) -> None:
        """Evaluates loss, gradient and a product twice, in passes of their own.

        Args:
            rtol: the largest relative difference ‖a − b‖ / ‖a‖ that passes.

        Raises:
            NonDeterministicError: If they differ by more.
        """
        generator = torch.Generator().manual_seed(0)
        probe = trees.rademacher_like(self.like, generator)
        evaluations: dict[str, Callable[[], Sequence[Tensor]]] = {
            "losses": lambda: [self.loss()],
            "gradients": self.gradient,
            "products": lambda: self.matvec(probe),
        }
        for what, evaluate in evaluations.items():
            self.close()
            first = evaluate()
            self.close()
            second = evaluate()
            distance = float(trees.norm(trees.add(first, second, -1.0)))
            if not distance <= rtol * float(trees.norm(first)):
                raise NonDeterministicError(
                    f"Two evaluations at the same parameters gave {what} that differ by "
                    f"{distance:.3g}, of a norm of {float(trees.norm(first)):.3g}: the loss or the "
                    "data change from call to call. Dropout and shuffling data loaders are taken "
                    "care of; look for generators of your own, counters, data that are augmented "
                    "in worker processes, and non-deterministic kernels "
                    "(torch.use_deterministic_algorithms)."
                )


def _checked_params(params: Iterable[Tensor]) -> TensorList:
    """The parameters as a list, if the loss can be differentiated by them."""
    if isinstance(params, Tensor):
        raise TypeError("params is one tensor; expected an iterable of parameters: [param].")
    params = list(params)
    check_params(params, "params")
    if len(set(map(id, params))) < len(params):
        raise ValueError("params hold a parameter twice; expected each once.")
    for i, p in enumerate(params):
        if not p.requires_grad or not p.is_leaf:
            raise ValueError(
                f"params[{i}], of shape {tuple(p.shape)}, is no leaf that requires a gradient: "
                "give parameters that are trained, or call requires_grad_()."
            )
    return params
