"""What the doctor says of optimizers that are missing, and of monitors that cannot measure."""

import lightning as L
import pytest
import torch
from doctor_modules import BATCH, Net, Ordinary
from torch.utils.data import DataLoader, TensorDataset

import hvpopt
from hvpopt.lightning.callbacks import CurvatureMonitor
from hvpopt.lightning.doctor import doctor


def examined(module, monitor, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=monitor,
        **options,
    )
    return doctor(module, BATCH, trainer=trainer, seconds=0.0)


def test_no_optimizer_is_a_note():
    report = doctor(Net(), BATCH, seconds=0.0)
    found = report.finding("optimizer")
    assert (found.verdict, report.optimizer) == ("note", "")
    assert "configure_optimizers returned None" in found.text
    assert report.can_train

    class Without(Net):
        configure_optimizers = L.LightningModule.configure_optimizers

    with pytest.raises(KeyError):
        doctor(Without(), BATCH, seconds=0.0).finding("optimizer")


def test_manual_optimization_is_refused_by_the_monitor():
    module = Net(make_optimizer=hvpopt.NewtonCG)
    module.automatic_optimization = False
    module.training_step = lambda batch: module.manual_backward(Net.training_step(module, batch))
    report = examined(module, CurvatureMonitor())
    assert [f.subject for f in report.failures] == ["callbacks"]
    assert "CurvatureMonitor refuses the fit" in report.finding("callbacks").text
    assert "under manual optimization" in report.finding("callbacks").remedy


def test_validation_batches_that_never_come_are_refused():
    module = Net(make_optimizer=hvpopt.NewtonCG)
    found = examined(module, CurvatureMonitor(probe="val")).finding("callbacks")
    assert found.verdict == "failure"
    assert "this fit has no validation" in found.remedy


WRONG = torch.randn(6, 11), torch.arange(6) % 4
RIGHT = DataLoader(TensorDataset(*BATCH), batch_size=2)


@pytest.mark.parametrize("probe", [WRONG, DataLoader(TensorDataset(*WRONG))])
def test_a_probe_of_other_shapes_is_found(probe):
    found = examined(Net(make_optimizer=hvpopt.NewtonCG), CurvatureMonitor(probe=probe))
    found = found.finding("callbacks")
    assert (found.verdict, found.text) == (
        "failure",
        "CurvatureMonitor's probe: its loss raised RuntimeError",
    )
    assert "cannot be multiplied" in found.remedy
    assert found.remedy.endswith("Give batches as the train loader yields them.")


@pytest.mark.parametrize("probe", [None, BATCH, RIGHT])
def test_a_probe_that_fits_is_no_finding_and_leaves_no_trace(probe):
    module, monitor = Ordinary(hvpopt.NewtonCG), CurvatureMonitor(probe=probe)
    report = examined(module, monitor)
    assert report.can_train, str(report)
    with pytest.raises(KeyError):
        report.finding("callbacks")
    assert module.num_calls == 0
    assert module.net[1].num_batches_tracked == 0
    assert monitor._probe._items is None
