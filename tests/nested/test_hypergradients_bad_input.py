"""Bad input to the hypergradients is answered by name."""

import pytest
import torch

from hvpopt.nested import ForwardMode, Implicit, Neumann, Unrolled
from hvpopt.nested.hypergradients import hypergradient, unrolled_hypergradient

ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ({"params": {}}, {}, ValueError, "params hold no tensor"),
        ({"hparams": []}, {}, ValueError, "hparams hold no tensor"),
        ({"hparams": 3.0}, {}, TypeError, "hparams is a float; expected a tensor"),
        ({"params": torch.arange(2)}, {}, TypeError, "params is torch.int64"),
        (
            {"hparams": {"net": [ONE, torch.tensor(3)]}},
            {},
            TypeError,
            r"hparams\['net'\]\[1\] is torch.int64; expected real floating point: convert it with "
            r"\.float\(\), or leave out what has no derivative, and let the losses take it",
        ),
        (
            {"hparams": {"depth": 3}},
            {},
            TypeError,
            r"hparams\['depth'\] is a int; expected a tensor",
        ),
        ({"inner_loss": lambda w, h: w * h}, {}, ValueError, r"inner_loss returned .* \(2,\)"),
        ({"outer_loss": lambda w, h: w}, {}, ValueError, r"outer_loss returned .* \(2,\)"),
        ({"outer_loss": lambda w, h: 1.0}, {}, TypeError, "outer_loss returned a float"),
        (
            {"outer_loss": lambda w, h: w.detach().sum()},
            {},
            ValueError,
            "outer_loss depends neither on params nor on hparams",
        ),
        (
            {"outer_loss": lambda w, h: (w - 2).log().sum()},
            {},
            ValueError,
            "outer_loss is nan at these parameters",
        ),
        (
            {"inner_loss": lambda w, h: (h * (w - 1).log()).sum()},
            {},
            ValueError,
            "inner_loss is -inf at these parameters",
        ),
        ({}, {"start": torch.ones(3)}, ValueError, r"start has shape \(3,\); expected \(2,\)"),
        ({}, {"adjoint": Unrolled()}, TypeError, "take unrolled_hypergradient"),
        ({}, {"adjoint": "unrolled"}, TypeError, r"adjoint=Unrolled\(\); expected an Implicit or"),
        ({}, {"adjoint": "implict"}, ValueError, "adjoint='implict' is unknown"),
        ({}, {"adjoint": 3}, TypeError, "adjoint=3; expected an Implicit or"),
        ({}, {"adjoint": Neumann()}, ValueError, "give a step_size below 2 / λ_max"),
    ],
)
def test_bad_input_to_hypergradient_is_answered_by_name(arguments, options, error, message):
    given = {
        "inner_loss": lambda w, h: (h * (w - 1) ** 2).sum(),
        "outer_loss": lambda w, h: w.sum(),
        "params": ONE,
        "hparams": ONE,
    }
    with pytest.raises(error, match=message):
        hypergradient(**{**given, **arguments}, **options)


PATH = {
    "step": lambda w, h, t: w * h,
    "outer_loss": lambda w, h: w.sum(),
    "params": torch.ones(2),
    "hparams": torch.ones(2),
    "num_steps": 3,
}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"params": []}, ValueError, "params hold no tensor"),
        ({"hparams": torch.arange(2)}, TypeError, "hparams is torch.int64"),
        ({"num_steps": 0}, ValueError, "num_steps=0 is out of range"),
        ({"adjoint": Implicit()}, TypeError, "a solved inner problem: take hypergradient"),
        ({"adjoint": "unroled"}, ValueError, "adjoint='unroled' is unknown"),
        ({"adjoint": 3}, TypeError, "adjoint=3; expected an Unrolled, "),
        (
            {"step": lambda w, h, t: w.sum()},
            ValueError,
            r"the result of step has shape \(\); expected \(2,\) as in params",
        ),
        ({"step": lambda w, h, t: [w]}, ValueError, "the result of step"),
        (
            {"step": lambda w, h, t: w * torch.inf},
            ValueError,
            "outer_loss is inf at these parameters.*may have diverged",
        ),
        (
            {"adjoint": ForwardMode(max_directions=1)},
            ValueError,
            r"hparams have 2 entries, but ForwardMode\(max_directions=1\)",
        ),
    ],
)
def test_bad_input_to_unrolled_hypergradient_is_answered_by_name(given, error, message):
    with pytest.raises(error, match=message):
        unrolled_hypergradient(**{**PATH, **given})
