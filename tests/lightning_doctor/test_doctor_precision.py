"""The check of products in float64, and what it says where a module cannot be run so."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from doctor_modules import BATCH, Net, Part
from torch import nn

from hvpopt.lightning.doctor import doctor
from hvpopt.lightning.doctor.products import ProductCheck, examine_products
from hvpopt.lightning.doctor.report import EngineFinding

SEQUENCES = (
    torch.randn(16, 6, 4, generator=torch.Generator().manual_seed(0)),
    torch.arange(16) % 3,
)


class Recurrent(L.LightningModule):
    """An LSTM with batch norm, whose differences of gradients are all rounding in float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def training_step(self, batch):
        start = torch.zeros(1, len(batch[0]), 8)  # of the default dtype
        hidden, _ = self.lstm(batch[0], (start, start))
        return F.cross_entropy(self.out(self.norm(hidden[:, -1])), batch[1])


def test_float32_is_checked_in_float64():
    module = Recurrent()
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    report = doctor(module, SEQUENCES, seconds=0.0)
    found = report.finding("products, hessian")
    assert found.verdict == "ok"
    assert found.text.startswith("agree with differences of gradients in float64 to ")
    assert report.difference_error < 1e-4
    for engine in ("graph", "dual"):
        assert report.engine(engine, "hessian").error < 1e-4
    assert torch.get_default_dtype() == torch.float32
    for name, p in module.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, params[name])
        assert p.grad is None
    assert module.norm.running_mean.dtype == torch.float32
    assert module.norm.running_mean.tolist() == [0.0] * 8


def test_products_in_bfloat16_are_told_from_wrong_ones():
    trainer = L.Trainer(
        accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False
    )
    module = Recurrent()
    found = doctor(module, SEQUENCES, trainer=trainer, seconds=0.0).finding("products, hessian")
    assert found.verdict in ("ok", "note")
    assert "in float64" in found.text


def test_a_wrong_second_derivative_is_found_in_float32_too():
    class Hidden(Recurrent):
        def training_step(self, batch):
            loss = super().training_step(batch)
            return loss + (self.out.weight * self.out.weight.detach() ** 2).sum()

    found = doctor(Hidden(), SEQUENCES, seconds=0.0).finding("products, hessian")
    assert found.verdict == "warning"
    assert "differ from differences of gradients in float64 by" in found.text


def test_a_module_that_does_not_run_in_float64_is_checked_in_its_own_precision():
    class Single(Recurrent):
        def training_step(self, batch):
            if batch[0].dtype == torch.float64:
                raise TypeError("float32 alone")
            return super().training_step(batch)

    module = Single()
    report = doctor(module, SEQUENCES, seconds=0.0)
    assert report.finding("products, hessian").text.startswith(
        "agree with differences of gradients"
    )
    assert "float64" not in report.finding("products, hessian").text
    assert report.difference_error > 1e-4  # those in float64 are good to 1e-6
    assert module.out.weight.dtype == torch.get_default_dtype() == torch.float32


def test_kinks_are_kinks_in_float64_too():
    module = Net(Part(lambda x: (1e4 * x).clamp(-1, 1))).float()
    module.training_step = lambda batch: F.cross_entropy(module.net(batch[0]), batch[1])
    found = doctor(module, BATCH, seconds=0.0).finding("products, hessian")
    assert found.verdict in ("ok", "note")


def test_a_module_without_lightning_is_converted_with_its_batch():
    module = Recurrent()
    lstm, norm, out = net = nn.ModuleList([module.lstm, module.norm, module.out])

    def loss(batch):
        return F.cross_entropy(out(norm(lstm(batch[0])[0][:, -1])), batch[1])

    report = doctor(net, SEQUENCES, loss=loss, seconds=0.0)
    assert "in float64" in report.finding("products, hessian").text
    assert out.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("check", "error", "verdict", "text"),
    [
        (ProductCheck(1e-5), 1e-4, "ok", "agree with differences of gradients to 1e-04"),
        (ProductCheck(0.02), 0.17, "ok", "to 2e-01, as well as those can tell"),
        (ProductCheck(1e-5), 0.3, "warning", "by engine dual differ from differences of gradients"),
        (ProductCheck(0.5), 0.3, "note", "not checked: differences of gradients disagree"),
        (ProductCheck(0.5, refusal="why"), 0.3, "note", "does not run in float64: why"),
        (ProductCheck(1e-9, {"dual": 1e-8}), 0.3, "note", "in float64 they agree to 1e-08"),
        (ProductCheck(1e-9, {"dual": 0.2}), 0.3, "warning", "of gradients in float64 by"),
        (ProductCheck(1e-9, {}), 0.3, "warning", "differences of gradients in float64 by 3e-01"),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_errors(check, error, verdict, text):
    engines = [
        EngineFinding("graph", "hessian", True, error=1e-9),
        EngineFinding("dual", "hessian", True, error=error),
        EngineFinding("finite_difference", "hessian", True, error=0.9),
    ]
    (found,) = examine_products(engines, check)
    assert (found.subject, found.verdict) == ("products, hessian", verdict)
    assert text in found.text
