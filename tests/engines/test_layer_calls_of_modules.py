"""Recorded calls inside attention, recurrent layers, checkpoints and autocast."""

import pytest
import torch
from layer_gradients import X, assert_explained, explained, randn
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvpopt.engines.layer_calls import LayerCalls


def attention(**options):
    torch.manual_seed(0)
    return nn.MultiheadAttention(4, 2, dtype=torch.float64, **options)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({}, "same"),
        ({"batch_first": True}, "same"),
        ({}, "memory"),
        ({}, "three"),
        ({"kdim": 3, "vdim": 5}, "three"),
    ],
)
def test_attention_is_seen_inside(options, inputs, need_weights):
    net = attention(**options)
    widths = options.get("kdim", 4), options.get("vdim", 4)
    q, k, v = randn(3, 2, 4), randn(5, 2, widths[0]), randn(5, 2, widths[1], seed=1)
    q, k, v = {"same": (q, q, q), "memory": (q, k, k), "three": (q, k, v)}[inputs]
    expected = net(q, k, v, need_weights=need_weights)[0]
    params = list(net.parameters())
    with LayerCalls(params):
        torch.testing.assert_close(net(q, k, v, need_weights=need_weights)[0], expected)
    assert_explained(params, lambda: net(q, k, v, need_weights=need_weights)[0])


def test_a_transformer_layer_is_seen_inside():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, dtype=torch.float64)
    named = {n: p for n, p in net.named_parameters() if "norm" not in n}
    assert_explained(list(named.values()), lambda: net(randn(2, 5, 4)))


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"bidirectional": True, "batch_first": True}]
)
@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU, "relu"])
def test_recurrent_layers_are_seen_step_by_step(make, options):
    torch.manual_seed(0)
    if make == "relu":
        make, options = nn.RNN, {**options, "nonlinearity": "relu"}
    net = make(3, 4, num_layers=2, dtype=torch.float64, **options)
    x, params = randn(5, 6, 3), list(net.parameters())
    expected, last = net(x)
    with LayerCalls(params):
        found, found_last = net(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_last, last)
    assert_explained(params, lambda: net(x)[0])
    assert_explained(params, lambda: net(x[0])[0])


@pytest.mark.parametrize("make", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_recurrent_cells_are_seen(make):
    torch.manual_seed(0)
    net = make(3, 4, dtype=torch.float64)
    params = list(net.parameters())

    def run():
        state = None
        for x in randn(3, 2, 3):
            state = net(x, state)
        return state[0] if isinstance(state, tuple) else state

    expected = run()
    with LayerCalls(params):
        torch.testing.assert_close(run(), expected)
    assert_explained(params, run)


@pytest.mark.parametrize("options", [{"proj_size": 2}, {"dropout": 0.5, "num_layers": 2}])
def test_recurrent_layers_that_are_not_known_have_no_calls_and_run_as_they_are(options):
    net = nn.LSTM(3, 4, dtype=torch.float64, **options)
    torch.manual_seed(1)
    expected = net(randn(5, 2, 3))[0]
    recorder = LayerCalls(list(net.parameters()))
    torch.manual_seed(1)
    with recorder:
        torch.testing.assert_close(net(randn(5, 2, 3))[0], expected)
    assert recorder.calls == []


def test_packed_sequences_have_no_calls():
    net = nn.GRU(3, 4, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(randn(5, 2, 3), torch.tensor([5, 3]))
    recorder = LayerCalls(list(net.parameters()))
    with recorder:
        net(packed)
    assert recorder.calls == []


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
def test_values_that_are_changed_in_place_keep_their_place_in_the_graph(shape):
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)).double()
    assert_explained(list(net.parameters()), lambda: net(randn(*shape)))


def test_checkpointed_layers_are_seen():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    run = lambda: checkpoint(net, X, use_reentrant=False)  # noqa: E731
    assert_explained(list(net.parameters()), run)


def test_autocast_weights_are_recognised():
    net = nn.Linear(4, 3)
    x = X.float()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    grads, sums = explained(list(net.parameters()), lambda: run().double())
    torch.testing.assert_close(sums, list(grads), rtol=0.02, atol=0.02)
