"""Energies E(x, y): what inference minimises over y, as `torch.nn` modules.

| function | energy |
|---|---|
| `spen` | local and global term, plain or conditional |
| `deep_value_network` | the same with an offset; σ(−E) is the predicted quality of y |
| `input_convex` | convex in y |
| `denoising` | nearness to a noisy image and a convolutional prior |
| `feedforward` | nearness to the output of a network |

Each function returns an `EncodedEnergy`, whose encoder computes once what depends on x alone, and
whose head is what inference sees. `KnownEntries` and `KnownMeasurements` make any head one of which
entries or measurements of y are known.
"""

from hvpopt.nested.energies.base import EncodedEnergy, Encoder
from hvpopt.nested.energies.convex import ConvexEncoder, ConvexHead, input_convex
from hvpopt.nested.energies.denoising import (
    ConvolutionalPrior,
    DenoisingHead,
    NoisyImage,
    denoising,
)
from hvpopt.nested.energies.guess import Guess, GuessDistance, feedforward
from hvpopt.nested.energies.known import KnownEntries, KnownMeasurements
from hvpopt.nested.energies.layers import MLPEncoder
from hvpopt.nested.energies.local_global import LocalGlobal, deep_value_network, spen

__all__ = [
    "ConvexEncoder",
    "ConvexHead",
    "ConvolutionalPrior",
    "DenoisingHead",
    "EncodedEnergy",
    "Encoder",
    "Guess",
    "GuessDistance",
    "KnownEntries",
    "KnownMeasurements",
    "LocalGlobal",
    "MLPEncoder",
    "NoisyImage",
    "deep_value_network",
    "denoising",
    "feedforward",
    "input_convex",
    "spen",
]
