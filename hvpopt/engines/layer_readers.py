"""What each function that is linear in a weight says of it: the vectors of the weight's gradient.

∂L/∂W = Σ_n r_n c_nᵀ      (see `hvpopt.engines.layer_calls`)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hvpopt.engines.patches import (
    Pair,
    Pairs,
    convolution_pairs,
    transposed_convolution_pairs,
)


@dataclass(frozen=True)
class LayerCall:
    """One use of a parameter by a function that is linear in it.

    Attributes:
        weight: the parameter's place among those looked for.
        bias: the place of the bias that comes with it, one number a row; its gradient is Σ_n r_n.
        output: where the function's value stands in the graph, whatever is later done to it in
            place.
        pairs: the gradient by that value ↦ r and c of all positions, in chunks, so that
            Σ_n r_n c_nᵀ is the gradient by the weight as matrices
            ``reshape(groups, rows, columns)``. Shapes: r[groups, positions, rows], or integers
            [positions] that say which row has a one; c[groups, positions, columns].
        groups: of a convolution, else 1.
    """

    weight: int
    bias: int | None
    output: GradientEdge
    pairs: Pairs
    groups: int = 1


def bias_alone(call: LayerCall) -> LayerCall:
    """The call as one of its bias only, with ones for c."""
    assert call.bias is not None

    def pairs(slope: Tensor) -> Iterator[Pair]:
        for r, _ in call.pairs(slope):
            yield _with_ones(r.movedim(0, 1).flatten(1)[None])

    return LayerCall(call.bias, None, call.output, pairs)


class _View(NamedTuple):
    """A tensor that is a parameter, some rows of it, or its transpose."""

    place: int
    offset: int
    is_transposed: bool


class Places:
    """Finds parameters in tensors, by identity, as views and as transposes."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)  # keeps the identities
        self._places = {id(p): i for i, p in enumerate(params)}

    def num_rows(self, place: int) -> int:
        """The length of a parameter's first dimension."""
        return self._params[place].shape[0]

    def find(self, t: Any) -> _View | None:
        """What a tensor is of a parameter, if a gradient goes there."""
        if not isinstance(t, Tensor) or not t.requires_grad:
            return None
        if id(t) in self._places:
            return _View(self._places[id(t)], 0, False)
        p = t._base
        if p is None or id(p) not in self._places or p.dim() != t.dim() or not p.is_contiguous():
            return None
        place, start = self._places[id(p)], t.storage_offset() - p.storage_offset()
        width = math.prod(p.shape[1:])
        if t.stride() == p.stride() and t.shape[1:] == p.shape[1:] and start % width == 0:
            return _View(place, start // width, False)
        is_transpose = t.shape == p.shape[::-1] and t.stride() == p.stride()[::-1]
        return _View(place, 0, True) if is_transpose else None

    def find_whole(self, t: Any) -> int | None:
        """The place of the parameter that a tensor is, or is another view of all of."""
        view = self.find(t)
        whole = view is not None and not view.is_transposed and len(t) == self.num_rows(view.place)
        return view.place if view is not None and whole else None


def _with_ones(r: Tensor) -> Pair:
    return r, r.new_ones(1, r.shape[1], 1)


def _padded(r: Tensor, offset: int, size: int) -> Tensor:
    """Zeros in the rows of a parameter that are not used."""
    after = size - offset - r.shape[-1]
    return F.pad(r, (offset, after)) if offset or after else r


def _linear(
    places: Places, output: GradientEdge, x: Tensor, w: Tensor, bias: Any = None
) -> list[LayerCall]:
    """y = x wᵀ + bias, on the last dimension of x."""
    if w.dim() != 2:
        return []
    view, bias_view = places.find(w), places.find(bias)
    out, inner, held = w.shape[0], w.shape[1], x.detach()
    calls = []
    if view is not None:
        rows, is_transposed, offset = places.num_rows(view.place), view.is_transposed, view.offset

        def pairs(slope: Tensor) -> Iterator[Pair]:
            r, c = slope.reshape(1, -1, out), held.reshape(1, -1, inner)
            yield (c, r) if is_transposed else (_padded(r, offset, rows), c)

        place = None
        is_row = bias_view is not None and tuple(bias.shape) == (out,)
        if bias_view is not None and is_row and not is_transposed and bias_view.offset == offset:
            place = bias_view.place if places.num_rows(bias_view.place) == rows else None
        calls.append(LayerCall(view.place, place, output, pairs))
        if place is not None:
            return calls
    if bias_view is not None and tuple(bias.shape) == (out,):
        size, start = places.num_rows(bias_view.place), bias_view.offset

        def alone(slope: Tensor) -> Iterator[Pair]:
            yield _with_ones(_padded(slope.reshape(1, -1, out), start, size))

        calls.append(LayerCall(bias_view.place, None, output, alone))
    return calls


def _named_linear(
    places: Places, output: GradientEdge, input: Tensor, weight: Tensor, bias: Any = None
) -> list[LayerCall]:
    return _linear(places, output, input, weight, bias)


def _matmul(
    places: Places, output: GradientEdge, input: Tensor, *others: Any, **named: Any
) -> list[LayerCall]:
    """``input @ other``; each of the two may be a parameter."""
    (other,) = others or [named[n] for n in ("other", "mat2", "tensor2") if n in named]
    calls = []
    if other.dim() == 2 and input.dim() >= 1:
        calls += _linear(places, output, input, other.mT)
    if input.dim() == 2 and other.dim() in (1, 2):

        def by_columns(pairs: Pairs) -> Pairs:
            return lambda slope: pairs(slope.mT if slope.dim() == 2 else slope)

        along = _linear(places, output, other.mT if other.dim() == 2 else other, input)
        calls += [replace(call, pairs=by_columns(call.pairs)) for call in along]
    return calls


def _addmm(
    places: Places,
    output: GradientEdge,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    **_: Any,
) -> list[LayerCall]:
    bias = input if beta == 1 and alpha == 1 else None
    return _linear(places, output, alpha * mat1.detach(), mat2.mT, bias)


def _embedding(
    places: Places,
    output: GradientEdge,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *_: Any,
    **__: Any,
) -> list[LayerCall]:
    place = places.find_whole(weight)
    if place is None:
        return []
    num_rows, width = weight.shape

    def pairs(slope: Tensor) -> Iterator[Pair]:
        r, c = input.reshape(-1), slope.reshape(-1, width)
        if padding_idx is not None:  # whose row gets no gradient
            kept = r != padding_idx % num_rows
            r, c = r[kept], c[kept]
        yield r, c[None]

    return [LayerCall(place, None, output, pairs)]


def _convolution(make_pairs: Callable[..., Pairs], *names: str) -> Callable[..., list[LayerCall]]:
    is_transposed = "output_padding" in names

    def read(
        places: Places,
        output: GradientEdge,
        input: Tensor,
        weight: Tensor,
        bias: Any = None,
        *given: Any,
        **named: Any,
    ) -> list[LayerCall]:
        geometry = {"groups": 1, **dict(zip(names, given, strict=False)), **named}
        geometry.pop("output_padding", None)
        place, of_bias = places.find_whole(weight), places.find_whole(bias)
        pairs = make_pairs(input.detach(), weight.shape, **geometry)
        if place is not None and not is_transposed:
            return [LayerCall(place, of_bias, output, pairs, geometry["groups"])]
        calls = []
        if place is not None:
            calls.append(LayerCall(place, None, output, pairs, geometry["groups"]))
        if of_bias is not None:
            channel = 1 - weight.dim()  # whether there is a batch or not

            def alone(slope: Tensor) -> Iterator[Pair]:
                r = slope.movedim(channel, -1)
                yield _with_ones(r.reshape(1, -1, r.shape[-1]))

            calls.append(LayerCall(of_bias, None, output, alone))
        return calls

    return read


_PLAIN = _convolution(convolution_pairs, "stride", "padding", "dilation", "groups")
_TRANSPOSED = _convolution(
    transposed_convolution_pairs, "stride", "padding", "output_padding", "groups", "dilation"
)
_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)

READERS: dict[Any, Callable[..., list[LayerCall]]] = {
    F.linear: _named_linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    **dict.fromkeys(_MATMULS, _matmul),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _PLAIN),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _TRANSPOSED
    ),
}
"""By torch's function: (places, the value's edge, the function's arguments) ↦ the calls."""
