"""ARFF files: what is read, and what is refused by file and line."""

import gzip

import pytest
import torch
from arff_files import arff_text, tiny_rows

from hvpopt.lightning.arff import read_arff

SMALL = """% a comment
@RELATION small

@attribute 'a word' {0,1}
@attribute size numeric
@attribute "it\\"s" {-1, 1}
@data
{0 1,2 -1}
% between rows
{ 1 2.5 , 2 1 }
{}
0,-3e2,1
"""


def write(path, text):
    path.write_text(text)
    return path


def test_sparse_and_dense_rows_give_the_table_that_was_written(tmp_path):
    table = read_arff(write(tmp_path / "small.arff", SMALL.replace("{}", "{2 1}")))
    assert table.names == ("a word", "size", 'it"s')
    expected = [[1, 0, -1], [0, 2.5, 1], [0, 0, 1], [0, -300, 1]]
    assert torch.equal(table.values, torch.tensor(expected))


def test_an_empty_sparse_row_is_all_zeros(tmp_path):
    text = "@relation r\n@attribute a {0,1}\n@attribute b real\n@data\n{}\n{1 2}\n"
    table = read_arff(write(tmp_path / "r.arff", text))
    assert table.values.tolist() == [[0, 0], [0, 2]]


def test_a_gzipped_file_is_read_like_the_plain_one(tmp_path):
    features, labels = tiny_rows(7)
    text = arff_text(features, labels)
    plain = write(tmp_path / "r.arff", text)
    (tmp_path / "r.arff.gz").write_bytes(gzip.compress(text.encode()))
    zipped = read_arff(tmp_path / "r.arff.gz")
    assert torch.equal(zipped.values, torch.cat([features, labels], 1).float())
    assert torch.equal(zipped.values, read_arff(plain).values)


def test_scipy_reads_the_same_table(tmp_path):
    from scipy.io import arff

    text = "@relation r\n@attribute a {0,1}\n@attribute b real\n@data\n1,2.5\n0,-1\n"
    path = write(tmp_path / "r.arff", text)
    rows, meta = arff.loadarff(path)
    table = read_arff(path)
    assert list(table.names) == meta.names()
    assert table.values.tolist() == [[float(value) for value in row] for row in rows]


HEADER = "@relation r\n@attribute a {0,1}\n@attribute b real\n@data\n"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (HEADER + "{0 1}\n{0 1,2 1}\n", r"line 6: .* index from 0 to 1, found '2 1'"),
        (HEADER + "{-1 1}\n", r"line 5: .* index from 0 to 1, found '-1 1'"),
        (HEADER + "{a 1}\n", r"line 5: expected 'INDEX VALUE'"),
        (HEADER + "{0}\n", r"line 5: expected a number, found ''"),
        (HEADER + "{1 x}\n", r"line 5: expected a number, found 'x'"),
        (HEADER + "{0 1,0 1}\n", r"line 5: index 0 appears twice"),
        (HEADER + "{0 1,1 2\n", r"line 5: the row does not end with '}'"),
        (HEADER + "{0 2}\n", r"line 5: 2 is no value of attribute 'a' \(index 0\)"),
        (HEADER + "1,2,3\n", r"line 5: expected 2 values, found 3"),
        (HEADER + "1,y\n", r"line 5: expected a number, found 'y'"),
        (HEADER, r"holds no row after @data"),
        ("@relation r\n@data\n", r"line 2: @data before any @attribute"),
        ("@relation r\n@attribute a real\n", r"ends after 1 attributes without a line '@data'"),
        ("@relation r\n@atribute a real\n", r"line 2: expected '@attribute NAME TYPE' or '@data'"),
        ("@attribute a real\n\n@attribute a real\n", r"line 3: .* second time, first on line 1"),
        ("@attribute a string\n", r"line 1: attribute 'a' is of type 'string'; expected numeric"),
        ("@attribute a {yes,no}\n", r"line 1: attribute 'a' is of type '{yes,no}'"),
        ("@attribute a\n", r"line 1: attribute 'a' is of type ''"),
    ],
)
def test_a_malformed_file_is_refused_by_line_and_by_what_was_expected(tmp_path, text, match):
    path = write(tmp_path / "bad.arff", text)
    with pytest.raises(ValueError, match=match) as error:
        read_arff(path)
    assert str(error.value).startswith(str(path))


def test_a_damaged_gzip_file_is_refused(tmp_path):
    path = tmp_path / "bad.arff.gz"
    path.write_bytes(gzip.compress(HEADER.encode())[:-12])
    with pytest.raises(ValueError, match=r"bad\.arff\.gz is a damaged gzip file"):
        read_arff(path)


def test_bytes_that_are_no_text_are_refused_by_line(tmp_path):
    path = tmp_path / "bad.arff"
    path.write_bytes(HEADER.encode() + b"{0 1}\n\xff\n")
    with pytest.raises(ValueError, match=r"line 6: expected text in UTF-8"):
        read_arff(path)
