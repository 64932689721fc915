"""SPENModule: what it logs, evaluation under inference mode, and any optimizer."""

import functools

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from spen_problems import blocks, checkpoint, minimizer, network, staged, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hvpopt
from hvpopt.lightning.phases import Phase
from hvpopt.lightning.train import train
from hvpopt.nested.losses import EndToEnd, LabelByLabel, StructuredHinge

JOINT = {"joint": Phase(StructuredHinge())}
END_TO_END = {"joint": Phase(EndToEnd())}


def logged(folder):
    """Values of each scalar that TensorBoard has."""
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    events.Reload()
    scalars = {
        tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    return scalars, events


# --- evaluation


def test_validate_test_and_predict_run_inference_under_inference_mode(tmp_path):
    module, data = network(JOINT), blocks()
    run = trainer(tmp_path, 1)
    modes = []
    module.energy.head.register_forward_hook(
        lambda *_: modes.append(torch.is_inference_mode_enabled())
    )
    run.validate(module, datamodule=data, verbose=False)
    (figures,) = run.test(module, datamodule=data, verbose=False)
    predicted = torch.cat(run.predict(module, datamodule=data))
    assert modes  # inference evaluated the energy, and needs gradients there
    features, labels = next(iter(data.test_dataloader()))
    module.eval()
    with torch.no_grad():
        expected = module(features)
    torch.testing.assert_close(predicted, expected)
    assert figures["test/loss"] == pytest.approx(
        float((expected - labels).square().sum(1).mean()), rel=1e-5
    )
    assert figures["test_inference/steps"] == 5


def test_inference_finds_a_minimum_of_the_energy():
    module = network(JOINT, minimizer=minimizer(num_steps=200))
    x = torch.randn(4, 8)
    y = module(x).detach().requires_grad_()
    entropy = (torch.special.entr(y) + torch.special.entr(1 - y)).sum()
    (slope,) = torch.autograd.grad(module.energy(x, y).sum() - entropy, y)
    assert slope.abs().max() < 1e-5
    assert module.infer(x).y.shape == (4, 6)


@pytest.mark.parametrize(
    "arguments", [{"minimizer": None}, {"phases": {"c": Phase(LabelByLabel(), trains="encoder")}}]
)
def test_without_inference_the_prediction_is_the_classifiers(tmp_path, arguments):
    phases = {"c": Phase(LabelByLabel(), trains="encoder")}
    module = network(**{"phases": phases} | arguments)
    x = torch.randn(4, 8)
    torch.testing.assert_close(module(x), module.energy.encoder(x)["scores"].sigmoid())
    assert module.infer(x) is None
    trainer(tmp_path, 1).fit(module, datamodule=blocks())


def test_prediction_takes_inputs_alone_too():
    module, x = network(JOINT), torch.randn(4, 8)
    torch.testing.assert_close(module.predict_step(x, 0), module.predict_step((x, None), 0))


# --- logs


def test_figures_of_inference_adjoint_and_scores_are_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(tmp_path, 2, logger=logger).fit(network(END_TO_END), datamodule=blocks())
    scalars, events = logged(tmp_path)
    assert scalars["inference/steps"] == [5.0] * 6
    assert scalars["inference/gradients"][0] >= 5
    assert scalars["inference/row_gradients"][0] == 16 * scalars["inference/gradients"][0]
    assert scalars["inference/diverged"] == [0.0] * 6
    assert scalars["inference/residual"][0] > 0
    assert scalars["adjoint/products"] == [5.0] * 6
    assert len(scalars["inference/energy"]) == len(scalars["train/task_loss"]) == 6
    for tag in ("val/f1", "val/candidate", "val/threshold", "val/loss", "val_inference/steps"):
        assert len(scalars[tag]) == 2
    assert events.Tags()["images"] == ["val/energy_path"]
    assert len(events.Images("val/energy_path")) == 2


def test_the_hinge_needs_no_adjoint_and_logs_how_many_rows_offend(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(tmp_path, 1, logger=logger).fit(network(JOINT), datamodule=blocks())
    scalars, _ = logged(tmp_path)
    assert "adjoint/products" not in scalars
    assert all(0 <= value <= 1 for value in scalars["train/violated"])


def test_the_residual_of_an_implicit_adjoint_is_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = network(END_TO_END, minimizer=minimizer("implicit", num_steps=300))
    trainer(tmp_path, 1, logger=logger).fit(module, datamodule=blocks())
    scalars, _ = logged(tmp_path)
    assert all(0 <= value < 1e-4 for value in scalars["adjoint/residual"])
    assert all(value >= 1 for value in scalars["adjoint/products"])


def test_another_logger_gets_no_picture(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, 1, logger=logger).fit(network(JOINT), datamodule=blocks())
    assert "inference/steps" in (tmp_path / "metrics.csv").read_text()
    assert list(tmp_path.rglob("events.*")) == []


def test_the_test_rows_are_scored_at_the_best_checkpoints_threshold(tmp_path):
    module = network(staged())
    results = train(
        module,
        blocks(),
        functools.partial(trainer, tmp_path, 4),
        {"checkpoint": checkpoint(tmp_path)},
        output_dir=tmp_path,
    )
    state = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    thresholds = torch.linspace(-6, 6, 121).sigmoid()
    assert results["test/threshold"] == pytest.approx(
        float(thresholds[state["scores.threshold_index"]])
    )


# --- optimizers


def full_batch_losses(optimizer, phases, adjoint, tmp_path, epochs=4):
    """The training loss before each step, on one and the same batch."""
    logger = CSVLogger(tmp_path)
    module = network(phases, optimizer, adjoint).double()
    data = blocks(num_train=16)
    run = trainer(tmp_path, epochs, logger=logger, overfit_batches=1, precision="64-true")
    run.fit(module, datamodule=data)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        names, *lines = (line.strip().split(",") for line in file)
    column = names.index("train/loss")
    return [float(line[column]) for line in lines if line[column]]


@pytest.mark.filterwarnings("ignore:.*overfit.*")
@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(hvpopt.NewtonCG, curvature="hessian"),
        functools.partial(hvpopt.SMD, lr=0.05, curvature="hessian"),
    ],
)
@pytest.mark.parametrize("phases", [JOINT, END_TO_END])
def test_second_order_optimizers_lower_the_loss_smoke(tmp_path, optimizer, phases):
    losses = full_batch_losses(optimizer, phases, "unrolled", tmp_path)
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*overfit.*")
def test_newton_cg_with_its_defaults_trains_end_to_end_smoke(tmp_path):
    losses = full_batch_losses(hvpopt.NewtonCG, END_TO_END, "unrolled", tmp_path)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.filterwarnings("ignore:.*overfit.*")
def test_newton_cg_with_its_defaults_says_what_a_loss_of_energies_needs(tmp_path):
    with pytest.raises(ValueError, match=r"The GGN needs .* or choose curvature='hessian'"):
        full_batch_losses(hvpopt.NewtonCG, JOINT, "unrolled", tmp_path)


@pytest.mark.filterwarnings("ignore:.*overfit.*")
def test_an_adjoint_without_second_derivatives_is_refused_by_its_name(tmp_path):
    optimizer = functools.partial(hvpopt.NewtonCG, curvature="hessian", engine="graph")
    with pytest.raises(RuntimeError, match="adjoint='unrolled'"):
        full_batch_losses(optimizer, END_TO_END, "back_optimization", tmp_path)
