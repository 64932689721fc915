"""An ordinary LightningModule, unchanged, under automatic optimization."""

import csv
import math
import random

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from problems import flat, problem
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hvpopt
from hvpopt.lightning.callbacks import CurvatureMonitor, OptimizerMonitor
from hvpopt.preconditioners import Kronecker, Nystrom


class Ordinary(L.LightningModule):
    """Batch norm, dropout, metrics, logs, counters, lists: what people write."""

    def __init__(self, make_optimizer) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(10, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.3), nn.Linear(16, 4)
        )
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)
        self.seen = torchmetrics.MeanMetric()
        self.outputs: list[Tensor] = []
        self.num_calls = 0
        self.num_hooks = 0
        self.make_optimizer = make_optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * np.random.rand()
        z = self.net(x)
        loss = F.cross_entropy(z, y)
        self.outputs.append(loss.detach())
        self.num_calls += 1
        self.accuracy(z, y)
        self.seen.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"accuracy": self.accuracy, "mean": self.seen}, on_epoch=True, on_step=False)
        self.logger.log_metrics({"by_hand": float(self.num_calls)}, step=self.num_calls)
        return {"loss": loss, "z": z.detach()}

    def on_before_backward(self, loss):
        self.num_hooks += 1

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class CountHooks(L.Callback):
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def _count(self, name):
        self.counts[name] = self.counts.get(name, 0) + 1

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self._count("zero_grad")

    def on_before_backward(self, trainer, pl_module, loss):
        self._count("before_backward")

    def on_after_backward(self, trainer, pl_module):
        self._count("after_backward")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._count("before_step")


def fit(make_optimizer, tmp_path, *, callbacks=(), module=Ordinary, epochs=2, **options):
    L.seed_everything(1, verbose=False)
    x = torch.randn(64, 10)
    data = TensorDataset(x, (x @ torch.randn(10, 4)).argmax(1))
    net = module(make_optimizer)
    hooks = CountHooks()
    logger = CSVLogger(tmp_path, name=None, version="run")
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        callbacks=[hooks, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(net, DataLoader(data, batch_size=16))
    logger.save()
    return net, trainer, hooks


pytestmark = [
    # the data are in memory, and workers would only cost time
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
]


def world(net, trainer, hooks):
    """What one can see after a run, the parameters aside."""
    return {
        "buffers": {name: b.clone() for name, b in net.named_buffers()},
        "outputs": list(net.outputs),
        "calls": net.num_calls,
        "hooks": (net.num_hooks, hooks.counts),
        "metrics": dict(trainer.callback_metrics),
        "accuracy": {name: getattr(net.accuracy, name) for name in net.accuracy._defaults},
        "updates": (net.accuracy._update_count, net.seen._update_count),
        "step": trainer.global_step,
        "grads": [p.grad.clone() for p in net.parameters()],
        "random": (torch.rand(2), random.random(), np.random.rand()),
        "by_hand": [row["by_hand"] for row in logged(trainer, "by_hand")],
    }


def logged(trainer, name):
    """The rows of the logger's file that have the metric, as numbers."""
    trainer.logger.save()
    with open(trainer.logger.experiment.metrics_file_path) as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if v} for row in rows if row.get(name)]


def frozen(optimizer):
    """Keeps an optimizer's step from moving anything, so that its world can be compared."""
    optimizer.register_step_pre_hook(lambda o, a, k: o.held.extend(_data(o)))
    optimizer.register_step_post_hook(lambda o, a, k: _restore(o))
    optimizer.held = []
    return optimizer


def _data(optimizer):
    return [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]


def _restore(optimizer):
    with torch.no_grad():
        for p, held in zip(
            (p for g in optimizer.param_groups for p in g["params"]), optimizer.held, strict=True
        ):
            p.copy_(held)
    optimizer.held.clear()


