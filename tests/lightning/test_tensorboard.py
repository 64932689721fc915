"""What TensorBoard is given besides scalars, as read from the event files."""

import io
import sys
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from event_files import events, layouts, scalars, text
from fits import Square, fit, logged
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.image import imread
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

from hvpopt.curvature import SpectralDensity, loss_slice
from hvpopt.lightning.callbacks import CurvatureMonitor, OptimizerMonitor
from hvpopt.lightning.monitors import figures
from hvpopt.lightning.monitors.album import NO_MATPLOTLIB, _add_spectrum
from hvpopt.lightning.monitors.look import Slices
from hvpopt.lightning.monitors.measures import MEASURES
from hvpopt.lightning.results import hyperparameters, log_results

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
]


class TwoLayers(L.LightningModule):
    """½ Σ aᵢ wᵢ² over two modules, whose Hessian is diag(1, 2, 7 | −3, 0)."""

    def __init__(self, make_optimizer):
        super().__init__()
        self.one, self.two = nn.Module(), nn.Module()
        self.one.w = nn.Parameter(torch.ones(3))
        self.two.w = nn.Parameter(torch.ones(2))
        self.make_optimizer = make_optimizer

    def training_step(self, batch):
        one = torch.tensor([1.0, 2.0, 7.0]) * self.one.w**2
        return 0.5 * (one.sum() + (torch.tensor([-3.0, 0.0]) * self.two.w**2).sum())

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def sgd(params):
    return torch.optim.SGD(params, 0.01)


def run(tmp_path):
    """The event files of a run with both monitors, and its trainer."""
    loggers = [
        CSVLogger(tmp_path, name=None, version="csv"),
        TensorBoardLogger(tmp_path, name=None, version="events"),
    ]
    monitors = [OptimizerMonitor(), CurvatureMonitor(2, metrics=list(MEASURES), budget=None)]
    _, trainer, _ = fit(sgd, tmp_path, module=TwoLayers, callbacks=monitors, logger=loggers)
    return events(tmp_path / "events"), trainer


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """One run that several tests look at."""
    with warnings.catch_warnings():  # the module's marks do not reach its fixtures
        warnings.simplefilter("ignore")
        return run(tmp_path_factory.mktemp("watched"))


def test_the_layout_shows_the_sharpness_with_its_threshold_and_the_trace_in_its_band(watched):
    found, _ = watched
    charts = layouts(found)[-1]
    assert charts["Curvature"]["Sharpness and stability threshold (2/lr)"] == (
        "lines",
        [
            "curvature/top_eigenvalue$",
            "curvature/sharpness$",
            "curvature/stability_threshold$",
        ],
    )
    trace = charts["Curvature"]["Trace with its 95% band"]
    assert trace == ("band", ["curvature/trace", "curvature/trace_low", "curvature/trace_high"])
    assert charts["Curvature by layer"]["Trace"] == ("lines", ["curvature/layer_trace/"])
    tags = found.Tags()["scalars"]
    for category in charts.values():
        for kind, names in category.values():
            met = [any(tag.startswith(name.rstrip("$")) for tag in tags) for name in names]
            assert all(met) if kind == "band" else any(met), names


