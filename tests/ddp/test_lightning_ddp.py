"""Lightning's strategy "ddp" in several processes, against one process on the joined batches."""

import os
import subprocess
import sys
from pathlib import Path

import lightning_ddp
import pytest
import torch
from problems import flat
from torch.utils.data import DataLoader, DistributedSampler

SCRIPT = Path(lightning_ddp.__file__)
pytestmark = [
    pytest.mark.slow,  # processes that import Lightning
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class JoinedBatches:
    """The rows of all ranks' batches, as Lightning's sampler deals them out."""

    def __init__(self, data, num_ranks):
        self.samplers = [
            DistributedSampler(data, num_replicas=num_ranks, rank=rank, shuffle=True, seed=0)
            for rank in range(num_ranks)
        ]
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch):
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def __iter__(self):
        size = lightning_ddp.BATCH_SIZE
        chunks = [torch.tensor(list(sampler)).split(size) for sampler in self.samplers]
        return (torch.cat(parts).tolist() for parts in zip(*chunks, strict=True))

    def __len__(self):
        return len(list(iter(self)))


@pytest.fixture(scope="module", params=[2, 4])
def over_ranks(request, tmp_path_factory):
    """How many ranks there are, and what came of a run with each optimizer."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": str(SCRIPT.parents[1]),
    }
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(request.param), str(folder / "result.pt")],
        cwd=folder, env=environment, capture_output=True, timeout=300, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return request.param, torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize("name", lightning_ddp.OPTIMIZERS)
def test_a_fit_over_ranks_is_that_of_the_joined_batches(name, over_ranks):
    num_ranks, runs = over_ranks
    found = runs[name]
    assert found["same"]
    assert len(found["outcomes"]) > 2
    data = lightning_ddp.rows()
    joined = JoinedBatches(data, num_ranks)
    assert len({len(batch) for batch in joined}) == 2  # the last is smaller
    module = lightning_ddp.Net(lightning_ddp.OPTIMIZERS[name])
    lightning_ddp.trainer().fit(module, DataLoader(data, batch_sampler=joined))
    if name == "newton_cg":  # each rank samples labels of its own
        return
    assert found["outcomes"] == module.outcomes
    torch.testing.assert_close(found["params"], flat(module.parameters()), rtol=1e-6, atol=1e-8)
