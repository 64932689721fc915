"""SPENModule's phases in two processes, against one process on the joined batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import spen_ddp
import torch
from spen_problems import network, trainer
from torch.utils.data import DataLoader, DistributedSampler

from hvpopt.lightning.phases import Phase
from hvpopt.nested.losses import EndToEnd, LabelByLabel

SCRIPT = Path(spen_ddp.__file__)
REMEDY = r"trainer\.strategy=ddp_find_unused_parameters_true"


def in_two_processes(strategy, folder):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": str(SCRIPT.parents[1]),
    }
    return subprocess.run(
        [sys.executable, str(SCRIPT), strategy, str(folder / "result.pt")],
        check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_plain_ddp_is_refused_before_training_by_what_to_set(tmp_path):
    ended = in_two_processes("ddp", tmp_path)
    assert ended.returncode != 0
    assert "set trainer.strategy=ddp_find_unused_parameters_true" in ended.stderr
    assert "Expected to have finished reduction" not in ended.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_phases_over_two_ranks_are_those_of_the_joined_batches(tmp_path):
    ended = in_two_processes("ddp_find_unused_parameters_true", tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    assert found["same"]
    data = spen_ddp.rows()
    module = spen_ddp.fitted(tmp_path, DataLoader(data, batch_sampler=Joined(data)))
    torch.testing.assert_close(found["params"], spen_ddp.flat(module), rtol=1e-8, atol=1e-10)


class Joined:
    """The rows of both ranks' batches, as Lightning's sampler deals them out."""

    def __init__(self, data):
        self.samplers = [DistributedSampler(data, 2, rank, seed=0) for rank in range(2)]
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch):
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def __iter__(self):
        parts = [torch.tensor(list(s)).split(spen_ddp.BATCH_SIZE) for s in self.samplers]
        return (torch.cat(pair).tolist() for pair in zip(*parts, strict=True))

    def __len__(self):
        return len(list(iter(self)))


@pytest.mark.parametrize(
    ("phases", "refused"),
    [
        ({"head": Phase(EndToEnd(), trains="head")}, True),
        ({"classifier": Phase(LabelByLabel())}, True),  # which never evaluates the head
        ({"first": Phase(LabelByLabel(), 1, "encoder"), "all": Phase(EndToEnd())}, True),
        ({"all": Phase(EndToEnd())}, False),
    ],
)
def test_only_phases_that_leave_parameters_without_gradient_are_refused(tmp_path, phases, refused):
    module = network(phases)
    module.trainer = trainer(tmp_path, 1, strategy="ddp", devices=1)
    if refused:
        with pytest.raises(ValueError, match=REMEDY):
            module.setup("fit")
    else:
        module.setup("fit")


def test_a_phase_that_trains_all_that_requires_gradients_is_not_refused(tmp_path):
    module = network({"classifier": Phase(LabelByLabel(), trains="encoder")})
    module.energy.head.requires_grad_(False)
    module = type(module)(module.energy, module.make_optimizer, phases=module.phases)
    module.trainer = trainer(tmp_path, 1, strategy="ddp", devices=1)
    module.setup("fit")