OPTIMIZERS = {
    "newton_cg": lambda p: hvpopt.NewtonCG(p),
    "newton_cg hessian": lambda p: hvpopt.NewtonCG(p, curvature="hessian", max_cg_steps=5),
    "newton_cg dual": lambda p: hvpopt.NewtonCG(p, engine="dual", max_cg_steps=3),
    "newton_cg kronecker": lambda p: hvpopt.NewtonCG(p, preconditioner=Kronecker(), max_cg_steps=5),
    "newton_cg nystrom": lambda p: hvpopt.NewtonCG(p, preconditioner=Nystrom(rank=4)),
    "trust_region": lambda p: hvpopt.TrustRegionNewtonCG(p, max_cg_steps=5),
    "sophia_h": lambda p: hvpopt.SophiaH(p, update_every=3),
    "sophia_g": lambda p: hvpopt.SophiaG(p, update_every=3),
    "adahessian": lambda p: hvpopt.AdaHessian(p),
    "smd": lambda p: hvpopt.SMD(p),
    "smd unguarded": lambda p: hvpopt.SMD(p, overshoot_guard=False),
    "smd hessian": lambda p: hvpopt.SMD(p, curvature="hessian", overshoot_guard=False),
}


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 4}], ids=["plain", "4 batches"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fit_leaves_the_world_as_sgd_with_the_same_update_does(name, options, tmp_path):
    theirs = world(*fit(lambda p: frozen(torch.optim.SGD(p, 0.1)), tmp_path / "sgd", **options))
    ours = world(*fit(lambda p: frozen(OPTIMIZERS[name](p)), tmp_path / "ours", **options))
    zero_grads = ours["hooks"][1].pop("zero_grad"), theirs["hooks"][1].pop("zero_grad")
    assert zero_grads[0] == zero_grads[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours["calls"] == 8
    assert ours["by_hand"] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 4}], ids=["plain", "4 batches"]
)
def test_smd_without_meta_learning_trains_like_sgd(options, tmp_path):
    theirs, *_ = fit(lambda p: torch.optim.SGD(p, 0.1), tmp_path / "sgd", **options)
    ours, *_ = fit(
        lambda p: hvpopt.SMD(p, 0.1, mu=0, overshoot_guard=False), tmp_path / "smd", **options
    )
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 4}],
    ids=str,
)
@pytest.mark.parametrize("name", ["newton_cg", "smd"])
def test_smoke_the_loss_falls_under_lightnings_options(name, options, tmp_path):
    net, *_ = fit(OPTIMIZERS[name], tmp_path, epochs=20, **options)
    assert sum(net.outputs[-4:]) < sum(net.outputs[:4])


