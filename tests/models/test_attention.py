"""Products through attention, however it is called; the kernels torch would take have none."""

import pytest
import torch
import torch.nn.functional as F
from differences import hessian_product
from model_checks import (
    check_functional_products,
    check_products,
    classifier,
    relative_error,
    seeded,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LENGTH = 3
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "boolean mask": {
        "attn_mask": torch.tensor([[True, True, False], [False, True, True], [True, True, True]])
    },
    "additive mask": {"attn_mask": torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)},
    "dropout": {"dropout_p": 0.4},
    "scale": {"scale": 0.3},
    "grouped queries": {"enable_gqa": True, "is_causal": True},
    "all": {"dropout_p": 0.3, "is_causal": True, "scale": 0.5, "enable_gqa": True},
}


class Attention(nn.Module):
    """Four heads of two, and two of keys and values where the queries are grouped."""

    def __init__(self, *, positional: bool, **options: object) -> None:
        super().__init__()
        self.positional, self.options = positional, options
        self.query, self.key, self.value = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (2, 2)).transpose(1, 2) for f in (self.key, self.value))
        if not self.options.get("enable_gqa"):
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if self.positional:
            order = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False} | self.options
            named = {name: order.pop(name) for name in ("scale", "enable_gqa") if name in order}
            out = F.scaled_dot_product_attention(q, k, v, *order.values(), **named)
        else:
            out = F.scaled_dot_product_attention(query=q, key=k, value=v, **self.options)
        return self.head(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("positional", [True, False], ids=["positional", "by keyword"])
@pytest.mark.parametrize("call", CALLS)
def test_products_through_scaled_dot_product_attention(call, positional):
    torch.manual_seed(0)
    net = Attention(positional=positional, **CALLS[call])
    check_products(classifier(net, torch.randn(2, LENGTH, 4, dtype=torch.float64)))


def test_a_kernel_that_the_closure_chooses_itself_gives_way():
    torch.manual_seed(0)
    model = classifier(
        Attention(positional=True, is_causal=True), torch.randn(2, LENGTH, 4, dtype=torch.float64)
    )

    def closure() -> None:
        model.net.zero_grad()
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            loss = model.loss(model.output())
        loss.backward()

    v = model.tangent()
    expected = hessian_product(closure, model.params, v, model.net).value
    for engine in ("auto", "dual", "graph"):
        with seeded(closure, model.params, engine=engine) as oracle:
            assert relative_error(oracle.trace().product(v), expected) < 1e-8, engine


class First(nn.Module):
    """The first of what a layer returns, then a linear layer to the classes."""

    def __init__(self, core: nn.Module, width: int) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(width, 3)

    def forward(self, *inputs: Tensor, **options: object) -> Tensor:
        return self.head(self.core(*inputs, **options)[0])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_products_through_multihead_attention(training, need_weights):
    torch.manual_seed(0)
    core = nn.MultiheadAttention(
        4, 2, dropout=0.2, add_bias_kv=True, add_zero_attn=True, batch_first=True
    )
    x = torch.randn(2, LENGTH, 4, dtype=torch.float64)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    net = First(core, 4).train(training)
    model = classifier(net, x, x, x, key_padding_mask=padding, need_weights=need_weights)
    check_products(model)


def test_products_through_cross_attention_of_other_widths():
    torch.manual_seed(0)
    core = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    shapes = [(LENGTH, 2, 4), (4, 2, 3), (4, 2, 5)]
    check_products(
        classifier(First(core, 4), *(torch.randn(s, dtype=torch.float64) for s in shapes))
    )


def encoder(*, training: bool, norm_first: bool = False, dropout: float = 0.1) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        4, 2, 6, dropout=dropout, activation="gelu", batch_first=True, norm_first=norm_first
    )
    core = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    return nn.Sequential(core, nn.Linear(4, 3)).train(training)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_products_through_a_transformer_encoder(training, norm_first):
    torch.manual_seed(0)
    net = encoder(training=training, norm_first=norm_first)
    check_products(classifier(net, torch.randn(2, LENGTH, 4, dtype=torch.float64)))


class Frozen(nn.Module):
    """A trained layer before a frozen encoder in evaluation mode, which has a fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 3)
        layer = nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1).requires_grad_(False).eval()

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        features = self.encoder(x, src_key_padding_mask=padding)  # the fast path: no derivatives
        inside = self.encoder(torch.tanh(self.before(x)), src_key_padding_mask=padding)
        # Where there is padding, torch's fast path gives zeros, and its other path does not.
        return self.after(inside + features) * ~padding.unsqueeze(-1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_products_around_a_frozen_encoder_on_its_fast_path():
    torch.manual_seed(0)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, LENGTH, 4, dtype=torch.float64)
    check_products(classifier(Frozen(), x, padding))


def test_products_through_a_transformer_decoder():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.1, activation="gelu", batch_first=True)
    net = nn.TransformerDecoder(layer, 1)
    x, memory = (torch.randn(2, n, 4, dtype=torch.float64) for n in (LENGTH, 2))
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    check_products(classifier(net, x, memory, tgt_mask=mask, tgt_is_causal=True))


@pytest.mark.parametrize("call", ["plain", "causal", "dropout", "grouped queries"])
def test_functional_products_through_attention(call):
    torch.manual_seed(0)
    net = Attention(positional=True, **CALLS[call])
    check_functional_products(classifier(net, torch.randn(2, LENGTH, 4, dtype=torch.float64)))


def test_functional_products_through_a_transformer_encoder():
    # Without dropout: its masks fill memory in order, and functorch changes the layout.
    torch.manual_seed(0)
    net = encoder(training=True, dropout=0.0)
    check_functional_products(classifier(net, torch.randn(2, LENGTH, 4, dtype=torch.float64)))
