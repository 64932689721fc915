"""What CurvatureMonitor refuses before training begins."""

import lightning
import pytest
import torch
from fits import Square, fit

from hvpopt.lightning.callbacks import CurvatureMonitor


class Unvalidated(Square):
    validation_step = lightning.LightningModule.validation_step


def test_an_unknown_engine_is_refused_where_it_is_given():
    with pytest.raises(ValueError, match="engine='jax' is unknown: choose one of 'auto'"):
        CurvatureMonitor(engine="jax")


def test_a_loss_that_is_no_function_is_refused_where_it_is_given():
    with pytest.raises(TypeError, match="loss=3; expected a function of module and batch"):
        CurvatureMonitor(loss=3)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no")
def test_validation_batches_are_not_waited_for_in_a_fit_without_validation(tmp_path):
    with pytest.raises(ValueError, match="this fit has no validation: give it a loader or a batch"):
        fit(
            torch.optim.SGD, tmp_path, module=Unvalidated, callbacks=[CurvatureMonitor(probe="val")]
        )
