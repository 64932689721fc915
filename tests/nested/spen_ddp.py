"""SPENModule under data parallelism, which starts this program once for each rank.

    python spen_ddp.py STRATEGY OUTPUT

writes the parameters after training in phases, and whether both ranks have the same.
"""

import sys

import torch
import torch.distributed as dist
from spen_problems import blocks, network, trainer
from torch.utils.data import DataLoader

BATCH_SIZE, NUM_EPOCHS = 8, 4


def rows():
    """The training rows, of double precision, in the same order everywhere."""
    torch.manual_seed(0)
    data = blocks()
    data.setup("fit")
    batches = data.train_dataloader()
    return [(x.double(), y.double()) for batch in batches for x, y in zip(*batch, strict=True)]


def flat(module):
    """The energy's parameters."""
    return torch.cat([p.detach().flatten() for p in module.energy.parameters()])


def fitted(folder, loader, **options):
    """A network trained in phases."""
    module = network(scores=None).double()
    options |= {"limit_val_batches": 0, "precision": "64-true", "enable_checkpointing": False}
    trainer(folder, NUM_EPOCHS, **options).fit(module, loader)
    return module


def main(strategy, output):
    """One rank's part; the first writes what came of it."""
    torch.set_num_threads(1)
    loader = DataLoader(rows(), BATCH_SIZE, shuffle=True)
    params = flat(fitted(".", loader, strategy=strategy, devices=2))
    everywhere = [torch.zeros_like(params) for _ in range(2)]
    dist.all_gather(everywhere, params)
    if dist.get_rank() == 0:
        same = all(torch.equal(params, other) for other in everywhere)
        torch.save({"params": params, "same": same}, output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