@pytest.mark.parametrize("name", ["newton_cg", "smd"])
def test_a_closure_that_never_comes_is_explained(name):
    optimizer = OPTIMIZERS[name]([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=r"'16-mixed'.*use 'bf16-mixed'"):
        optimizer.step()


class Skips(Ordinary):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_training_step_that_returns_none_skips_its_batch(tmp_path):
    net, trainer, _ = fit(OPTIMIZERS["newton_cg"], tmp_path, module=Skips)
    assert net.num_calls == 6
    assert trainer.optimizers[0].num_steps == 8


def test_optimizer_monitor_logs_every_step_to_every_logger(tmp_path):
    _, trainer, _ = fit(OPTIMIZERS["newton_cg"], tmp_path, callbacks=[OptimizerMonitor()])
    rows = logged(trainer, "optimizer/damping")
    assert [row["step"] for row in rows] == list(range(8))
    assert {"optimizer/loss", "optimizer/cg_steps", "optimizer/reduction_ratio"} <= set(rows[0])
    assert trainer.progress_bar_metrics["damping"] == pytest.approx(rows[-1]["optimizer/damping"])


class Square(L.LightningModule):
    """½ Σ aᵢ wᵢ², whose Hessian is diag(a)."""

    def __init__(self, make_optimizer) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.make_optimizer = make_optimizer

    def training_step(self, batch):
        self.log("here", 1.0)
        return 0.5 * (torch.tensor([1.0, 2.0, 7.0]) * self.w**2).sum()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_curvature_monitor_logs_the_eigenvalue_and_the_trace(tmp_path, options):
    monitor = CurvatureMonitor(every_n_steps=2)
    _, trainer, _ = fit(
        lambda p: torch.optim.Adam(p), tmp_path, module=Square, callbacks=[monitor], **options
    )
    rows = logged(trainer, "curvature/trace")
    steps = 8 // options.get("accumulate_grad_batches", 1)
    assert len(rows) == 1 + steps // 2
    for row in rows:
        assert row["curvature/top_eigenvalue"] == pytest.approx(7.0, rel=1e-3)
        assert row["curvature/trace"] == pytest.approx(10.0, rel=1e-5)


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, 0.01), OPTIMIZERS["newton_cg"]])
def test_curvature_monitor_changes_nothing(tmp_path, make):
    watched = fit(make, tmp_path / "a", callbacks=[CurvatureMonitor(every_n_steps=2)])
    watched_world = world(*watched)
    alone = fit(make, tmp_path / "b")
    torch.testing.assert_close(watched_world, world(*alone), rtol=0, atol=0)
    for a, b in zip(watched[0].parameters(), alone[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(logged(watched[1], "curvature/trace")) == 5


def test_curvature_monitor_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="every_n_steps=0 is out of range: expected a number at"):
        CurvatureMonitor(every_n_steps=0)

    class Manual(Square):
        automatic_optimization = False

    with pytest.raises(ValueError, match="under manual optimization"):
        fit(lambda p: torch.optim.SGD(p), tmp_path, module=Manual, callbacks=[CurvatureMonitor()])


def test_a_failed_step_is_warned_of_once_and_training_goes_on(tmp_path):
    class Explodes(Ordinary):
        def training_step(self, batch, batch_idx):
            out = super().training_step(batch, batch_idx)
            out["loss"] = out["loss"] * (math.nan if batch_idx == 2 else 1.0)
            return out

    with pytest.warns(UserWarning, match="The loss is not finite: the parameters stay") as caught:
        net, *_ = fit(
            OPTIMIZERS["newton_cg"], tmp_path, module=Explodes, callbacks=[OptimizerMonitor()]
        )
    assert len([w for w in caught if "not finite" in str(w.message)]) == 1
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_curvature_monitor_takes_the_first_batch_that_is_not_skipped(tmp_path):
    class SkipsFirst(Square):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch)

    monitor = CurvatureMonitor(every_n_steps=1)
    _, trainer, _ = fit(torch.optim.SGD, tmp_path, module=SkipsFirst, callbacks=[monitor])
    assert len(logged(trainer, "curvature/trace")) > 0


@pytest.mark.parametrize("name", ["newton_cg", "smd"])
def test_manual_optimization_steps_with_a_closure_as_automatic_does(tmp_path, name):
    class Manual(Ordinary):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                loss = super(Manual, self).training_step(batch, batch_idx)["loss"]
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    manual = fit(OPTIMIZERS[name], tmp_path / "manual", module=Manual)
    expected = fit(OPTIMIZERS[name], tmp_path / "automatic")
    assert manual[0].num_calls == expected[0].num_calls == 8
    for ours, theirs in zip(manual[0].parameters(), expected[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", [hvpopt.NewtonCG, hvpopt.SMD])
def test_fabric_steps_as_plain_torch_does(make):
    results = []
    for fabric in (None, L.Fabric(accelerator="cpu", devices=1)):
        task = problem("mlp")
        net, optimizer = task.net, make(task.params)
        if fabric is not None:
            net, optimizer = fabric.setup(net, optimizer)
        backward = torch.Tensor.backward if fabric is None else fabric.backward

        def closure(net=net, optimizer=optimizer, backward=backward, task=task):
            optimizer.zero_grad()
            loss = task.loss(net(task.x))
            backward(loss)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        results.append(flat(task.params))
    assert torch.equal(*results)
