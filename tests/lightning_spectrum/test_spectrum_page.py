"""The page, the JSON file and the loggers, from reports made by hand."""

import base64
import csv
import dataclasses
import json
import math
from html.parser import HTMLParser

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from spectrum_modules import report
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvpopt.lightning.spectrum import read_json, write_json
from hvpopt.lightning.spectrum.boards import log_reports
from hvpopt.lightning.spectrum.figures import figures
from hvpopt.lightning.spectrum.page import page
from hvpopt.lightning.spectrum.reading import estimate, number, reading
from hvpopt.lightning.spectrum.report import Density, Eigenvalue, Estimate, LayerTrace, Plane

SEVERAL = [report("one"), report("two", scale=3.0, optimizer="Adam"), report("a<b", scale=0.5)]


class Reader(HTMLParser):
    """Gathers tags, texts and table rows; fails on tags that are left open."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open, self.rows = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read(reports, title="A title"):
    return Reader(page(reports, figures(reports), title))


@pytest.mark.parametrize("reports", [SEVERAL[:1], SEVERAL], ids=["one", "several"])
def test_the_page_holds_all_that_it_shows(reports):
    found = read(reports)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "iframe", "object"})
    pictures = found.named("img")
    assert len(pictures) == 5
    for picture in pictures:
        kind, _, data = picture["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(data)
        assert picture["alt"]
    assert all("href" not in attributes for _, attributes in found.tags)
    styles = "".join(found.texts)
    assert "url(" not in styles
    assert "@import" not in styles


def test_the_page_of_one_names_its_numbers():
    found = read(SEVERAL[:1])
    text = " ".join(found.texts)
    for part in ("Hessian of Net trained with SGD, after 30 steps, 4 parameters", "1.00 ± 0.10"):
        assert part in text
    assert ["λ₁", "2", "0.01", "0.500"] in found.rows
    assert ["smallest", "−1", "0.03", "0.200"] in found.rows
    assert ["first", "3", "0.75 ± 0.10", "75 %", "0.25"] in found.rows
    assert ["runs/one.ckpt", "Hessian", "train data, 5 batches", "eval", "60", "12", "1.5"] in (
        found.rows
    )


def test_the_page_of_several_has_a_column_for_each():
    found = read(SEVERAL)
    assert ["checkpoint", "one", "two", "a<b"] in found.rows  # escaped, and read back
    assert ["loss", "0.5", "1.5", "0.25"] in found.rows
    assert ["optimizer", "SGD", "Adam", "SGD"] in found.rows
    assert ["first", "0.75 ± 0.10", "2.25 ± 0.10", "0.38 ± 0.10"] in found.rows
    assert ["λ₁", "2 ± 0.01", "6 ± 0.01", "1 ± 0.01"] in found.rows
    assert ["smallest", "−1 ± 0.03", "−3 ± 0.03", "−0.5 ± 0.03"] in found.rows


def test_titles_are_escaped():
    assert "<b>" not in page(SEVERAL[:1], {}, "<b>").partition("<style>")[0]


def test_pictures_are_left_out_where_there_is_nothing_to_show():
    bare = report(slices=(), plane=None)
    assert set(figures([bare])) == {"density", "eigenvalues", "layers"}
    assert len(read([bare]).named("img")) == 3


def test_numbers_that_are_not_finite_break_nothing():
    nan = math.nan
    broken = report(
        loss=nan,
        top=(Eigenvalue(nan, math.inf, nan),),
        bottom=(),
        trace=Estimate(nan, nan),
        layers=(LayerTrace("first", 3, Estimate(nan, math.inf)),),
        density=Density((0.0, 1.0), (nan, nan), (nan, nan), nan, (0.0, 1.0), (nan,)),
        plane=Plane((-1.0, 1.0), (-1.0, 1.0), ((nan, nan), (nan, nan))),
    )
    assert "nan" in " ".join(read([broken, report()]).texts)
    assert read([broken]).named("img")


def test_the_reading_says_what_the_numbers_do():
    sentences = reading(SEVERAL[0])
    assert sentences[0].startswith("The largest eigenvalue is λ₁ = 2: plain gradient descent grows")
    assert "above 2/λ₁ = 1, with momentum" in sentences[0]
    assert "The smallest eigenvalue is −1, and 25.0 % of all lie clearly below zero" in sentences[1]
    assert "The 2 top eigenvectors hold 26 % of the gradient's squared norm" in sentences[3]
    assert sentences[-1] == "The layer first holds 75 % of the trace, with 75 % of the parameters."
    flat = dataclasses.replace(SEVERAL[0], bottom=(Eigenvalue(-0.01, 0.03, 0.0),))
    assert reading(flat)[1] == "No negative eigenvalue was found outside the bounds of error."
    down = dataclasses.replace(SEVERAL[0], top=(Eigenvalue(-0.5, 0.1, 0.0),))
    assert reading(down)[0].startswith("No positive eigenvalue")
    assert down.largest_stable_lr == math.inf


def test_estimates_are_rounded_to_their_errors():
    assert estimate(Estimate(109.52, 16.31)) == "110 ± 16"
    assert estimate(Estimate(2.0, math.inf)) == "2 ± inf"
    assert estimate(Estimate(1e-9, 1e-10)) == "1e−09 ± 1e-10"
    assert number(-0.5) == "−0.5"


# --- JSON


def test_a_report_comes_back_from_its_file(tmp_path):
    odd = report("nan", scale=2.0, loss=math.inf, plane=None, trace=Estimate(-math.inf, 1.0))
    path = tmp_path / "spectrum.json"
    write_json(path, [*SEVERAL, odd])
    assert read_json(path) == [*SEVERAL, odd]
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}", '{"format": "other"}', '{"format": "hvpopt.spectrum/1", "reports": [{}]}'],
)
def test_another_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "spectrum.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"spectrum.json is no report of task=spectrum"):
        read_json(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope.json: there is no such file"):
        read_json(tmp_path / "nope.json")


# --- loggers


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
    found.Reload()
    return found


def test_tensorboard_gets_scalars_the_raw_spectrum_and_the_pictures(tmp_path):
    log_reports(TensorBoardLogger(tmp_path, name="", version=""), SEVERAL[:1], figures(SEVERAL[:1]))
    found = events(tmp_path)
    scalars = {tag: found.Scalars(tag)[0] for tag in found.Tags()["scalars"]}
    assert {tag: s.value for tag, s in scalars.items()} == pytest.approx(SEVERAL[0].scalars())
    assert scalars["spectrum/top_eigenvalue/1"].value == 2.0
    assert all(s.step == 30 for s in scalars.values())
    histogram = found.Histograms("spectrum/eigenvalues")[0].histogram_value
    assert histogram.num == 4.0
    assert histogram.sum == pytest.approx(4 * (0.25 * -0.5 + 0.5 * 0.5 + 0.25 * 1.5))
    assert list(histogram.bucket) == [1.0, 2.0, 1.0]
    assert list(histogram.bucket_limit) == [0.0, 1.0, 2.0]
    names = ("density", "eigenvalues", "layers", "slices", "plane")
    assert set(found.Tags()["images"]) == {f"spectrum/{name}" for name in names}


def test_several_reports_are_runs_of_their_own(tmp_path):
    log_reports(TensorBoardLogger(tmp_path, name="", version=""), SEVERAL, figures(SEVERAL))
    assert events(tmp_path / "two").Scalars("spectrum/loss")[0].value == 1.5
    assert events(tmp_path / "a_b").Scalars("spectrum/loss")[0].value == 0.25
    assert len(events(tmp_path).Tags()["images"]) == 5


def test_other_loggers_get_the_scalars(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    log_reports(logger, SEVERAL[:2], {})
    logger.save()
    with (tmp_path / "metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["one/spectrum/trace"]) == 1.0
    log_reports(None, SEVERAL, {})  # nobody listens
