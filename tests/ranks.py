"""Work on several ranks, each a process of its own under gloo."""

import gc
import multiprocessing
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a process that has imported these, which takes seconds.
multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "hvpopt"])


def _free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _worker(rank, port, work, path, size):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    result = work(rank)
    if rank == 0:
        torch.save(result, path)
    gc.collect()  # DDP's reducers go before the group whose threads they use
    dist.barrier()
    dist.destroy_process_group()


def in_processes(size, work, tmp_path):
    """What ``work(rank)`` returns on the first of so many ranks."""
    path = tmp_path / "result.pt"
    arguments = (_free_port(), work, path, size)
    mp.start_processes(_worker, arguments, nprocs=size, start_method="forkserver")
    return torch.load(path, weights_only=False)


def in_two_processes(work, tmp_path):
    return in_processes(2, work, tmp_path)
