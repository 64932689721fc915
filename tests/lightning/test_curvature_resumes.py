"""A resumed run goes on measuring where the first one stopped; two processes measure as one."""

import copy
import functools

import lightning as L
import pytest
import torch
from event_files import events, scalars
from fits import Small, fit
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from hvpopt.lightning.callbacks import CurvatureMonitor, OptimizerMonitor
from hvpopt.lightning.resume import RandomState

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def adam(params):
    return torch.optim.Adam(params, 0.01)


def watched(tmp_path, name, epochs, *, ckpt_path=None, **arguments):
    """The scalars of a run of some epochs, its monitor, and its last checkpoint."""
    arguments = {"metrics": ["trace", "spectrum", "layers"], "budget": None, **arguments}
    monitor = CurvatureMonitor(3, **arguments)
    folder = tmp_path / name
    checkpoint = ModelCheckpoint(folder, filename="last", save_top_k=1)
    fit(
        adam,
        folder,
        module=Small,
        callbacks=[OptimizerMonitor(), monitor, RandomState(), checkpoint],
        epochs=epochs,
        logger=TensorBoardLogger(tmp_path, name=None, version=name),
        ckpt_path=ckpt_path,
        enable_checkpointing=True,
    )
    return events(folder), monitor, folder / "last.ckpt"


def test_a_resumed_run_measures_as_the_uninterrupted_one(tmp_path):
    whole, monitor, _ = watched(tmp_path, "whole", 4)
    _, _, checkpoint = watched(tmp_path, "first", 2)
    second, again, _ = watched(tmp_path, "second", 4, ckpt_path=checkpoint)
    expected, found = (scalars(run, "curvature/trace") for run in (whole, second))
    assert sorted(found) == [step for step in expected if step >= 8]
    for step, value in found.items():
        assert value == pytest.approx(expected[step], rel=1e-5)
    ours, theirs = (m.state_dict()["album"]["spectra"]["steps"] for m in (again, monitor))
    assert ours == theirs


def test_the_checkpoint_holds_plain_containers_the_probe_and_the_time_that_was_spent(tmp_path):
    _, _, checkpoint = watched(tmp_path, "run", 2)
    held = torch.load(checkpoint, weights_only=True)["callbacks"]
    (state,) = (s for key, s in held.items() if "CurvatureMonitor" in key)
    ((batch, batch_idx),) = state["probe"]["ranks"]
    assert batch[0].shape == (16, 10)
    assert batch_idx == 0
    assert state["schedule"]["budget"]["spent"] > 0
    assert state["schedule"]["num_measurements"] == 3  # steps 1, 3 and 6


def test_a_probe_that_was_given_is_not_in_the_checkpoint_and_one_too_large_is_missed(
    tmp_path, caplog
):
    x, y = torch.randn(5, 10), torch.zeros(5, dtype=torch.long)
    _, _, checkpoint = watched(tmp_path, "given", 1, probe=[x, y])
    held = torch.load(checkpoint, weights_only=True)["callbacks"]
    (state,) = (s for key, s in held.items() if "CurvatureMonitor" in key)
    assert state["probe"] == {}

    _, _, checkpoint = watched(tmp_path, "first", 1)
    content = torch.load(checkpoint, weights_only=True)
    for key, value in content["callbacks"].items():
        if "CurvatureMonitor" in key:
            value["probe"] = {"ranks": [None]}
    torch.save(content, checkpoint)
    found, _, _ = watched(tmp_path, "second", 2, ckpt_path=checkpoint)
    assert "The checkpoint does not hold the batch on which the curvature was" in caplog.text
    assert len(scalars(found, "curvature/trace")) > 0


def sgd(params):
    return torch.optim.SGD(params, 0.1)


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 10, generator=generator)
    return TensorDataset(x, torch.randint(0, 4, (24,), generator=generator))


def run(folder, probe, devices, start, *, is_watched=True):
    """Trains three steps of the full batch, which the processes share."""
    net = Small(sgd)
    net.load_state_dict(start)
    x, y = data().tensors
    given = {
        "first batch": None,
        "batch": [x[:8], y[:8]],
        "loader": DataLoader(data(), batch_size=4),
    }[probe]
    metrics = ["sharpness", "trace", "alignment", "spectrum", "layers", "slices"]
    monitor = CurvatureMonitor(1, metrics=metrics, probe=given, num_batches=3, budget=0.9)
    trainer = L.Trainer(
        max_epochs=3,
        log_every_n_steps=1,
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        logger=TensorBoardLogger(folder, name=None, version=f"{devices}"),
        callbacks=[monitor] if is_watched else [],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, DataLoader(data(), batch_size=24 // devices))
    return net


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("probe", ["first batch", "batch", "loader"])
def test_two_processes_measure_and_train_as_one(tmp_path, probe):
    torch.manual_seed(0)
    start = copy.deepcopy(Small(sgd).state_dict())
    work = functools.partial(run, tmp_path, probe, start=start)
    alone, parallel = work(1), work(2)
    for a, b in zip(alone.parameters(), parallel.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(parallel.parameters(), work(2, is_watched=False).parameters(), strict=True):
        assert torch.equal(a, b)
    one, two = events(tmp_path / "1"), events(tmp_path / "2")
    names = ["top_eigenvalue", "stability_threshold", "trace", "spectrum_min", "gradient_share"]
    for name in [*names, "layer_trace/net.0"]:
        expected, found = (scalars(r, f"curvature/{name}")[0] for r in (one, two))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    assert two.Images("curvature/slices_figure")
