"""Functions of torch that hide linear layers, written so that a function mode sees them.

Recurrent layers are one call for all their time steps; attention calls linear layers inside, but
while torch hands it to modes it rests them all.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm_cell(along: Tensor, back: Tensor, state: State) -> State:
    i, f, g, o = (along + back).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_cell(along: Tensor, back: Tensor, state: State) -> State:
    (r, z, n), (hr, hz, hn) = along.chunk(3, -1), back.chunk(3, -1)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return ((state[0] - n) * torch.sigmoid(z + hz) + n,)


def _tanh_cell(along: Tensor, back: Tensor, state: State) -> State:
    return (torch.tanh(along + back),)


def _relu_cell(along: Tensor, back: Tensor, state: State) -> State:
    return (torch.relu(along + back),)


def _layers(cell: Cell, is_lstm: bool) -> Callable[..., Any]:
    def unrolled(
        input: Tensor,
        hx: Any,
        weights: Any,
        has_biases: bool,
        num_layers: Any,
        dropout: float = 0.0,
        train: bool = False,
        bidirectional: bool = False,
        batch_first: bool = False,
    ) -> Any:
        """``torch.lstm``, ``torch.gru`` and the like, step by step; None where it is not known."""
        if not isinstance(weights, (list, tuple)):  # packed sequences have other arguments
            return None
        per_cell = 4 if has_biases else 2
        num_cells = num_layers * (2 if bidirectional else 1)
        if len(weights) != per_cell * num_cells or (dropout and train):
            return None  # projections, or random numbers of its own
        start = tuple(hx) if is_lstm else (hx,)
        x = input.transpose(0, 1) if batch_first else input
        ends: list[State] = []
        for _ in range(num_layers):
            outputs = []
            for direction in range(1 + bidirectional):
                k = len(ends)
                own = weights[per_cell * k : per_cell * (k + 1)]
                steps, end = _run(cell, x, tuple(s[k] for s in start), own, bool(direction))
                outputs.append(steps)
                ends.append(end)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        last = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
        return x.transpose(0, 1) if batch_first else x, *last

    return unrolled


def _run(
    cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor], backwards: bool
) -> tuple[Tensor, State]:
    """The states h of all steps, and the last state."""
    w_along, w_back = weights[:2]
    b_along, b_back = weights[2:] if len(weights) == 4 else (None, None)
    along = F.linear(x, w_along, b_along)
    steps = range(len(x))
    hs = []
    for t in reversed(steps) if backwards else steps:
        state = cell(along[t], F.linear(state[0], w_back, b_back), state)
        hs.append(state[0])
    return torch.stack(hs[::-1] if backwards else hs), state


def _one_step(cell: Cell, is_lstm: bool) -> Callable[..., Any]:
    def step(
        input: Tensor,
        hx: Any,
        w_along: Tensor,
        w_back: Tensor,
        b_along: Tensor | None = None,
        b_back: Tensor | None = None,
    ) -> Any:
        """``torch.lstm_cell`` and the like."""
        state = tuple(hx) if is_lstm else (hx,)
        along = F.linear(input, w_along, b_along)
        new = cell(along, F.linear(state[0], w_back, b_back), state)
        return new if is_lstm else new[0]

    return step


def _without_dispatch(function: Any) -> Any:
    """A Python function of torch that runs at once, instead of asking modes first."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


UNROLLED: dict[Any, Callable[..., Any]] = {
    torch.lstm: _layers(_lstm_cell, True),
    torch.gru: _layers(_gru_cell, False),
    torch.rnn_tanh: _layers(_tanh_cell, False),
    torch.rnn_relu: _layers(_relu_cell, False),
    torch.lstm_cell: _one_step(_lstm_cell, True),
    torch.gru_cell: _one_step(_gru_cell, False),
    torch.rnn_tanh_cell: _one_step(_tanh_cell, False),
    torch.rnn_relu_cell: _one_step(_relu_cell, False),
    F.multi_head_attention_forward: _without_dispatch(F.multi_head_attention_forward),
}
"""By the function that each stands in for; None where that had better be called."""
