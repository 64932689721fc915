"""Files in the IDX format, tiny ones, for the tests."""

import gzip
import struct

import torch


def idx_bytes(values: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + bytes(values.flatten().tolist())


def write_fashion_mnist(folder, num_train=60, num_test=20, side=28):
    """Tiny files in the format and with the names of Fashion-MNIST."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", num_train), ("t10k", num_test)):
        images = torch.randint(0, 256, (count, side, side), generator=generator)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        labels = gzip.compress(idx_bytes(torch.arange(count) % 10))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(labels)
    return folder