def test_every_scalar_of_the_curvature_is_in_the_documented_list_and_goes_to_every_logger(watched):
    found, trainer = watched
    names = {t.removeprefix("curvature/") for t in found.Tags()["scalars"] if "curvature/" in t}
    documented = sys.modules["hvpopt.lightning.callbacks"].__doc__
    for name in names:
        base, _, layer = name.partition("/")
        assert f"``{base}{'/LAYER' if layer else ''}``" in documented
    rows = {row["step"]: row for row in logged(trainer, "curvature/trace")}
    for name in names:
        for step, value in scalars(found, f"curvature/{name}").items():
            assert rows[step][f"curvature/{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_the_spectrum_is_a_histogram_in_which_each_eigenvalue_counts_once(watched):
    found, _ = watched
    histograms = found.Histograms("curvature/spectrum")
    assert [event.step for event in histograms] == [0, 1, 3, 5, 7]
    for event in histograms:
        value = event.histogram_value
        assert value.num == 5
        assert sum(value.bucket) == pytest.approx(5, rel=1e-6)
        assert (value.min, value.max) == pytest.approx((-3.0, 7.0), rel=1e-4)
        assert list(value.bucket_limit) == sorted(value.bucket_limit)
        # random signs meet each of five eigenvectors alike: the quadrature is exact
        assert value.sum == pytest.approx(7.0, rel=1e-3)
        assert value.sum_squares == pytest.approx(63.0, rel=1e-3)


def test_a_histogram_puts_the_weights_of_a_spectrum_where_its_nodes_are():
    class Writer:
        def add_histogram_raw(self, tag, **said):
            self.said = {"tag": tag, **said}

    nodes = torch.tensor([[-1.0, 0.0, 4.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]], dtype=torch.float64)
    density = SpectralDensity(nodes, weights, dimension=8, num_products=5)
    writer = Writer()
    _add_spectrum(writer, "here", density, 3)
    said = writer.said
    assert (said["tag"], said["global_step"], said["num"]) == ("here", 3, 8)
    assert (said["min"], said["max"]) == (-1.0, 4.0)
    assert said["sum"] == pytest.approx(8 * (0.375 - 0.125 + 0.25 * 1.0 - 0.0 + 0.125 * 1.0))
    limits, counts = np.array(said["bucket_limits"]), np.array(said["bucket_counts"])
    assert counts.sum() == pytest.approx(8)
    assert counts[np.searchsorted(limits, 4.0 - 1e-9)] == pytest.approx(1.0)
    assert counts[limits <= 0.0 - 1e-9].sum() == pytest.approx(1.0)


def picture(event):
    return (255 * imread(io.BytesIO(event.encoded_image_string), format="png")).round()


def test_the_pictures_are_drawn_and_show_something(watched):
    found, _ = watched
    for name, width in (("spectrum", 1000), ("layers", 800), ("slices", 1200)):
        drawn = found.Images(f"curvature/{name}_figure")
        assert drawn[-1].step == 7
        image = picture(drawn[-1])
        assert image.shape[1:] == (width, 3)
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50


def test_without_matplotlib_the_pictures_are_left_out_with_one_sentence(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    found, _ = run(tmp_path)
    assert found.Tags()["images"] == []
    assert len(found.Histograms("curvature/spectrum")) == 5
    assert caplog.text.count(NO_MATPLOTLIB) == 1


def test_without_tensorboard_the_scalars_go_on_and_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_figure", None)  # drawing would raise
    monitor = CurvatureMonitor(2, metrics=list(MEASURES), budget=None)
    _, trainer, _ = fit(sgd, tmp_path, module=TwoLayers, callbacks=[monitor])
    assert len(logged(trainer, "curvature/trace")) == 5


def test_the_layers_picture_takes_layers_that_come_and_go_and_signs():
    image = figures.layers_figure([3], [{"one": 5.0}])
    assert image.dtype == np.uint8
    both = figures.layers_figure([0, 4], [{"one": 5.0, "two": -2.0}, {"two": 1e-9, "three": 0.0}])
    assert both.shape[2] == 3
    reds = (both[..., 0].astype(int) - both[..., 2] > 60).sum()
    blues = (both[..., 2].astype(int) - both[..., 0] > 60).sum()
    assert reds > 500
    assert blues > 500


@pytest.mark.parametrize("count", [1, 2])
def test_the_lines_of_a_slice_are_those_of_the_plane(count):
    axes = [[torch.eye(2, dtype=torch.float64)[i]] for i in range(count)]
    grid = torch.linspace(-1, 1, 7, dtype=torch.float64)
    values = loss_slice(
        lambda p: 3 * p[0][0] ** 2 + 5 * p[0][1] ** 4,
        [torch.zeros(2, dtype=torch.float64)],
        axes,
        distances=(grid,) * count if count == 2 else grid,
    )
    slices = Slices(values, (6.0, 0.0)[:count], (0.0, 0.0)[:count])
    torch.testing.assert_close(slices.line(0), (grid, 3 * grid**2))
    if count == 2:
        torch.testing.assert_close(slices.line(1), (grid, 5 * grid**4))
    assert figures.slices_figure(1, slices).ndim == 3


def test_the_report_says_what_was_measured_and_what_it_cost(watched):
    found, _ = watched
    report = text(found, "report/training")
    assert "### Curvature (`curvature/...`)" in report
    assert "| measurements | 5 |" in report
    products = sum(scalars(found, "curvature/products").values())
    assert f"| products | {products:.0f} |" in report
    top = scalars(found, "curvature/top_eigenvalue")
    assert f"| last top_eigenvalue | {top[max(top)]:.4g} |" in report
    spent = scalars(found, "curvature/seconds")
    assert all(seconds > 0 for seconds in spent.values())
    share = scalars(found, "curvature/time_share")
    assert all(0 < value <= 1 for value in share.values())


def test_hyperparameters_are_what_distinguishes_a_run():
    optimizer = sgd([torch.nn.Parameter(torch.ones(1))])
    found = hyperparameters(optimizer, {"data": "digits", "optimizer": "sgd", "a": {"no": 1}})
    assert found["optimizer"] == "sgd"
    assert found["data"] == "digits"
    assert found["optimizer/lr"] == 0.01
    assert found["optimizer/nesterov"] is False
    assert "a" not in found
    assert "optimizer/foreach" not in found  # None


def test_results_stand_beside_the_settings_in_hparams_and_in_a_text(tmp_path):
    loggers = [
        TensorBoardLogger(tmp_path, name=None, version="events"),
        CSVLogger(tmp_path, name=None, version="csv"),
    ]
    results = {"test/accuracy": 0.5, "products": None, "seconds": 2.0, "output_dir": "here"}
    log_results(loggers, results, {"optimizer": "smd", "optimizer/lr": 0.1}, step=7)
    found = events(tmp_path / "events")
    assert scalars(found, "results/test_accuracy") == {7: 0.5}
    assert scalars(found, "results/seconds") == {7: 2.0}
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["optimizer"].string_value == "smd"
    assert settings["optimizer/lr"].number_value == 0.1
    content = found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    metrics = HParamsPluginData.FromString(content).experiment.metric_infos
    assert {m.name.tag for m in metrics} == {"results/test_accuracy", "results/seconds"}
    written = text(found, "report/results")
    assert "| test_accuracy | 0.5 |" in written
    assert "| optimizer/lr | 0.1 |" in written
    assert "results/seconds" in (tmp_path / "csv" / "metrics.csv").read_text()
    assert "optimizer: smd" in (tmp_path / "csv" / "hparams.yaml").read_text()


def test_one_parameter_alone_has_a_line_instead_of_a_plane(tmp_path):
    class One(Square):
        def __init__(self, make_optimizer):
            super().__init__(make_optimizer)
            self.w = nn.Parameter(torch.ones(1))

        def training_step(self, batch):
            return 0.5 * 3.0 * (self.w**2).sum()

    logger = TensorBoardLogger(tmp_path, name=None, version="events")
    monitor = CurvatureMonitor(4, metrics=list(MEASURES), budget=None)
    fit(sgd, tmp_path, module=One, callbacks=[monitor], logger=logger, epochs=1)
    found = events(tmp_path / "events")
    assert scalars(found, "curvature/trace")[0] == pytest.approx(3.0)
    assert picture(found.Images("curvature/slices_figure")[-1]).shape[1] == 450
