"""A run under Lightning's strategy "ddp", which starts this program once for each rank.

    python lightning_ddp.py NUM_DEVICES OUTPUT

writes for each optimizer the parameters after a run, whether all ranks have the same, and the
outcomes of the steps.
"""

import sys

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from problems import flat
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hvpopt
from hvpopt.solvers.stopping import ResidualNorm

NUM_ROWS, BATCH_SIZE, NUM_EPOCHS = 22, 4, 2
# Systems solved to the end: what CG has after some steps depends on rounding, which ranks change.
SOLVED = {"cg_stop": ResidualNorm(rtol=1e-11), "cg_backtracking": False, "preconditioner": None}
OPTIMIZERS = {
    "newton_cg": lambda p: hvpopt.NewtonCG(p),
    "newton_cg plain": lambda p: hvpopt.NewtonCG(p, **SOLVED),
    "trust_region": lambda p: hvpopt.TrustRegionNewtonCG(p, cg_stop=ResidualNorm(rtol=1e-11)),
    "smd": lambda p: hvpopt.SMD(p),
    "sophia_h": lambda p: hvpopt.SophiaH(p, lr=0.01, update_every=2),
    "handover": lambda p: hvpopt.Handover(
        p,
        [
            hvpopt.Stage(torch.optim.Adam, lr=0.01, stall_tolerance=0.5, stall_window=1),
            hvpopt.Stage(hvpopt.NewtonCG, **SOLVED),
        ],
    ),
}


class Net(L.LightningModule):
    """Nothing in it knows of ranks."""

    def __init__(self, make_optimizer):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.make_optimizer = make_optimizer
        self.outcomes = []

    def training_step(self, batch):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_epoch=True, on_step=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    def on_train_batch_end(self, *_):
        report = getattr(self.trainer.optimizers[0], "last_report", None)
        self.outcomes.append(None if report is None else report.outcome.name)


def rows():
    """The data."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_ROWS, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (NUM_ROWS,), generator=generator))


def trainer(**options):
    """A quiet one."""
    return L.Trainer(
        max_epochs=NUM_EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def main(num_devices, output):
    """One rank's part; the first writes what came of it."""
    torch.set_num_threads(1)
    found = {}
    for name, make_optimizer in OPTIMIZERS.items():
        module = Net(make_optimizer)
        trainer(strategy="ddp", devices=num_devices).fit(
            module, DataLoader(rows(), batch_size=BATCH_SIZE, shuffle=True)
        )
        params = flat(module.parameters())
        everywhere = [torch.zeros_like(params) for _ in range(num_devices)]
        dist.all_gather(everywhere, params)
        same = all(torch.equal(params, other) for other in everywhere)
        found[name] = {"params": params, "same": same, "outcomes": module.outcomes}
    if dist.get_rank() == 0:
        torch.save(found, output)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
