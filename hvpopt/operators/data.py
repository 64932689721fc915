"""The data of an operator: the same batches in the same order at every pass."""

import itertools
import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from hvpopt.isolation import World


def split_batch(batch: Any, size: int) -> list[Any]:
    """The batch in chunks of ``size`` along dimension 0, the last of them possibly smaller.

    Each tensor in the batch is split, in nested tuples, lists and dicts; tensors without
    dimensions and other things are in every chunk. A mapping of another kind comes back as a
    dict. The weighted mean of the chunks' mean losses is the batch's loss where no example
    affects another's loss: not with batch normalisation in training mode, which normalises each
    chunk by itself.

    Raises:
        ValueError: If ``size`` < 1, or tensors differ in their number of rows.
        TypeError: If there is no tensor to split.

    Examples:
        >>> [x.tolist() for x, _ in split_batch((torch.arange(5), "all"), 2)]
        [[0, 1], [2, 3], [4]]
    """
    if size < 1:
        raise ValueError(f"A micro-batch needs at least one example, got size = {size}.")
    leaves, spec = pytree.tree_flatten(_plain(batch))
    splits = [isinstance(x, Tensor) and x.dim() > 0 for x in leaves]
    rows = {len(x) for x, is_split in zip(leaves, splits, strict=True) if is_split}
    if not rows:
        raise TypeError(
            f"The batch, a {type(batch).__name__}, holds no tensor with examples along dimension "
            "0: split it yourself and give the parts as data."
        )
    if len(rows) > 1:
        raise ValueError(
            f"The batch holds tensors of {', '.join(map(str, sorted(rows)))} rows, so that it "
            "cannot be told which dimension counts examples: split it yourself and give the "
            "parts as data."
        )
    (count,) = rows
    return [
        pytree.tree_unflatten(
            [x[i : i + size] if s else x for x, s in zip(leaves, splits, strict=True)], spec
        )
        for i in range(0, count, size)
    ]


class Batches:
    """Batches with their positions, drawn alike at each pass, which leaves no trace.

    Every pass starts from the random state at construction, so that a data loader that shuffles
    yields the same batches each time; afterwards random numbers, and the generators of a data
    loader, stand where they stood.

    Args:
        data: a re-iterable of batches.
        devices_of: tensors on whose devices random numbers are drawn.
        micro_batch_size: where given, batches are split by `split_batch`.
        progress: shows a bar.

    Raises:
        TypeError: If ``data`` is a batch or can be read only once.
        ValueError: For ``micro_batch_size`` < 1.
    """

    def __init__(
        self,
        data: Iterable[Any],
        devices_of: Sequence[Tensor],
        *,
        micro_batch_size: int | None = None,
        progress: bool = False,
    ) -> None:
        _check_data(data)
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size needs to be at least 1, got {micro_batch_size}.")
        self._data = data
        self._devices = {p.device for p in devices_of}
        self._size = micro_batch_size
        self._progress = progress
        self._world = World(_nothing, devices_of)
        self._generators = [(g, g.get_state()) for g in _generators(data)]
        with self._world.further_run():
            self._seed = int(torch.randint(2**62, ()))

    @property
    def is_single(self) -> bool:
        """Whether there is one batch only, as far as its length tells."""
        return self._size is None and self._length == 1

    @property
    def _length(self) -> int | None:
        if not isinstance(self._data, Sized):
            return None
        try:
            return len(self._data)
        except (TypeError, NotImplementedError):  # a DataLoader over an IterableDataset
            return None

    def stamp(self) -> tuple[object, ...]:
        """Changes when batches that are held in a list or tuple are replaced or written to."""
        if not isinstance(self._data, Sequence):
            return ()
        leaves = pytree.tree_leaves([_plain(batch) for batch in self._data])
        return tuple((id(x), version(x) if isinstance(x, Tensor) else 0) for x in leaves)

    @contextmanager
    def seeded(self, index: int) -> Iterator[None]:
        """While active, random numbers come from the state that belongs to a batch.

        The first batch's is the state at construction.
        """
        with self._world.further_run():
            if index > 0:
                _reseed(self._seed + index, self._devices)
            yield

    def passes(self, what: str) -> Generator[tuple[int, Any], None, None]:
        """One pass: positions and batches; ``what`` it is for names the bar."""
        bar = tqdm(total=self._length, desc=what, leave=False, disable=not self._progress)
        with self._rewound(), bar:
            with self.seeded(0):
                iterator = iter(self._data)
            index = -1
            for position in itertools.count():
                with self.seeded(position):
                    batch = next(iterator, _END)
                if batch is _END:
                    return
                parts = [batch] if self._size is None else split_batch(batch, self._size)
                for part in parts:
                    index += 1
                    yield index, pytree.tree_map_only(Tensor, _ordinary, part)
                bar.update()

    @contextmanager
    def _rewound(self) -> Iterator[None]:
        """While active, the data loader's own generators draw what they drew first."""
        held = [(g, g.get_state()) for g, _ in self._generators]
        try:
            for generator, state in self._generators:
                generator.set_state(state)
            yield
        finally:
            for generator, state in held:
                generator.set_state(state)


_END = object()


def _nothing() -> None:
    """A closure that refers to no module."""


def _check_data(data: Any) -> None:
    wrap = "wrap it, data=[batch]"
    if isinstance(data, (Tensor, Mapping, str)):
        raise TypeError(
            f"data is a {type(data).__name__}; expected an iterable of batches: if that is one "
            f"batch, {wrap}."
        )
    if isinstance(data, tuple) and any(isinstance(x, Tensor) for x in data):
        raise TypeError(
            "data is a tuple of tensors, which may be one batch; expected an iterable of batches: "
            f"{wrap}, or give batches that are tensors as a list."
        )
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(
            f"data is a {type(data).__name__}; expected an iterable of batches: for one batch, "
            f"{wrap}."
        )
    if isinstance(data, Iterator):
        raise TypeError(
            f"data is a {type(data).__name__}, which can be read only once, and every product "
            "reads the data again: give list(data), or an object whose __iter__ starts anew, such "
            "as a DataLoader."
        )


def _generators(data: object) -> list[torch.Generator]:
    """The generators that a data loader draws from, besides the global one."""
    sampler = getattr(data, "sampler", None)
    owners = (data, sampler, getattr(data, "batch_sampler", None))
    generators = [getattr(owner, "generator", None) for owner in owners]
    found = {id(g): g for g in generators if isinstance(g, torch.Generator)}
    return list(found.values())


def _reseed(seed: int, devices: Iterable[torch.device]) -> None:
    """Seeds the generators that `World` puts back, and no others."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    for device in devices:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)


def _plain(batch: Any) -> Any:
    """A batch that is a mapping of whatever kind as a dict."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def version(x: Tensor) -> int:
    """How often ``x`` was written to, as far as autograd counts."""
    return -1 if x.is_inference() else x._version


def _ordinary(x: Tensor) -> Tensor:
    """``x``, or a copy that autograd can record where it was made under inference mode."""
    return x.clone() if x.is_inference() else x
