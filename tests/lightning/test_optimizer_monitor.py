"""Every figure of every report arrives at every logger."""

import dataclasses
import math
from enum import Enum

import pytest
import torch
from event_files import events, layouts, scalars, text
from fits import Ordinary, fit, logged
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import hvpopt
from hvpopt.lightning.callbacks import OptimizerMonitor
from hvpopt.lightning.monitors.layout import CURVATURE, DETAILS, OPTIMIZER, layout

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
]


def newton(params):
    return hvpopt.NewtonCG(params, max_cg_steps=5)


OPTIMIZERS = {
    "newton_cg": newton,
    "trust_region": lambda p: hvpopt.TrustRegionNewtonCG(p, max_cg_steps=5),
    "smd": hvpopt.SMD,
    "sophia_g": lambda p: hvpopt.SophiaG(p, update_every=3),
    "sophia_h": lambda p: hvpopt.SophiaH(p, update_every=3),
    "adahessian": hvpopt.AdaHessian,
}


def kept(make):
    """The optimizer, and the reports of its steps, which gather in a list."""
    reports = []

    def make_and_listen(params):
        optimizer = make(params)
        optimizer.register_step_post_hook(lambda o, a, k: reports.append(o.last_report))
        return optimizer

    return make_and_listen, reports


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_figure_of_every_report_arrives(tmp_path, name):
    make, reports = kept(OPTIMIZERS[name])
    loggers = [
        TensorBoardLogger(tmp_path, name=None, version="events"),
        CSVLogger(tmp_path, name=None, version="csv"),
    ]
    _, trainer, _ = fit(
        make, tmp_path, module=Quiet, callbacks=[OptimizerMonitor()], logger=loggers
    )
    found = events(tmp_path / "events")
    assert len(reports) == 8
    trainer.loggers.reverse()  # `logged` reads the first one's file
    rows = {int(row["step"]): row for row in logged(trainer, "optimizer/loss")}
    met = set()
    for step, report in enumerate(reports):
        for field in dataclasses.fields(report):
            tag, value = f"optimizer/{field.name}", getattr(report, field.name)
            if isinstance(value, Enum):
                tag, value = f"{tag}/{value.name.lower()}", 1.0
            elif value is None or not math.isfinite(value):
                assert tag not in found.Tags()["scalars"] or step not in scalars(found, tag)
                continue
            met.add(tag)
            assert scalars(found, tag)[step] == pytest.approx(float(value), rel=1e-6)
            assert rows[step][tag] == pytest.approx(float(value), rel=1e-6)
    assert met == {t for t in found.Tags()["scalars"] if t.startswith("optimizer/")}
    shown, last = trainer.progress_bar_metrics, reports[-1].metrics()
    names = set(reports[-1].progress_fields) & set(last)
    assert names or name == "adahessian"
    for field in names:
        assert shown[field] == pytest.approx(last[field])


class Quiet(Ordinary):
    """Without a log by hand, whose steps are its own."""

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss


def tensorboard(make, tmp_path, **arguments):
    options = arguments.pop("options", {})
    logger = TensorBoardLogger(tmp_path, name=None, version="events")
    monitor = OptimizerMonitor(**arguments)
    fit(make, tmp_path, module=Quiet, callbacks=[monitor], logger=logger, **options)
    return events(tmp_path / "events")


def test_the_ends_of_cg_are_ones_and_zeros_that_sum_to_one(tmp_path):
    found = tensorboard(newton, tmp_path, options={"epochs": 4})
    tags = [t for t in found.Tags()["scalars"] if t.startswith("optimizer/cg_status/")]
    total = {}
    for tag in tags:
        for step, value in scalars(found, tag).items():
            assert value in (0.0, 1.0)
            total[step] = total.get(step, 0.0) + value
    assert total == dict.fromkeys(range(16), 1.0)


def test_the_report_counts_how_steps_and_cg_ended(tmp_path):
    make, reports = kept(newton)
    found = tensorboard(make, tmp_path, options={"epochs": 4})
    report = text(found, "report/training")
    assert "### NewtonCG (`optimizer/...`)" in report
    assert "| num_steps | 16 |" in report
    assert f"| num_products | {sum(r.num_products for r in reports)} |" in report
    for status in {r.cg_status for r in reports}:
        count = sum(r.cg_status is status for r in reports)
        assert f"| cg_status/{status.name.lower()} ({status.value}) | {count} |" in report


