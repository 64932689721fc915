"""What prevents training, bad input, and Lightning's settings."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from doctor_modules import BATCH, Net
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn

import hvpopt
from hvpopt.lightning.doctor import doctor
from hvpopt.lightning.doctor.settings import examine_settings


def examined(module, **options):
    return doctor(module, BATCH, seconds=0.0, **options)


def trainer(**options):
    return L.Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def newton(module=Net):
    return module(make_optimizer=hvpopt.NewtonCG)


# --- bad input


def test_a_module_without_a_training_step_needs_a_loss():
    with pytest.raises(TypeError, match=r"Linear is no LightningModule, .* give loss="):
        doctor(nn.Linear(2, 2), BATCH)


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match="Net has no parameter that requires a gradient"):
        doctor(Net().requires_grad_(False), BATCH)


def test_seconds_below_zero_are_refused():
    with pytest.raises(ValueError, match="seconds=-1 is out of range"):
        doctor(Net(), BATCH, seconds=-1)


# --- what training would end with


def test_a_training_step_that_raises_is_a_failure_with_its_words():
    def wrong(z, y):
        raise IndexError("no such class")

    report = examined(Net(loss=wrong))
    assert not report.can_train
    assert report.engines == ()
    assert math.isnan(report.loss)
    found = report.finding("loss")
    assert (found.verdict, found.text) == ("failure", "training_step raised IndexError")
    assert found.remedy == "no such class"
    assert "It cannot train: see loss." in str(report)


def test_a_batch_that_is_skipped_is_a_failure():
    found = examined(Net(loss=lambda z, y: None)).finding("loss")
    assert found.text == "training_step gave none for this batch, and backward was not called"


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda z, y: F.cross_entropy(z, y) * math.nan, "nan: divisions by zero"),
        (lambda z, y: (z - z).square().sum().sqrt(), "its gradient is not finite"),
        (lambda z, y: (0 * z).sum(), "its gradient is zero"),
    ],
    ids=["loss", "gradient", "zero"],
)
def test_a_loss_without_a_direction_is_found(loss, text):
    report = examined(Net(loss=loss))
    assert text in report.finding("loss").text
    assert report.can_train is (text == "its gradient is zero")


def test_a_product_that_is_not_finite_is_no_product():
    module = Net(loss=lambda z, y: F.cross_entropy(z, y) + (z * 0).abs().pow(1.5).sum())
    report = examined(module)
    graph = report.engine("graph", "hessian")
    assert not graph.is_supported
    assert graph.reason == "the product is not finite, though loss and gradient are"
    assert "such as a root or norm near zero" in str(report)


def test_a_step_to_infinity_is_a_failure():
    module = Net(make_optimizer=lambda p: torch.optim.SGD(p, lr=1e308))
    module.loss = lambda z, y: 1e9 * F.cross_entropy(z, y)
    found = examined(module).finding("one step")
    assert found.verdict == "failure"
    assert "SGD moved the parameters to where they are not finite" in found.text


def test_an_optimizer_that_cannot_be_configured_is_a_failure():
    def broken(params):
        raise RuntimeError("no learning rate")

    found = examined(Net(make_optimizer=broken)).finding("optimizer")
    assert (found.verdict, found.remedy) == ("failure", "no learning rate")
    assert found.text == "configure_optimizers raised RuntimeError"


def test_several_optimizers_under_automatic_optimization_are_a_failure():
    class Several(Net):
        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[0], self.net[2])]

    report = examined(Several())
    assert [f.subject for f in report.failures] == ["optimizer"]
    assert "only supported with manual optimization" in report.finding("optimizer").remedy


# --- manual optimization


class Manual(Net):
    gives_closure = True

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(self.net(batch[0].double()), batch[1])
            self.manual_backward(loss)
            return loss

        if self.gives_closure:
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()


class WithoutClosure(Manual):
    gives_closure = False


def test_manual_optimization_is_examined_through_its_own_steps():
    expected, report = examined(newton()), examined(newton(Manual))
    assert report.can_train, str(report)
    assert report.loss == pytest.approx(expected.loss, rel=1e-12)
    assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-12)
    assert report.engine("graph", "ggn").error < 1e-12
    assert report.finding("one step").text == expected.finding("one step").text
    assert "step(closure=closure)" in report.finding("optimization").remedy


def test_manual_optimization_without_a_closure_cannot_train_a_second_order_optimizer():
    report = examined(newton(WithoutClosure))
    assert [f.subject for f in report.failures] == ["one step"]
    assert "optimizer.step(closure=closure)" in report.finding("one step").remedy
    first_order = examined(WithoutClosure(make_optimizer=lambda p: torch.optim.SGD(p, 0.1)))
    assert first_order.can_train


# --- settings


def settings(module=None, optimizers=None, **options):
    module = module or newton()
    if optimizers is None:
        optimizers = [hvpopt.NewtonCG(module.parameters())]
    fitter = trainer(**options)
    found = examine_settings(fitter, module, optimizers, fitter.callbacks)
    return {finding.subject: finding for finding in found}


def half_precision():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


def test_settings_that_clash_with_nothing_are_one_line():
    (found,) = settings().values()
    assert (found.verdict, found.text) == ("ok", "nothing that clashes")


def test_16_mixed_is_a_failure_for_who_needs_a_closure():
    found = settings(plugins=half_precision())["precision"]
    assert (found.verdict, found.remedy) == ("failure", "Use bf16-mixed or 32-true.")
    assert "NewtonCG gets no closure" in found.text
    sgd = [torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)]
    assert settings(optimizers=sgd, plugins=half_precision())["precision"].verdict == "warning"


def test_16_mixed_fails_the_step_as_training_would():
    report = examined(newton(), trainer=trainer(plugins=half_precision()))
    assert [f.subject for f in report.failures] == ["precision"]


@pytest.mark.parametrize(
    ("options", "subject", "verdict", "text"),
    [
        ({"precision": "bf16-mixed"}, "precision", "note", "bf16-mixed: products carry"),
        ({"precision": "16-true"}, "precision", "warning", "overflow and underflow"),
        ({"gradient_clip_val": 0.5}, "clipping", "warning", "gradient_clip_val=0.5 clips"),
        ({"accumulate_grad_batches": 4}, "accumulation", "note", "over 4 micro-batches"),
        (
            {"callbacks": GradientAccumulationScheduler({0: 1, 2: 4})},
            "accumulation",
            "note",
            "scheduled",
        ),
        (
            {"strategy": DDPStrategy(static_graph=True), "devices": 2},
            "strategy",
            "note",
            "DDPStrategy on 2 processes",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_matters_is_named(options, subject, verdict, text):
    found = settings(**options)[subject]
    assert found.verdict == verdict
    assert text in found.text


def test_ddp_that_breaks_the_dual_engine_is_named():
    module = newton()
    fitter = trainer(strategy=DDPStrategy(find_unused_parameters=True), devices=2)
    found = examine_settings(fitter, module, [hvpopt.NewtonCG(module.parameters())], [])
    assert found[0].verdict == "warning"
    assert "find_unused_parameters=True: products by the dual engine raise" in found[0].text
    assert "engine='graph'" in found[0].remedy


def test_fsdp_is_a_failure_for_second_order_steps():
    module, fitter = newton(), trainer()
    fitter._accelerator_connector.strategy = object.__new__(FSDPStrategy)
    fitter.strategy._precision_plugin = FSDPPrecision("32-true")
    fitter.strategy.cluster_environment = None
    found = examine_settings(fitter, module, [hvpopt.NewtonCG(module.parameters())], [])
    assert (found[0].subject, found[0].verdict) == ("strategy", "failure")
    assert "sharded by FSDP" in found[0].remedy


def test_hooks_of_the_module_are_named():
    class Hooked(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(optimizer_closure)

        def configure_gradient_clipping(self, *args, **kwargs): ...

    found = settings(module=newton(Hooked))
    assert "Hooked overrides optimizer_step" in found["optimizer_step"].text
    assert "Hooked overrides configure_gradient_clipping" in found["clipping"].text
