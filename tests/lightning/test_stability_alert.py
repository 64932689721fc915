"""The alert of a sharpness that stays over what the learning rate allows."""

import logging
import math

import pytest
import torch
from event_files import events, scalars
from fits import Small, Square, fit
from lightning.pytorch.loggers import TensorBoardLogger

from hvpopt.curvature import gradient_descent_limit, optimizer_limit, sharpness
from hvpopt.lightning.callbacks import CurvatureMonitor
from hvpopt.lightning.monitors.measures import MEASURES
from hvpopt.lightning.monitors.stability import StabilityAlert, rounded_down

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


def found(eigenvalue, lr=0.1, **options):
    d = torch.tensor([eigenvalue, 1.0], dtype=torch.float64)
    limit = gradient_descent_limit(lr, **options)
    return sharpness(lambda v: [d * v[0]], [d], limit=limit, generator=torch.Generator())


def test_it_speaks_after_so_many_measurements_above_the_limit_and_then_ever_more_rarely():
    alert = StabilityAlert(3)
    spoken = [step for step in range(1, 1001) if alert(step, found(41.0)) is not None]
    assert spoken == [3, 6, 12, 24, 48, 96, 192, 384, 768]
    assert alert.num_alerts == 9


def test_a_measurement_below_the_limit_starts_the_count_anew():
    alert = StabilityAlert(2)
    for step, eigenvalue in enumerate([30.0, 19.0, 30.0, 19.0, 30.0], start=1):
        assert alert(step, found(eigenvalue)) is None
    assert alert(6, found(30.0)) is not None


def test_the_line_names_the_limit_and_a_learning_rate_that_is_stable():
    line = StabilityAlert(1)(70, found(45.0, 0.1, momentum=0.9))
    assert line == (
        "Step 70: the largest eigenvalue of the Hessian, 45, has stayed over (2 + 2β) / lr = 38 "
        "for 1 measurement: steps along its eigenvector overshoot. lr=0.084 would be stable "
        "(now 0.1)."
    )
    assert gradient_descent_limit(0.084, momentum=0.9).threshold > 45.0
    assert "\n" not in line


def test_of_adam_the_line_says_that_the_hessian_is_preconditioned():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([w], lr=0.1)
    w.grad = torch.full((2,), 1e-3)
    optimizer.step()
    limit = optimizer_limit(optimizer, [w])
    over = sharpness(lambda v: [9.0 * v[0]], [w.detach()], limit=limit, generator=torch.Generator())
    assert "largest eigenvalue of the preconditioned Hessian" in StabilityAlert(1)(1, over)


def test_without_a_limit_there_is_no_alert():
    d = torch.tensor([1e9, 1.0])
    unlimited = sharpness(lambda v: [d * v[0]], [d], generator=torch.Generator())
    assert StabilityAlert(1)(1, unlimited) is None


def test_a_resumed_alert_keeps_its_count_and_its_silence():
    alert = StabilityAlert(3)
    for step in (1, 2, 3):
        alert(step, found(41.0))
    again = StabilityAlert(3)
    again.load_state_dict(alert.state_dict())
    assert [step for step in range(4, 13) if again(step, found(41.0))] == [6, 12]
    assert again.num_alerts == 3


@pytest.mark.parametrize("x", [0.0999999, 0.1, 123.0, 7e-9, 0.0101])
def test_a_learning_rate_is_rounded_down_to_two_digits(x):
    assert 0.9 * x < rounded_down(x) <= x
    assert float(f"{rounded_down(x):.1e}") == rounded_down(x)


def test_a_run_that_diverges_is_warned_of_in_one_line_and_a_stable_one_is_not(tmp_path, caplog):
    def train(lr):
        caplog.clear()
        monitor = CurvatureMonitor(1, metrics=["sharpness"], budget=None, alert_after=2)
        with caplog.at_level(logging.WARNING, logger="hvpopt"):
            # ½ Σ aᵢ wᵢ² with a largest of 7: stable up to 2 / 7
            fit(
                lambda p: torch.optim.SGD(p, lr),
                tmp_path / str(lr),
                module=Square,
                callbacks=[monitor],
                epochs=1,
            )
        return [record.getMessage() for record in caplog.records if record.name == "hvpopt"]

    lines = train(0.3)
    assert len(lines) == 2  # after steps 2 and 4
    assert lines[0].startswith("Step 2: the largest eigenvalue of the Hessian, 7, has stayed over")
    assert "2 / lr = 6.667 for 2 measurements" in lines[0]
    assert "lr=0.28 would be stable (now 0.3)" in lines[0]
    assert train(0.28) == []


def test_a_loss_that_leaves_the_finite_numbers_does_not_end_the_training(tmp_path):
    class Quartic(Square):
        def training_step(self, batch):
            return (self.w**4).sum()

    monitor = CurvatureMonitor(1, metrics=list(MEASURES), budget=None)
    logger = TensorBoardLogger(tmp_path, name=None, version="events")
    net, *_ = fit(
        lambda p: torch.optim.SGD(p, 5.0),
        tmp_path,
        module=Quartic,
        callbacks=[monitor],
        logger=logger,
    )
    assert not net.w.isfinite().any()
    found = events(tmp_path / "events")
    for tag in found.Tags()["scalars"]:
        assert all(map(math.isfinite, scalars(found, tag).values()))
    # 12 w², before the parameters overflow
    assert scalars(found, "curvature/top_eigenvalue")[0] == pytest.approx(12 * 19**2, rel=1e-2)


def test_the_alert_can_be_left_out(tmp_path, caplog):
    monitor = CurvatureMonitor(1, metrics=["sharpness"], budget=None, alert_after=None)
    fit(lambda p: torch.optim.SGD(p, 30.0), tmp_path, module=Small, callbacks=[monitor], epochs=1)
    assert "overshoot" not in caplog.text
    with pytest.raises(ValueError, match="alert_after=0 is out of range"):
        CurvatureMonitor(alert_after=0)
