"""Bibtex's data module: files, splits, labels, refusals."""

import io
import urllib.error
import warnings

import pytest
import torch
from arff_files import NUM_FEATURES, NUM_LABELS, arff_text, tiny_rows, write_bibtex

from hvpopt.lightning import bibtex
from hvpopt.lightning.bibtex import Bibtex


def loaded(folder, **arguments):
    data = Bibtex(folder, num_val=arguments.pop("num_val", 8), **arguments)
    data.setup()
    return data


def test_rows_keep_their_features_and_labels(tmp_path):
    data = loaded(write_bibtex(tmp_path, num_train=40, num_test=10))
    features, labels = tiny_rows(10, 1)
    ((test_features, test_labels),) = list(data.test_dataloader())
    assert torch.equal(test_features, features.float())
    assert torch.equal(test_labels, labels.float())
    assert data.label_names == tuple(f"TAG_{i}" for i in range(NUM_LABELS))


def test_training_and_validation_rows_share_the_training_file(tmp_path):
    data = loaded(write_bibtex(tmp_path), batch_size=7)
    train = torch.cat([torch.cat(batch, 1) for batch in data.train_dataloader()])
    val = torch.cat([torch.cat(batch, 1) for batch in data.val_dataloader()])
    assert (len(train), len(val)) == (32, 8)
    expected = torch.cat(tiny_rows(40, 0), 1).float()
    together = torch.cat([train, val])
    assert sorted(together.tolist()) == sorted(expected.tolist())


def test_the_split_has_a_seed_of_its_own(tmp_path):
    write_bibtex(tmp_path)

    def val(**seeds):
        return next(iter(loaded(tmp_path, **seeds).val_dataloader()))[0]

    assert torch.equal(val(seed=0), val(seed=1))
    assert not torch.equal(val(), val(split_seed=1))


def test_labels_may_stand_anywhere_and_follow_the_header(tmp_path):
    write_bibtex(tmp_path)
    features, labels = tiny_rows(10, 1)
    rows = torch.cat([labels, features], 1)
    names = [f"TAG_{i}" for i in range(NUM_LABELS)] + [f"word{i}" for i in range(NUM_FEATURES)]
    text = arff_text(rows, torch.zeros(10, 0), names)
    for name in ("bibtex-train.arff", "bibtex-test.arff"):
        (tmp_path / name).write_text(text)
    (tmp_path / "bibtex-train.arff.gz").unlink()
    ((test_features, test_labels),) = list(loaded(tmp_path, num_val=2).test_dataloader())
    assert torch.equal(test_features, features.float())
    assert torch.equal(test_labels, labels.float())


def test_standardized_features_have_mean_zero_and_deviation_one_on_the_training_rows(tmp_path):
    write_bibtex(tmp_path)
    plain = loaded(tmp_path)._splits
    data = loaded(tmp_path, standardize=True)._splits
    features = data["train"].features
    torch.testing.assert_close(features.mean(0), torch.zeros(NUM_FEATURES), atol=1e-6, rtol=0)
    torch.testing.assert_close(features.std(0, correction=0), torch.ones(NUM_FEATURES))
    mean, deviation = plain["train"].features.mean(0), plain["train"].features.std(0, correction=0)
    torch.testing.assert_close(data["test"].features, (plain["test"].features - mean) / deviation)


def test_a_feature_that_does_not_vary_is_only_shifted(tmp_path):
    write_bibtex(tmp_path)
    features, labels = tiny_rows(40)
    features[:, 7] = 1
    (tmp_path / "bibtex-train.arff.gz").unlink()
    (tmp_path / "bibtex-train.arff").write_text(arff_text(features, labels))
    train = loaded(tmp_path, standardize=True)._splits["train"]
    assert torch.equal(train.features[:, 7], torch.zeros(32))


def test_labels_without_a_positive_are_warned_of_by_name(tmp_path):
    write_bibtex(tmp_path)
    features, labels = tiny_rows(40)
    labels[:, [1, 3]] = 0
    (tmp_path / "bibtex-train.arff.gz").unlink()
    (tmp_path / "bibtex-train.arff").write_text(arff_text(features, labels))
    with pytest.warns(UserWarning, match="No training row has the label 'TAG_1', 'TAG_3': nothing"):
        loaded(tmp_path)


def test_many_labels_without_a_positive_are_counted(tmp_path):
    write_bibtex(tmp_path, num_labels=9)
    features, labels = tiny_rows(40, num_labels=9)
    (tmp_path / "bibtex-train.arff.gz").unlink()
    (tmp_path / "bibtex-train.arff").write_text(arff_text(features, labels * 0))
    with pytest.warns(UserWarning, match="'TAG_4' and 4 more: nothing"):
        loaded(tmp_path)


