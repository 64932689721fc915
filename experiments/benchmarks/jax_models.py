"""The networks of `models` in JAX, as functions of parameters that bear torch's names.

Images are batch × height × width × channels and kernels height × width × in × out, the order that
JAX's users choose.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = Any
Params = dict[str, Array]


def cross_entropy(logits: Array, targets: Array) -> Array:
    """The mean cross-entropy of classes in the last dimension."""
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probabilities, targets[..., None], -1).mean()


def mlp(p: Params, x: Array) -> Array:
    """Linear layers with ReLU in between."""
    layers = sorted({int(name.partition(".")[0]) for name in p})
    for i in layers[:-1]:
        x = jax.nn.relu(_linear(p, str(i), x))
    return _linear(p, str(layers[-1]), x)


def cnn(p: Params, x: Array) -> Array:
    """Three convolutions with BatchNorm and ReLU."""
    for conv, stride in ((0, 1), (3, 2), (6, 2)):
        x = jax.nn.relu(_conv_norm(p, str(conv), str(conv + 1), x, stride))
    return _linear(p, "11", x.mean((1, 2)))


def resnet(p: Params, x: Array) -> Array:
    """ResNet-18's blocks."""
    x = jax.nn.relu(_conv_norm(p, "0", "1", x, 1))
    block = 0
    while f"{block + 3}.inner.0.weight" in p:
        name, stride = str(block + 3), 2 if block in (2, 4, 6) else 1
        inner = jax.nn.relu(_conv_norm(p, f"{name}.inner.0", f"{name}.inner.1", x, stride))
        inner = _conv_norm(p, f"{name}.inner.3", f"{name}.inner.4", inner, 1)
        if f"{name}.outer.0.weight" in p:
            x = _conv_norm(p, f"{name}.outer.0", f"{name}.outer.1", x, stride)
        x = jax.nn.relu(inner + x)
        block += 1
    return _linear(p, str(block + 5), x.mean((1, 2)))


def gpt(p: Params, text: Array) -> Array:
    """A causal transformer."""
    length = text.shape[1]
    x = p["token.weight"][text] + p["position.weight"][:length]
    visible = jnp.tril(jnp.ones((length, length), bool))
    block = 0
    while f"blocks.{block}.qkv.weight" in p:
        x = _block(p, f"blocks.{block}", x, visible)
        block += 1
    return _linear(p, "head", _layer_norm(p, "norm", x))


def lstm(p: Params, text: Array) -> Array:
    """Recurrent layers, by ``lax.scan``."""
    x = p["token.weight"][text]
    layer = 0
    while f"recurrent.weight_ih_l{layer}" in p:
        x = _recurrent(p, layer, x)
        layer += 1
    return _linear(p, "head", x)


MODELS: dict[str, Callable[[Params, Array], Array]] = {
    "mlp": mlp,
    "tiny": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "gpt": gpt,
    "lstm": lstm,
}


def _linear(p: Params, name: str, x: Array) -> Array:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _conv_norm(p: Params, conv: str, norm: str, x: Array, stride: int) -> Array:
    """A convolution, then BatchNorm by the batch's own statistics."""
    kernel = p[f"{conv}.weight"]
    pad = kernel.shape[0] // 2
    x = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = _standardized(x, (0, 1, 2))
    return x * p[f"{norm}.weight"] + p[f"{norm}.bias"]


def _layer_norm(p: Params, name: str, x: Array) -> Array:
    return _standardized(x, -1) * p[f"{name}.weight"] + p[f"{name}.bias"]


def _standardized(x: Array, axes: Any) -> Array:
    mean = x.mean(axes, keepdims=True)
    variance = ((x - mean) ** 2).mean(axes, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5)


def _block(p: Params, name: str, x: Array, visible: Array, heads: int = 4) -> Array:
    batch, length, width = x.shape
    qkv = _linear(p, f"{name}.qkv", _layer_norm(p, f"{name}.norm1", x))
    q, k, v = jnp.split(qkv.reshape(batch, length, 3 * heads, width // heads), 3, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // heads) ** 0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
    x = x + _linear(p, f"{name}.out", mixed)
    up = jax.nn.gelu(
        _linear(p, f"{name}.up", _layer_norm(p, f"{name}.norm2", x)), approximate=False
    )
    return x + _linear(p, f"{name}.down", up)


def _recurrent(p: Params, layer: int, x: Array) -> Array:
    """One layer over batch × length × features; the inputs' part of the gates comes first."""
    into, hidden = p[f"recurrent.weight_ih_l{layer}"], p[f"recurrent.weight_hh_l{layer}"]
    bias = p[f"recurrent.bias_ih_l{layer}"] + p[f"recurrent.bias_hh_l{layer}"]
    gates = jnp.swapaxes(x @ into.T + bias, 0, 1)
    zeros = jnp.zeros((x.shape[0], hidden.shape[1]), x.dtype)
    step = partial(_lstm_step, hidden)
    return jnp.swapaxes(lax.scan(step, (zeros, zeros), gates)[1], 0, 1)


def _lstm_step(hidden: Array, state: tuple[Array, Array], gates: Array) -> Any:
    h, c = state
    i, f, g, o = jnp.split(gates + h @ hidden.T, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h
