"""What SPENModule, its phases and losses answer to targets and losses of the wrong kind."""

import pytest
import torch
from spen_problems import minimizer, network, trainer
from torch.utils.data import DataLoader, TensorDataset

from hvpopt.lightning.phases import Phase, checked_phases
from hvpopt.nested.losses import EndToEnd, StructuredHinge, log_loss, soft_f1, squared_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


@pytest.mark.parametrize("error", [squared_loss, log_loss, soft_f1])
def test_targets_that_would_be_broadcast_are_named(error):
    with pytest.raises(
        ValueError, match=r"target has shape \(4, 1\) for outputs y of shape \(4, 3"
    ):
        error(torch.ones(4, 3), torch.ones(4, 1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda y: y.long(), TypeError, r"target is torch.int64; expected floating point"),
        (lambda y: 5 * y, ValueError, r"target lies outside of the minimizer's domain Box.* to 5;"),
        (lambda y: y / 0 * 0, ValueError, r"target lies outside of the minimizer's domain Box"),
    ],
)
@pytest.mark.parametrize("loss", [EndToEnd, StructuredHinge])
def test_targets_that_inference_cannot_find_are_named(tmp_path, loss, change, error, message):
    module = network({"only": Phase(loss())}, minimizer=minimizer())
    rows = TensorDataset(torch.ones(4, 8), change(torch.ones(4, 6)))
    with pytest.raises(error, match=message):
        trainer(tmp_path, 1).fit(module, DataLoader(rows, 4))


def test_a_loss_that_is_none_is_named():
    with pytest.raises(TypeError, match=r"loss='hinge'; expected a loss of hvpopt.nested.losses"):
        Phase("hinge")


def test_a_loss_in_the_place_of_a_phase_is_named():
    with pytest.raises(TypeError, match=r"phases.only is a EndToEnd; expected a Phase"):
        checked_phases({"only": EndToEnd()})
