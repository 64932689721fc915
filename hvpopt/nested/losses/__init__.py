"""Losses that train an energy: `loss(energy, x, target, minimizer, step=...)`, a `LossValue`.

| class | learns from |
|---|---|
| `LabelByLabel` | the encoder's scores alone, as a classifier |
| `FirstGuess` | the error of the first guess, without inference |
| `EndToEnd` | the error of inference's output, differentiated through inference |
| `StructuredHinge` | the most offending output of loss-augmented inference |
| `DeepValue` | the quality of inferred and adversarial outputs, as a regression |
| `Ranking`, `Contrastive` | comparisons of the right output with inferred and corrupted ones |
"""

from hvpopt.nested.losses.base import Loss, LossValue, Minimizer
from hvpopt.nested.losses.classification import LabelByLabel
from hvpopt.nested.losses.contrast import Contrastive, Ranking
from hvpopt.nested.losses.deep_value import DeepValue
from hvpopt.nested.losses.end_to_end import EndToEnd
from hvpopt.nested.losses.first_guess import FirstGuess
from hvpopt.nested.losses.hinge import AugmentedHead, StructuredHinge
from hvpopt.nested.losses.task import log_loss, soft_f1, soft_f1_loss, squared_loss

__all__ = [
    "AugmentedHead",
    "Contrastive",
    "DeepValue",
    "EndToEnd",
    "FirstGuess",
    "LabelByLabel",
    "Loss",
    "LossValue",
    "Minimizer",
    "Ranking",
    "StructuredHinge",
    "log_loss",
    "soft_f1",
    "soft_f1_loss",
    "squared_loss",
]
