"""TensorBoard on a short run's logs, as a real browser shows it."""

import shutil

import pytest
import torch
from fits import Small, fit
from lightning.pytorch.loggers import TensorBoardLogger

import hvpopt
from hvpopt.lightning.callbacks import CurvatureMonitor, OptimizerMonitor
from hvpopt.lightning.monitors.measures import MEASURES
from hvpopt.lightning.results import hyperparameters, log_results

pytest.importorskip("selenium")
from hvpopt.experiments.screenshots import Dashboard, browser, tensorboard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs chromium and chromedriver",
    ),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "newton_cg": hvpopt.NewtonCG,
    "smd": hvpopt.SMD,
}


def write_logs(folder):
    """Three short runs, each with all that TensorBoard can be given."""
    for name, make in OPTIMIZERS.items():
        logger = TensorBoardLogger(folder, name=None, version=name)
        monitors = [OptimizerMonitor(), CurvatureMonitor(2, metrics=list(MEASURES), budget=None)]
        _, trainer, _ = fit(make, folder, module=Small, callbacks=monitors, logger=logger)
        settings = hyperparameters(trainer.optimizers[0], {"choice": f"chosen-{name}"})
        log_results([logger], {"test/accuracy": 0.75}, settings, trainer.global_step)


def test_tensorboard_shows_the_layout_histograms_figures_hparams_and_reports(tmp_path):
    write_logs(tmp_path)
    with tensorboard(tmp_path) as address, browser() as window:
        seen = Dashboard(window, address)

        seen.open("custom_scalars")
        assert seen.shows("Curvature", "Sharpness and stability threshold (2/lr)")
        assert seen.shows("Trace with its 95% band", "Newton step", "Damping and reduction ratio")
        assert seen.shows("Gains", "Cost of the curvature", "Matches (")
        assert seen.wait(lambda: seen.count(".render-area path") > 20)  # the lines themselves
        assert seen.count("tf-custom-scalar-margin-chart-card") >= 1
        assert "No matches" not in seen.text
        assert seen.errors() == []

        seen.open("histograms")
        assert seen.shows("curvature/spectrum", "optimizer/log_gain")
        assert seen.wait(lambda: seen.count(".histogram path") > 6)
        assert seen.errors() == []

        seen.open("images")
        for name in ("spectrum", "layers", "slices"):
            assert seen.shows(f"curvature/{name}_figure")
        assert seen.wait(lambda: seen.loaded_images() >= 9)
        assert seen.errors() == []

        seen.open("hparams")
        assert seen.shows("chosen-sgd", "chosen-newton_cg", "chosen-smd", "results/test_accuracy")
        assert seen.errors() == []

        seen.open("text")
        assert seen.shows("report/training", "report/results", "measurements", "cg_status/")
        assert seen.errors() == []

        seen.open("timeseries", "&tagFilter=curvature/spectrum")
        assert seen.shows("Tags matching filter", "/spectrum", "/spectrum_figure")
        assert seen.errors() == []
