"""Reader of IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["read_idx"]

_UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path, ndim: int) -> Tensor:
    """The array of unsigned bytes in an IDX file, `uint8` of `ndim` dimensions.

    The file is a big-endian header, then the values: two zero bytes, the type code (0x08 for
    unsigned bytes), the number of dimensions, and each dimension's size in four bytes. A name that
    ends in `.gz` is decompressed (format: Y. LeCun, "The MNIST database of handwritten digits").

    Raises:
        ValueError: if the header is not one of `ndim`-dimensional unsigned bytes, or the file is
            shorter or longer than its header says; names the file, what was expected and found.
    """
    path = Path(path)
    content = _content(path)
    expected = bytes([0, 0, _UNSIGNED_BYTE, ndim])
    if content[:4] != expected:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes with {ndim} dimensions: expected it to "
            f"begin with {expected.hex(' ')}, found {content[:4].hex(' ') or 'nothing'}."
        )
    header_size = 4 + 4 * ndim
    if len(content) < header_size:
        raise ValueError(
            f"{path} ends within its header: expected {header_size} bytes, found {len(content)}."
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header_size, 4)]
    num_values = len(content) - header_size
    if num_values != math.prod(shape):
        raise ValueError(
            f"{path} is {'truncated' if num_values < math.prod(shape) else 'too long'}: its header "
            f"says {' x '.join(map(str, shape))} = {math.prod(shape)} values, found {num_values}."
        )
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return values[header_size:].reshape(shape)


def _content(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is not a complete gzip file: {error}. Fetch it again, or point data.root at "
            f"another copy."
        ) from error
