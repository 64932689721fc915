"""Recorded calls of products, convolutions and embeddings make up the gradients of autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layer_gradients import X, assert_explained, randn, weight
from torch import nn

from hvpopt.engines.layer_calls import LayerCalls

W, B, V, C, U, D = (weight(*s) for s in ((3, 4), (3,), (4, 3), (3,), (3, 4), (3,)))
PRODUCTS = {
    "linear": ([W, B], lambda: F.linear(X, W, B)),
    "without bias": ([W], lambda: F.linear(X, weight=W)),
    "frozen bias": ([W], lambda: F.linear(X, W, B.detach())),
    "frozen weight": ([B], lambda: F.linear(X, W.detach(), bias=B)),
    "sequence": ([W, B], lambda: F.linear(randn(2, 5, 4), W, B)),
    "one vector": ([W, B], lambda: F.linear(X[0], W, B)),
    "transpose of a parameter": ([W], lambda: F.linear(randn(5, 3), W.T)),
    "transpose with bias": ([W, B], lambda: F.linear(randn(5, 4), W.T.T, B)),
    "x @ W": ([W], lambda: randn(5, 3) @ W),
    "x @ W.T": ([W], lambda: X @ W.T),
    "x @ W.t()": ([W], lambda: torch.matmul(randn(2, 5, 4), W.t())),
    "mm": ([W], lambda: torch.mm(randn(5, 3), W)),
    "mm by name": ([W], lambda: torch.mm(randn(5, 3), mat2=W)),
    "method": ([W], lambda: X.matmul(W.mT)),
    "W @ x": ([W], lambda: W @ randn(4, 5)),
    "W @ vector": ([W], lambda: W @ X[0]),
    "both parameters": ([W, V], lambda: W @ V),
    "factored": ([W, B, V], lambda: F.linear(F.linear(X, W, B), V)),
    "tied": ([W, B], lambda: F.linear(X, W, B) @ W),
    "addmm": ([W, B], lambda: torch.addmm(B, X, W.T)),
    "addmm of a parameter as it is": ([V, C], lambda: torch.addmm(C, X, V)),
    "addmm scaled": ([W], lambda: torch.addmm(B, X, W.T, beta=0.5, alpha=2.0)),
    "addmm of a residual": ([W], lambda: torch.addmm(randn(5, 3), X, W.T)),
    "some rows": ([W], lambda: torch.cat([F.linear(X, w) for w in W.split(2)], 1)),
    "some rows with bias": (
        [W, B],
        lambda: torch.cat([F.linear(X, W[:1], B[:1]), F.linear(2 * X, W[1:], B[1:])], 1),
    ),
    "a bias with two weights": ([W, B, U], lambda: F.linear(X, W, B) + F.linear(X, U, B)),
    "a weight with two biases": ([W, B, D], lambda: F.linear(X, W, B) + F.linear(X, W, D)),
    "a weight with and without": ([W, B], lambda: F.linear(X, W, B) + F.linear(2 * X, W)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_pairs_of_matrix_products_make_up_the_gradient(name):
    assert_explained(*PRODUCTS[name])


CONVOLUTIONS = {
    "1d": (1, {}),
    "2d": (2, {}),
    "3d": (3, {}),
    "strided": (2, {"stride": (2, 1), "padding": (1, 2)}),
    "dilated": (2, {"dilation": 2, "padding": 1, "stride": 2}),
    "groups": (2, {"groups": 2}),
    "same": (2, {"padding": "same", "dilation": (1, 2)}),
    "same of even size": (1, {"padding": "same", "kernel_size": 4}),
    "valid": (1, {"padding": "valid"}),
    "circular": (2, {"padding": 1, "padding_mode": "circular"}),
    "without bias": (3, {"bias": False, "stride": 2}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_pairs_of_convolutions_make_up_the_gradient(name, batched):
    num_dims, options = CONVOLUTIONS[name]
    options = {"kernel_size": 3, **options}
    make = [nn.Conv1d, nn.Conv2d, nn.Conv3d][num_dims - 1]
    net = make(4, 6, dtype=torch.float64, **options)
    image = [7, 6, 5][:num_dims]
    x = randn(2, 4, *image) if batched else randn(4, *image)
    assert_explained(list(net.parameters()), lambda: net(x))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("num_dims", "options"),
    [
        (1, {}),
        (2, {"stride": (2, 3), "padding": 1, "output_padding": (1, 2)}),
        (2, {"groups": 2, "dilation": 2}),
        (2, {"dilation": 3, "output_padding": 2, "stride": 2}),
        (3, {"stride": 2, "bias": False}),
    ],
)
def test_the_pairs_of_transposed_convolutions_make_up_the_gradient(num_dims, options, batched):
    make = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][num_dims - 1]
    net = make(4, 6, 3, dtype=torch.float64, **options)
    image = [4, 3, 3][:num_dims]
    x = randn(2, 4, *image) if batched else randn(4, *image)
    assert_explained(list(net.parameters()), lambda: net(x))


def test_many_patches_come_in_chunks(monkeypatch):
    monkeypatch.setattr("hvpopt.engines.patches._CHUNK", 1)
    net = nn.Conv2d(2, 3, 3, dtype=torch.float64)
    up = nn.ConvTranspose2d(3, 2, 2, dtype=torch.float64)
    params = [*net.parameters(), *up.parameters()]
    assert_explained(params, lambda: up(net(randn(5, 2, 4, 4))))


@pytest.mark.parametrize("padding_idx", [None, 1, -1])
def test_the_pairs_of_an_embedding_make_up_the_gradient(padding_idx):
    table = nn.Embedding(6, 3, padding_idx=padding_idx, dtype=torch.float64)
    x = torch.tensor([[0, 1, 1], [5, 2, 0]])
    assert_explained([table.weight], lambda: table(x))


def test_a_weight_used_many_times_has_a_call_for_each():
    w = weight(4, 4)

    def run():
        h = X
        for _ in range(3):
            h = torch.tanh(F.linear(h, w))
        return F.embedding(torch.tensor([0, 2]), w) @ h.T @ h

    recorder = LayerCalls([w])
    with recorder:
        run()
    assert len(recorder.calls) == 4
    assert_explained([w], run)


def test_a_bias_of_two_weights_has_calls_of_its_own():
    other = weight(3, 4)
    recorder = LayerCalls([W, B, other])
    with recorder:
        F.linear(F.linear(X, W, B) @ W, other, B)
    assert [(c.weight, c.bias) for c in recorder.calls] == [
        (0, None), (1, None), (0, None), (2, None), (1, None),
    ]  # fmt: skip


def test_what_is_no_parameter_or_has_no_gradient_is_not_recorded():
    net = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    frozen = nn.Linear(3, 3).requires_grad_(False)
    params = list(net.parameters())
    recorder = LayerCalls(params)
    with recorder:
        frozen(net(X.float()))
        with torch.no_grad():
            net(X.float())
        torch.func.grad(lambda b: F.linear(X.float(), torch.ones(3, 4), b).sum())(net.bias)
    assert [(params[c.weight] is net.bias, c.bias) for c in recorder.calls] == [(True, None)]


def test_recording_changes_no_value():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).double()
    twin = copy.deepcopy(net)
    x = randn(2, 1, 4, 4)
    with LayerCalls(list(net.parameters())):
        net(x).sum().backward()
    twin(x).sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
