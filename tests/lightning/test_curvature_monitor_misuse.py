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


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps=0 is out of range"),
        ({"budget": 0}, ValueError, r"budget=0 is out of range: expected the share of the train"),
        ({"budget": 2.0}, ValueError, r"at most 1 \(0.05 are 5 %\), or None for no limit"),
        ({"metrics": ["sharpnes"]}, ValueError, "'sharpnes' is unknown; choose from sharpness, "),
        ({"metrics": []}, ValueError, "metrics is empty"),
        ({"metrics": 3}, TypeError, "metrics=3; expected names, or a mapping from names"),
        ({"curvature": "hesse"}, ValueError, "choose one of 'hessian', 'ggn', 'fisher'"),
        ({"probe": "test"}, ValueError, "probe='test' is unknown: give 'val', a batch, or a load"),
        ({"probe": []}, ValueError, r"probe=\[\] is unknown"),
        ({"probe": {}}, ValueError, r"probe=\{\} is unknown"),
        ({"probe": 3}, ValueError, "probe=3 is unknown"),
        ({"probe": iter([])}, TypeError, "a list_iterator, which can be read only once"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_named_where_it_is_given(options, error, match):
    with pytest.raises(error, match=match):
        CurvatureMonitor(**options)


class Empty:
    def __iter__(self):
        return iter(())


def test_a_loader_without_a_batch_is_named(tmp_path):
    with pytest.raises(ValueError, match="CurvatureMonitor's probe, a Empty, yields no batch"):
        fit(torch.optim.SGD, tmp_path, callbacks=[CurvatureMonitor(probe=Empty())])


def test_an_error_on_the_probe_says_whose_batch_it_was(tmp_path):
    monitor = CurvatureMonitor(probe=[torch.zeros(2, 2, 2, 2)])
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        fit(torch.optim.SGD, tmp_path, callbacks=[monitor])
    assert any("This was CurvatureMonitor's probe" in note for note in caught.value.__notes__)