def test_a_layout_groups_what_there_is(tmp_path):
    charts = layouts(tensorboard(newton, tmp_path / "newton"))[-1]
    kind, tags = charts["Newton step"]["Damping and reduction ratio"]
    assert (kind, tags) == ("lines", ["optimizer/damping$", "optimizer/reduction_ratio$"])
    assert charts["Newton step"]["Why CG ended"] == ("lines", ["optimizer/cg_status/"])
    assert not {"Gains", "Diagonal"} & set(charts)
    charts = layouts(tensorboard(OPTIMIZERS["sophia_g"], tmp_path / "sophia"))[-1]
    win_rate = charts["Diagonal"]["Win rate: share of steps not clipped"]
    assert win_rate[1] == ["optimizer/fraction_unclipped$", "optimizer/fraction_negative$"]
    band = charts["Diagonal"]["Running diagonal: median, 5% and 95%"]
    assert band[0] == "band"
    charts = layouts(tensorboard(hvpopt.SMD, tmp_path / "smd"))[-1]
    assert "Gains" in charts
    assert "Newton step" not in charts


def test_every_name_in_a_chart_of_the_optimizer_is_a_field_of_a_report():
    fields = set()
    kinds = [hvpopt.optim.report.StepReport]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        fields |= {field.name for field in dataclasses.fields(kind)}
    assert {name.rstrip("/") for chart in OPTIMIZER for name in chart.names} <= fields


def test_a_layout_takes_names_literally_and_tells_prefixes_apart():
    tags = ["optimizer_1/damping", "held.out/trace", "held.out/top_eigenvalue"]
    found = layout(tags)
    assert found["Newton step (optimizer_1)"] == {
        "Damping and reduction ratio": [
            "Multiline",
            ["optimizer_1/damping$", "optimizer_1/reduction_ratio$"],
        ]
    }
    ((_, names),) = found["Curvature (held.out)"].values()  # no band without its ends
    assert names[0] == r"held\.out/top_eigenvalue$"
    charts = CURVATURE + OPTIMIZER + DETAILS
    assert len({(chart.category, chart.title) for chart in charts}) == len(charts)


def test_the_gains_of_smd_are_a_histogram(tmp_path):
    found = tensorboard(hvpopt.SMD, tmp_path, histogram_every_n_steps=3)
    histograms = found.Histograms("optimizer/log_gain")
    assert [event.step for event in histograms] == [0, 3, 6]
    num_params = sum(p.numel() for p in Quiet(None).parameters())
    highest = scalars(found, "optimizer/log_gain_max")
    for event in histograms:
        assert event.histogram_value.num == num_params
        assert event.histogram_value.max == pytest.approx(highest[event.step], abs=1e-6)


def test_every_nth_report_is_logged_and_all_are_counted(tmp_path):
    found = tensorboard(newton, tmp_path, every_n_steps=3)
    assert list(scalars(found, "optimizer/damping")) == [0, 3, 6]
    assert "| num_steps | 8 |" in text(found, "report/training")
    with pytest.raises(ValueError, match="every_n_steps=0 is out of range"):
        OptimizerMonitor(0)
    with pytest.raises(ValueError, match=r"histogram_every_n_steps=0.5 is out of range"):
        OptimizerMonitor(histogram_every_n_steps=0.5)


def test_an_optimizer_without_a_report_is_left_alone(tmp_path):
    found = tensorboard(lambda p: torch.optim.SGD(p, 0.1), tmp_path)
    assert not [tag for tag in found.Tags()["scalars"] if tag.startswith("optimizer")]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_goes_on_counting(tmp_path):
    def train(epochs, ckpt_path=None):
        checkpoint = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        monitor = OptimizerMonitor()
        fit(
            newton,
            tmp_path,
            callbacks=[monitor, checkpoint],
            epochs=epochs,
            ckpt_path=ckpt_path,
            enable_checkpointing=True,
        )
        return monitor.state_dict()["totals"]["optimizer"]

    assert train(1)["num_steps"] == 4
    assert train(2, tmp_path / "last.ckpt")["num_steps"] == 8


def test_a_failed_step_is_warned_of_once_and_training_goes_on(tmp_path):
    class Explodes(Ordinary):
        def training_step(self, batch, batch_idx):
            out = super().training_step(batch, batch_idx)
            out["loss"] = out["loss"] * (math.nan if batch_idx == 2 else 1.0)
            return out

    with pytest.warns(UserWarning, match="The loss is not finite: the parameters stay") as caught:
        net, trainer, _ = fit(newton, tmp_path, module=Explodes, callbacks=[OptimizerMonitor()])
    assert len([w for w in caught if "not finite" in str(w.message)]) == 1
    assert all(p.isfinite().all() for p in net.parameters())
    rows = logged(trainer, "optimizer/outcome/nonfinite_loss")
    assert [row["optimizer/outcome/nonfinite_loss"] for row in rows] == [1, 0, 0, 0, 1, 0]
