"""Bibtex: tags of publications from the words of their records."""

from __future__ import annotations

import shutil
import urllib.request
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from hvpopt.lightning.arff import Table, read_arff
from hvpopt.lightning.multilabel import MultiLabelData, Rows, check_seed, split_rows
from hvpopt.options import check_count

__all__ = ["Bibtex"]

SOURCE = "https://raw.githubusercontent.com/tsoumakas/mulan/master/data/multi-label/bibtex"
_FILES = ("bibtex-train.arff", "bibtex-test.arff", "bibtex.xml")
_TIMEOUT_S = 60.0


class Bibtex(MultiLabelData):
    """Bibtex (Katakis, Tsoumakas and Vlahavas, ECML/PKDD Discovery Challenge 2008): 7,395 records
    of publications, 1,836 binary word features, 159 tags, 2.4 tags a record.

    The authors' split has 4,880 training and 2,515 test rows. Of the training rows, `num_val` are
    kept for validation, on which thresholds and settings are chosen.

    Args:
        folder: holds bibtex-train.arff, bibtex-test.arff (each plain or with .gz) and bibtex.xml.
        batch_size: rows a training batch.
        num_val: training rows kept for validation.
        split_seed: decides which.
        seed: decides the order of the batches; the data set's part of a run's seed.
        num_train: train on this many rows only.
        standardize: shift and scale each feature to mean 0 and standard deviation 1.
        eval_batch_size: rows a batch in validation and test.
        download: fetch the files that the folder lacks from Mulan's repository, before training.

    Raises:
        FileNotFoundError: if the folder lacks a file, and `download` is off or fails. Names the
            file and where it is to be had.
        ValueError: if a size or seed is out of range; when the data are set up, if a file is
            malformed or the files do not belong together.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 32,
        *,
        num_val: int = 488,
        split_seed: int = 0,
        seed: int = 0,
        num_train: int | None = None,
        standardize: bool = False,
        eval_batch_size: int = 512,
        download: bool = False,
    ) -> None:
        super().__init__(
            batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_train=num_train,
            standardize=standardize,
        )
        self.folder = Path(folder).expanduser()
        self.num_val = check_count("num_val", num_val)
        self.split_seed = check_seed("split_seed", split_seed)
        self.download = download
        if not download:
            for name in _FILES:
                _found(self.folder, name)

    def prepare_data(self) -> None:
        """Fetches the files that are missing, if `download` is on."""
        if self.download:
            _fetch_missing(self.folder)

    def _load(self) -> dict[str, Rows]:
        train_path, test_path, header = (_found(self.folder, name) for name in _FILES)
        self.label_names = _label_names(header)
        train, test = read_arff(train_path), read_arff(test_path)
        if train.names != test.names:
            raise ValueError(
                f"{train_path} and {test_path} do not belong together: their attributes differ."
            )
        known, val = split_rows(
            _rows(train, self.label_names, train_path), self.num_val, self.split_seed
        )
        return {"train": known, "val": val, "test": _rows(test, self.label_names, test_path)}


def _found(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"data.folder={folder} holds no {name} (nor {name}.gz). Bibtex is the files "
        f"{', '.join(_FILES)} of {SOURCE}: put them there, name another folder, or set "
        f"data.download=true to fetch them."
    )


def _fetch_missing(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (folder / name).is_file() or (folder / f"{name}.gz").is_file():
            continue
        part = folder / f"{name}.part"
        try:
            with urllib.request.urlopen(f"{SOURCE}/{name}", timeout=_TIMEOUT_S) as source:
                with part.open("wb") as target:
                    shutil.copyfileobj(source, target)
        except OSError as error:  # urllib's errors and time-outs are OSErrors
            part.unlink(missing_ok=True)
            raise FileNotFoundError(
                f"{name} could not be fetched from {SOURCE} ({error}). Put the files "
                f"{', '.join(_FILES)} into data.folder={folder} by hand (also as bibtex.rar among "
                f"the data sets of Mulan at sourceforge.net/projects/mulan)."
            ) from error
        part.rename(folder / name)


def _label_names(path: Path) -> tuple[str, ...]:
    """The labels that Mulan's XML header lists."""
    try:
        nodes = ElementTree.parse(path).iter("{http://mulan.sourceforge.net/labels}label")
        names = tuple(node.attrib["name"] for node in nodes)
    except (ElementTree.ParseError, KeyError) as error:
        raise ValueError(
            f"{path} is no header of labels: expected XML with <label name=...>, found {error}."
        ) from error
    if not names:
        raise ValueError(f"{path} lists no label; expected elements <label name=...>.")
    return names


def _rows(table: Table, label_names: tuple[str, ...], path: Path) -> Rows:
    """Features and labels of a table, the labels in the order of the header."""
    column_of = {name: column for column, name in enumerate(table.names)}
    missing = [name for name in label_names if name not in column_of]
    if missing:
        raise ValueError(
            f"{path} has no attribute {missing[0]!r}, which {_FILES[2]} lists as a label."
        )
    columns = [column_of[name] for name in label_names]
    is_label = set(columns)
    rest = [column for column in range(len(table.names)) if column not in is_label]
    labels = table.values[:, columns]
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"{path} holds labels other than 0 and 1.")
    return Rows(table.values[:, rest], labels)
