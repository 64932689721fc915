"""The curvature that is measured while a module trains, against closed forms and dense matrices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import Ordinary, Small, Square, fit, logged, world
from torch.utils.data import DataLoader, TensorDataset

import hvpopt
from hvpopt.lightning.callbacks import CurvatureMonitor
from hvpopt.lightning.monitors.measures import MEASURES

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

ALL = list(MEASURES)


def adam(params):
    return torch.optim.Adam(params, 0.01)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_the_figures_of_a_quadratic_are_exact(tmp_path, options):
    monitor = CurvatureMonitor(2, metrics=ALL, budget=None)
    net, trainer, _ = fit(adam, tmp_path, module=Square, callbacks=[monitor], **options)
    rows = logged(trainer, "curvature/trace")
    steps = 8 // options.get("accumulate_grad_batches", 1)
    assert [row["step"] for row in rows] == [0, *range(1, steps, 2)]
    for row in rows:
        assert row["curvature/top_eigenvalue"] == pytest.approx(7.0, rel=1e-3)
        assert row["curvature/trace"] == pytest.approx(10.0, rel=1e-5)
        assert row["curvature/trace_low"] == pytest.approx(10.0, rel=1e-5)
        assert row["curvature/layer_trace/Square"] == pytest.approx(10.0, rel=1e-5)
        assert row["curvature/layer_top_eigenvalue/Square"] == pytest.approx(7.0, rel=1e-3)
        assert row["curvature/spectrum_min"] == pytest.approx(1.0, rel=1e-3)
        assert row["curvature/spectrum_max"] == pytest.approx(7.0, rel=1e-3)
        assert row["curvature/negative_share"] == 0.0
    a = torch.tensor([1.0, 2.0, 7.0])
    g = a * net.w.detach()
    last = rows[-1]
    rayleigh = float((a * g * g).sum() / (g * g).sum())
    assert last["curvature/gradient_curvature"] == pytest.approx(rayleigh, rel=1e-4)
    share = float((g[1:] ** 2).sum() / (g**2).sum())
    assert last["curvature/gradient_share"] == pytest.approx(share, rel=1e-2)


def test_sgd_has_its_threshold_beside_the_sharpness_and_newton_has_none(tmp_path):
    def sgd(params):
        return torch.optim.SGD(params, 0.05, momentum=0.5, weight_decay=0.25)

    def newton(params):
        return hvpopt.NewtonCG(params, curvature="hessian")

    monitor = CurvatureMonitor(metrics=["sharpness"], budget=None)
    _, trainer, _ = fit(sgd, tmp_path / "sgd", module=Square, callbacks=[monitor])
    row = logged(trainer, "curvature/sharpness")[0]
    assert row["curvature/stability_threshold"] == pytest.approx(2 * 1.5 / 0.05)
    assert row["curvature/sharpness"] == pytest.approx(7.25, rel=1e-3)
    monitor = CurvatureMonitor(metrics=["sharpness"], budget=None)
    _, trainer, _ = fit(newton, tmp_path / "newton", module=Square, callbacks=[monitor])
    row = logged(trainer, "curvature/top_eigenvalue")[0]
    assert row["curvature/top_eigenvalue"] == pytest.approx(7.0, rel=1e-3)
    assert not {"curvature/sharpness", "curvature/stability_threshold"} & set(row)


def test_of_adam_the_preconditioned_sharpness_is_beside_its_threshold(tmp_path):
    monitor = CurvatureMonitor(1, metrics=["sharpness"], budget=None)
    net, trainer, _ = fit(adam, tmp_path, module=Square, callbacks=[monitor], epochs=1)
    row = logged(trainer, "curvature/sharpness")[-1]
    assert row["curvature/top_eigenvalue"] == pytest.approx(7.0, rel=1e-3)
    assert row["curvature/stability_threshold"] == pytest.approx(38 / 0.01)
    state = trainer.optimizers[0].state[net.w]
    root = (state["exp_avg_sq"] / (1 - 0.999**4)).sqrt() + 1e-8
    expected = (torch.tensor([1.0, 2.0, 7.0]) / (root * (1 - 0.9**4))).max()
    assert row["curvature/sharpness"] == pytest.approx(float(expected), rel=2e-2)


def dense_hessian(net, batch):
    shapes = dict(net.named_parameters())

    def loss(flat):
        sizes = [p.numel() for p in shapes.values()]
        parts = [x.view_as(p) for x, p in zip(flat.split(sizes), shapes.values(), strict=True)]
        named = dict(zip(shapes, parts, strict=True))
        named = {name.removeprefix("net."): p for name, p in named.items()}
        return F.cross_entropy(torch.func.functional_call(net.net, named, (batch[0],)), batch[1])

    flat = torch.cat([p.detach().reshape(-1) for p in shapes.values()])
    return torch.autograd.functional.hessian(loss, flat)


def batches(num, size=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num * size, 10, generator=generator)
    return TensorDataset(x, torch.randint(0, 4, (num * size,), generator=generator))


def last_hessian(tmp_path, batch, **options):
    """What a monitor has measured at the last step, and the dense Hessian there on a batch."""
    val = options.pop("val", None)
    monitor = CurvatureMonitor(
        1, metrics=["sharpness", "trace", "layers"], budget=None, num_probes=400, **options
    )
    net, trainer, _ = fit(adam, tmp_path, module=Small, callbacks=[monitor], epochs=1, val=val)
    return logged(trainer, "curvature/trace")[-1], dense_hessian(net, batch)


def check(row, hessian):
    assert row["curvature/top_eigenvalue"] == pytest.approx(
        float(torch.linalg.eigvalsh(hessian)[-1]), rel=2e-2
    )
    trace = float(hessian.trace())
    assert row["curvature/trace_low"] <= trace <= row["curvature/trace_high"]
    first = float(hessian.diagonal()[:33].sum())
    assert row["curvature/layer_trace/net.0"] == pytest.approx(first, rel=0.1)


@pytest.mark.parametrize("kind", ["batch", "loader", "shuffled loader", "val"])
def test_the_probe_may_be_a_batch_or_held_out_batches(tmp_path, kind):
    data = batches(3)
    everything = data.tensors
    loader = DataLoader(data, batch_size=12, shuffle=kind.startswith("shuffled"))
    if kind == "batch":
        row, hessian = last_hessian(tmp_path, everything, probe=list(everything))
    elif kind == "val":
        row, hessian = last_hessian(tmp_path, everything, probe="val", num_batches=3, val=loader)
    else:
        row, hessian = last_hessian(tmp_path, everything, probe=loader, num_batches=3)
    check(row, hessian)


def test_batches_of_a_loader_count_by_their_examples_and_no_more_than_asked_for_are_read(tmp_path):
    loader = DataLoader(batches(3), batch_size=20)  # 20 and 16
    row, hessian = last_hessian(tmp_path, batches(3).tensors, probe=loader, num_batches=5)
    check(row, hessian)
    first = [x[:20] for x in batches(3).tensors]
    row, hessian = last_hessian(tmp_path / "first", first, probe=loader, num_batches=1)
    check(row, hessian)


def test_the_ggn_of_a_classifier_has_no_negative_eigenvalue_and_the_hessian_does(tmp_path):
    rows = {}
    for curvature, is_signed in (("ggn", False), ("fisher", False), ("hessian", True)):
        monitor = CurvatureMonitor(metrics=["spectrum"], budget=None, curvature=curvature)
        _, trainer, _ = fit(adam, tmp_path / curvature, module=Small, callbacks=[monitor], epochs=1)
        rows[curvature] = logged(trainer, "curvature/spectrum_min")[0]
        assert (rows[curvature]["curvature/spectrum_min"] < -1e-3) == is_signed
    # of cross-entropy they are one matrix
    largest = [rows[name]["curvature/spectrum_max"] for name in ("ggn", "fisher")]
    assert largest[0] == pytest.approx(largest[1], rel=1e-4)


def test_under_bf16_the_figures_are_those_of_float32_to_within_its_digits(tmp_path):
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        monitor = CurvatureMonitor(metrics=["sharpness", "trace"], budget=None)
        _, trainer, _ = fit(
            adam, tmp_path / precision, module=Small, callbacks=[monitor], precision=precision
        )
        found[precision] = logged(trainer, "curvature/trace")[0]
    for name in ("curvature/top_eigenvalue", "curvature/trace"):
        ours, exact = found["bf16-mixed"][name], found["32-true"][name]
        assert ours == pytest.approx(exact, rel=0.1)
        assert ours != exact


@pytest.mark.parametrize("make", [adam, hvpopt.NewtonCG], ids=["adam", "newton_cg"])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}],
    ids=["plain", "accumulation", "bf16", "clipping"],
)
def test_training_goes_on_to_the_bit_as_without_the_monitor(tmp_path, make, options):
    monitor = CurvatureMonitor(2, metrics=ALL, budget=None, probe=None)
    watched = fit(make, tmp_path / "a", callbacks=[monitor], **options)
    watched_world = world(*watched)
    alone = fit(make, tmp_path / "b", **options)
    torch.testing.assert_close(watched_world, world(*alone), rtol=0, atol=0)
    for a, b in zip(watched[0].parameters(), alone[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(logged(watched[1], "curvature/trace")) >= 3


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("probe", ["val", "loader"])
def test_reading_a_probe_from_a_shuffling_loader_leaves_no_trace(tmp_path, probe):
    def run(name, is_watched):
        loader = DataLoader(batches(2), batch_size=12, shuffle=True)
        val = loader if probe == "val" else None
        monitor = CurvatureMonitor(1, probe="val" if val else loader, budget=None)
        callbacks = [monitor] if is_watched else []
        net, *rest = fit(adam, tmp_path / name, callbacks=callbacks, module=Validated, val=val)
        return net, world(net, *rest)

    (ours, with_it), (theirs, without) = run("a", True), run("b", False)
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


class Validated(Ordinary):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))


def test_the_figures_do_not_depend_on_dropout_or_on_what_else_is_measured(tmp_path):
    values = []
    for metrics in (["trace", "trace"], ["sharpness", "trace", "slices"]):
        monitor = CurvatureMonitor(1, metrics=metrics, budget=None)
        _, trainer, _ = fit(  # a learning rate of zero: the same parameters at every step
            lambda p: torch.optim.SGD(p, 0.0), tmp_path / str(len(metrics)), callbacks=[monitor]
        )
        values += [row["curvature/trace"] for row in logged(trainer, "curvature/trace")]
    assert len(values) == 16
    np.testing.assert_allclose(values, values[0], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_the_probe_is_the_first_batch_that_is_not_skipped(tmp_path):
    class SkipsFirst(Square):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch)

    monitor = CurvatureMonitor(every_n_steps=1, budget=None)
    _, trainer, _ = fit(torch.optim.SGD, tmp_path, module=SkipsFirst, callbacks=[monitor])
    assert len(logged(trainer, "curvature/trace")) == 7


def test_where_the_budget_is_spent_there_is_the_first_measurement_and_no_other(tmp_path):
    monitor = CurvatureMonitor(1, metrics=["trace"], budget=1e-6)
    _, trainer, _ = fit(adam, tmp_path, module=Square, callbacks=[monitor])
    (row,) = logged(trainer, "curvature/trace")
    assert row["step"] == 0
    assert 1e-6 < row["curvature/time_share"] < 1
    assert row["curvature/products"] == 10


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_what_cannot_be_measured_is_refused(tmp_path):
    class Manual(Square):
        automatic_optimization = False

    class ReadsItself(Square):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter))

    def run(module, *monitors):
        fit(torch.optim.SGD, tmp_path, module=module, callbacks=monitors)

    with pytest.raises(ValueError, match=r"under manual optimization.*give it a loss"):
        run(Manual, CurvatureMonitor())
    with pytest.raises(ValueError, match="from a dataloader_iter: give it a loss and a probe"):
        run(ReadsItself, CurvatureMonitor())
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        run(Square, CurvatureMonitor(), CurvatureMonitor())
    with pytest.raises(ValueError, match="prefix='optimizer': expected a word without a slash"):
        CurvatureMonitor(prefix="optimizer")


def test_with_a_loss_of_its_own_manual_optimization_is_measured_too(tmp_path):
    class Manual(Small):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    monitor = CurvatureMonitor(
        2, metrics=["trace"], budget=None, loss=lambda module, batch: module.loss(batch)
    )
    _, trainer, _ = fit(torch.optim.SGD, tmp_path, module=Manual, callbacks=[monitor])
    manual = [row["curvature/trace"] for row in logged(trainer, "curvature/trace")]
    monitor = CurvatureMonitor(2, metrics=["trace"], budget=None)
    _, trainer, _ = fit(torch.optim.SGD, tmp_path / "auto", module=Small, callbacks=[monitor])
    automatic = [row["curvature/trace"] for row in logged(trainer, "curvature/trace")]
    assert len(manual) == 5
    np.testing.assert_allclose(manual, automatic, rtol=1e-5)


def test_two_monitors_of_different_prefixes_watch_one_run(tmp_path):
    held_out = CurvatureMonitor(
        2, metrics=["trace"], budget=None, prefix="held_out", probe=list(batches(1).tensors)
    )
    monitors = [CurvatureMonitor(2, metrics=["trace"], budget=None), held_out]
    _, trainer, _ = fit(adam, tmp_path, module=Small, callbacks=monitors)
    ours, theirs = logged(trainer, "curvature/trace"), logged(trainer, "held_out/trace")
    assert len(ours) == len(theirs) == 5
    assert ours[0]["curvature/trace"] != theirs[0]["held_out/trace"]
