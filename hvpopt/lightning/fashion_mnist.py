"""Where Fashion-MNIST comes from: IDX files in a folder, or OpenML through scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hvpopt.lightning.idx import read_idx

__all__ = ["DEBIAN_ROOT", "find_files", "load_from_files", "load_from_openml"]

DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")

# name of the part -> (images, labels); each may be gzipped
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_NUM_TRAIN = 60_000
_SIDE = 28


def find_files(root: str | Path | None) -> dict[str, tuple[Path, Path]] | None:
    """The IDX files (images, labels) of the parts "train" and "test" in `root`.

    With `root=None`, those of Debian's package, or None where it is not installed.

    Raises:
        FileNotFoundError: if `root` is given and lacks a file.
    """
    folder = DEBIAN_ROOT if root is None else Path(root).expanduser()
    found: dict[str, tuple[Path, Path]] = {}
    for part, names in _FILES.items():
        paths = [_plain_or_gzipped(folder / name) for name in names]
        missing = [name for name, path in zip(names, paths, strict=True) if path is None]
        if missing and root is None:
            return None
        if missing:
            raise FileNotFoundError(
                f"data.root={root} holds no {missing[0]} (nor {missing[0]}.gz); Fashion-MNIST is "
                f"the four files {', '.join(sum(_FILES.values(), ()))}, each plain or gzipped."
            )
        images, labels = paths
        assert images is not None
        assert labels is not None
        found[part] = images, labels
    return found


def load_from_files(files: dict[str, tuple[Path, Path]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Images `uint8[N, 28, 28]` and labels `int64[N]` of each part.

    Raises:
        ValueError: if a file is malformed, or images and labels do not belong together.
    """
    parts = {}
    for part, (images_path, labels_path) in files.items():
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if images.shape[1:] != (_SIDE, _SIDE):
            raise ValueError(
                f"{images_path} holds images of {images.shape[1]} x {images.shape[2]} pixels, "
                f"expected {_SIDE} x {_SIDE}."
            )
        if len(images) != len(labels):
            raise ValueError(
                f"{images_path} holds {len(images)} images, but {labels_path} {len(labels)} labels."
            )
        parts[part] = images, labels.long()
    return parts


def load_from_openml() -> dict[str, tuple[Tensor, Tensor]]:
    """Images `uint8[N, 28, 28]` and labels `int64[N]` of each part, from scikit-learn's cache or
    the network.

    Raises:
        FileNotFoundError: if OpenML cannot be reached.
    """
    from sklearn.datasets import fetch_openml

    try:
        data = fetch_openml("Fashion-MNIST", version=1, as_frame=False)
    except OSError as error:  # urllib's errors and time-outs are OSErrors
        raise FileNotFoundError(
            f"Fashion-MNIST was not found: no IDX files in {DEBIAN_ROOT}, and OpenML could not be "
            f"reached ({error}). Install Debian's package (apt install dataset-fashion-mnist), or "
            f"set data.root=DIR to a folder with the four IDX files, or connect to the network "
            f"once (scikit-learn keeps a copy)."
        ) from error
    images = torch.tensor(data.data, dtype=torch.uint8).reshape(-1, _SIDE, _SIDE)
    labels = torch.tensor(data.target.astype("int64"))
    return {
        "train": (images[:_NUM_TRAIN], labels[:_NUM_TRAIN]),
        "test": (images[_NUM_TRAIN:], labels[_NUM_TRAIN:]),
    }


def _plain_or_gzipped(path: Path) -> Path | None:
    for candidate in (path.with_name(path.name + ".gz"), path):
        if candidate.is_file():
            return candidate
    return None