@pytest.mark.parametrize("name", ["bibtex-train.arff", "bibtex-test.arff", "bibtex.xml"])
def test_a_missing_file_is_named_with_its_source(tmp_path, name):
    write_bibtex(tmp_path)
    for path in tmp_path.glob(f"{name}*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name} ") as error:
        Bibtex(tmp_path)
    for part in (str(tmp_path), bibtex.SOURCE, "data.download=true"):
        assert part in str(error.value)


def test_files_of_different_attributes_are_refused(tmp_path):
    write_bibtex(tmp_path)
    (tmp_path / "bibtex-test.arff").write_text(arff_text(*tiny_rows(5, num_features=11)))
    with pytest.raises(ValueError, match="do not belong together: their attributes differ"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("<labels", "is no header of labels: expected XML .* found unclosed token"),
        ("<labels/>", "lists no label"),
        ('<labels xmlns="http://mulan.sourceforge.net/labels"><label/></labels>', "'name'"),
        (
            '<labels xmlns="http://mulan.sourceforge.net/labels"><label name="x"/></labels>',
            "has no attribute 'x', which bibtex.xml lists",
        ),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header, match):
    write_bibtex(tmp_path)
    (tmp_path / "bibtex.xml").write_text(header)
    with pytest.raises(ValueError, match=match):
        loaded(tmp_path)


def test_labels_other_than_zero_and_one_are_refused(tmp_path):
    write_bibtex(tmp_path)
    for path in tmp_path.glob("bibtex-train*"):
        path.unlink()
    features, labels = tiny_rows(10)
    text = arff_text(features, labels * 2).replace("TAG_0 {0,1}", "TAG_0 {0,2}")
    (tmp_path / "bibtex-train.arff").write_text(text.replace(" {0,1}", " real"))
    with pytest.raises(ValueError, match=r"bibtex-train\.arff holds labels other than 0 and 1"):
        loaded(tmp_path, num_val=2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"num_val": 0}, "num_val=0 is out of range"),
        ({"eval_batch_size": 0}, "eval_batch_size=0 is out of range"),
        ({"num_train": 0}, "num_train=0 is out of range"),
        ({"seed": -1}, "seed=-1 is no seed"),
        ({"split_seed": 2**32}, "split_seed=4294967296 is no seed"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, arguments, match):
    write_bibtex(tmp_path)
    with pytest.raises(ValueError, match=match):
        Bibtex(tmp_path, **arguments)


def test_a_split_without_training_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_val=40 leaves nothing for training: there are 40"):
        loaded(write_bibtex(tmp_path), num_val=40)


def test_more_training_rows_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_train=33 is more than the 32 training rows"):
        loaded(write_bibtex(tmp_path), num_train=33)


# --- download


def test_nothing_is_fetched_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(bibtex.urllib.request, "urlopen", lambda *a, **k: pytest.fail("fetched"))
    data = Bibtex(write_bibtex(tmp_path), num_val=8)
    data.prepare_data()
    data.setup()


def test_what_is_missing_is_fetched_where_that_was_asked_for(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    write_bibtex(source)
    kept = b"kept"
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO((source / url.rpartition("/")[2]).read_bytes())

    monkeypatch.setattr(bibtex.urllib.request, "urlopen", urlopen)
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    (folder / "bibtex-train.arff.gz").write_bytes(kept)
    Bibtex(folder, download=True).prepare_data()
    assert asked == [f"{bibtex.SOURCE}/bibtex-test.arff", f"{bibtex.SOURCE}/bibtex.xml"]
    assert (folder / "bibtex-train.arff.gz").read_bytes() == kept
    assert (folder / "bibtex.xml").read_bytes() == (source / "bibtex.xml").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == [
        "bibtex-test.arff",
        "bibtex-train.arff.gz",
        "bibtex.xml",
    ]


def test_without_a_network_the_error_says_where_to_get_the_file(tmp_path, monkeypatch):
    def unreachable(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(bibtex.urllib.request, "urlopen", unreachable)
    data = Bibtex(tmp_path, download=True)
    with pytest.raises(FileNotFoundError, match="no route to host") as error:
        data.prepare_data()
    assert "bibtex-train.arff could not be fetched" in str(error.value)
    assert "bibtex.rar" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_loading_warns_of_nothing_where_every_label_occurs(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(write_bibtex(tmp_path))
