"""Reader of ARFF files, the format of Weka and of the multi-label data sets of Mulan."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Table", "read_arff"]

_ATTRIBUTE = re.compile(
    r"@attribute\s+(?P<name>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\s{]+)\s*(?P<kind>.*)",
    re.IGNORECASE,
)
_NUMERIC = ("numeric", "real", "integer")

_Line = tuple[int, str]
"""A line's number, counted from one, and its text without the white space around it."""


@dataclass(frozen=True)
class Table:
    """The content of an ARFF file."""

    names: tuple[str, ...]
    """The attributes' names, in the order of the columns."""
    values: Tensor
    """`float32[rows, attributes]`."""


def read_arff(path: str | Path) -> Table:
    """The table in an ARFF file, whose rows are sparse, `{index value, ...}` with indices from 0
    and zeros left out, or dense, `value, value, ...`.

    Attributes are numeric or nominal with numbers as their values, as `{0,1}`. A name that ends in
    `.gz` is decompressed. The format is Weka's (Hall et al. 2009, SIGKDD Explorations 11(1)).

    Args:
        path: the file, in UTF-8.

    Raises:
        ValueError: if the file is malformed: names the file, the line, what was expected and what
            was found. If it holds no row.
    """
    path = Path(path)
    lines = _lines(path)
    names, admits = _header(path, lines)
    column_of_row: list[list[int]] = []
    value_of_row: list[list[float]] = []
    for number, text in lines:
        place = f"{path}, line {number}"
        columns, values = (_sparse if text.startswith("{") else _dense)(place, text, len(names))
        for column, value in zip(columns, values, strict=True):
            if not admits[column](value):
                raise ValueError(
                    f"{place}: {value:g} is no value of attribute {names[column]!r} "
                    f"(index {column}); its declaration lists those allowed."
                )
        column_of_row.append(columns)
        value_of_row.append(values)
    if not column_of_row:
        raise ValueError(f"{path} holds no row after @data; expected at least one.")
    return Table(names, _filled(column_of_row, value_of_row, len(names)))


def _lines(path: Path) -> Iterator[_Line]:
    """The lines that are neither empty nor a comment."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}); fetch it again.") from error
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {number}: expected text in UTF-8, found {error}."
        ) from error
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith("%"):
            yield number, stripped


def _header(
    path: Path, lines: Iterator[_Line]
) -> tuple[tuple[str, ...], list[Callable[[float], bool]]]:
    """Names of the attributes, and for each whether it may have a value; up to @data."""
    names: dict[str, int] = {}
    admits: list[Callable[[float], bool]] = []
    for number, text in lines:
        place, keyword = f"{path}, line {number}", text.split(maxsplit=1)[0].lower()
        if keyword == "@data":
            if not names:
                raise ValueError(f"{place}: @data before any @attribute.")
            return tuple(names), admits
        if keyword == "@relation":
            continue
        match = _ATTRIBUTE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{place}: expected '@attribute NAME TYPE' or '@data', found {_short(text)}."
            )
        name = _unquoted(match["name"])
        if name in names:
            raise ValueError(
                f"{place}: attribute {name!r} is declared a second time, first on line "
                f"{names[name]}."
            )
        names[name] = number
        admits.append(_values(place, name, match["kind"].strip()))
    raise ValueError(f"{path} ends after {len(names)} attributes without a line '@data'.")


def _values(place: str, name: str, kind: str) -> Callable[[float], bool]:
    if kind.lower() in _NUMERIC:
        return lambda value: True
    if kind.startswith("{") and kind.endswith("}"):
        try:
            return {float(_unquoted(part.strip())) for part in kind[1:-1].split(",")}.__contains__
        except ValueError:
            pass
    raise ValueError(
        f"{place}: attribute {name!r} is of type {_short(kind)}; expected "
        f"{', '.join(_NUMERIC)}, or numbers in braces as {{0,1}}."
    )


def _sparse(place: str, text: str, num_columns: int) -> tuple[list[int], list[float]]:
    if not text.endswith("}"):
        raise ValueError(f"{place}: the row does not end with '}}'; is the file complete?")
    columns, values = [], []
    for entry in text[1:-1].split(",") if text[1:-1].strip() else ():
        index, _, value = entry.strip().partition(" ")
        if not index.isdecimal() or int(index) >= num_columns:
            raise ValueError(
                f"{place}: expected 'INDEX VALUE' with an index from 0 to {num_columns - 1}, found "
                f"{_short(entry)}."
            )
        columns.append(int(index))
        values.append(_number(place, value))
    if len(set(columns)) < len(columns):
        repeated = next(c for i, c in enumerate(columns) if c in columns[:i])
        raise ValueError(f"{place}: index {repeated} appears twice in a row.")
    return columns, values


def _dense(place: str, text: str, num_columns: int) -> tuple[list[int], list[float]]:
    values = [_number(place, part) for part in text.split(",")]
    if len(values) != num_columns:
        raise ValueError(f"{place}: expected {num_columns} values, found {len(values)}.")
    return list(range(num_columns)), values


def _number(place: str, text: str) -> float:
    try:
        return float(_unquoted(text.strip()))
    except ValueError:
        raise ValueError(f"{place}: expected a number, found {_short(text)}.") from None


def _filled(columns: list[list[int]], values: list[list[float]], num_columns: int) -> Tensor:
    filled = torch.zeros(len(columns), num_columns)
    counts = torch.tensor([len(row) for row in columns])
    rows = torch.arange(len(columns)).repeat_interleave(counts)
    flat = torch.tensor([column for row in columns for column in row], dtype=torch.long)
    filled[rows, flat] = torch.tensor([value for row in values for value in row])
    return filled


def _unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    return text


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
