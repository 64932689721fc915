"""`hvpopt task=doctor`: its table, its file and its exit status."""

import json

import lightning as L
import pytest
import torch
from doctor_modules import Net
from torch.utils.data import DataLoader

from hvpopt import SMD
from hvpopt.lightning.doctor import CannotTrainError, run

QUICK = ["task=doctor", "task.seconds=0", "trainer.accelerator=cpu", "hydra.run.dir=run"]


def test_the_command_prints_the_table_and_ends_well(hvpopt, tmp_path):
    code, out, err = hvpopt(*QUICK, "model=mlp", "data.num_train=64")
    assert (code, err) == (0, "")
    table = out.strip()
    assert table.startswith("Classifier with NewtonCG: 17,226 trained parameters, float32, on cpu")
    assert table.endswith("It can train.")
    assert "Products of" not in table
    report = json.loads((tmp_path / "run" / "doctor.json").read_text())
    assert report["module"] == "Classifier"
    assert [e["is_supported"] for e in report["engines"]] == [True] * 5


def test_the_command_ends_with_1_where_it_could_not_train(hvpopt):
    engine = "optimizer.engine=finite_difference"  # which has no GGN
    code, out, err = hvpopt(*QUICK, "model=mlp", "data.num_train=64", engine)
    assert code == 1
    assert "It cannot train: see one step." in out
    assert err.startswith("\nhvpopt: one step: NewtonCG raised ValueError")
    assert err.strip().count("\n") == 0


def test_clipping_is_seen_in_the_configuration(hvpopt):
    code, out, _ = hvpopt(*QUICK, "model=mlp", "data.num_train=64", "trainer.gradient_clip_val=1")
    assert code == 0
    assert "clipping                warning  gradient_clip_val=1 clips the gradient" in out


class Data(L.LightningDataModule):
    def __init__(self, count=6):
        super().__init__()
        self.count = count

    def train_dataloader(self):
        rows = [(torch.ones(10) * i, i % 4) for i in range(self.count)]
        return DataLoader(rows, batch_size=3)


def make_trainer(**options):
    return L.Trainer(
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, **options
    )


def test_the_task_sets_the_module_up_as_a_fit_would(tmp_path):
    class Late(Net):
        def configure_model(self):
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def setup(self, stage):
            assert stage == "fit"
            assert self.trainer.datamodule.trainer is self.trainer
            self.net[1] = torch.nn.Sigmoid()

        def training_step(self, batch):
            return self.scale * super().training_step(batch)

        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 2 * self.trainer.max_epochs
            return SMD(self.parameters())

    report = run(
        Late(), Data(), lambda **options: make_trainer(max_epochs=3, **options),
        output_dir=tmp_path, seconds=0.0,
    )  # fmt: skip
    assert report.num_params == 125
    assert report.can_train, str(report)


def test_a_failure_is_raised_with_its_report(tmp_path):
    def wrong(z, y):
        raise IndexError("no such class")

    with pytest.raises(CannotTrainError, match="loss: training_step raised IndexError") as caught:
        run(Net(loss=wrong), Data(), make_trainer, output_dir=tmp_path, seconds=0.0)
    assert not caught.value.report.can_train
    assert json.loads((tmp_path / "doctor.json").read_text())["loss"] is None


@pytest.mark.filterwarnings("ignore:Total length of")
def test_data_without_a_batch_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"Data.train_dataloader\(\) yields no batch"):
        run(Net(), Data(0), make_trainer, output_dir=tmp_path, seconds=0.0)
