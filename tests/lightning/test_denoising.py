"""Denoising in a run: scores, and pictures that are read back from TensorBoard's files."""

import functools
import io

import lightning
import numpy as np
import pytest
import torch
from event_files import events, scalars
from idx_files import write_fashion_mnist
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.image import imread
from torch import nn

from hvpopt.lightning.denoising_pictures import DenoisingPictures, stages
from hvpopt.lightning.image_scores import ImagePSNR
from hvpopt.lightning.noisy_images import NoisyFashionMNIST
from hvpopt.lightning.phases import Phase
from hvpopt.lightning.spen import SPENModule
from hvpopt.nested import GradientDescent, Unconstrained
from hvpopt.nested.energies import denoising, feedforward
from hvpopt.nested.losses import EndToEnd, FirstGuess, Minimizer

STEP_SIZE = 0.1


def energy_module(num_steps=6, **method):
    torch.manual_seed(0)
    descent = GradientDescent(STEP_SIZE, num_steps, **method)
    return module(
        denoising(widths=[3], kernel_size=3),
        EndToEnd(task_loss="squared"),
        minimizer=Minimizer(method=descent, domain=Unconstrained(), start="initial"),
    )


def feedforward_module():
    torch.manual_seed(0)
    net = nn.Conv2d(1, 1, 3, padding=1)
    return module(feedforward(net), FirstGuess(task_loss="squared"))


def module(energy, loss, **arguments):
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
    phases = {"all": Phase(loss)}
    return SPENModule(energy, optimizer, phases=phases, scores=ImagePSNR(), **arguments)


def data(folder):
    root = folder / "images"
    root.mkdir()
    write_fashion_mnist(root)
    return NoisyFashionMNIST(
        10, root=root, num_val=20, num_test=20, num_train=20, eval_batch_size=8
    )


def trainer(folder, *callbacks, **arguments):
    arguments = {"logger": TensorBoardLogger(folder, name="", version="")} | arguments
    return lightning.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **arguments,
    )


def descent(energy, x, num_steps):
    """The iterates of gradient descent on the energy, written out."""
    iterates = [x]
    for _ in range(num_steps):
        y = iterates[-1].detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(x, y).sum(), y)
        iterates.append((y - STEP_SIZE * slope).detach())
    return iterates


def grid(rows):
    """The pixels of a picture whose rows are batches of images."""
    joined = torch.cat([torch.cat(list(row[:, 0]), dim=1) for row in rows])
    return (joined.clamp(0, 1) * 255).round()


def pixels(event):
    picture = imread(io.BytesIO(event.encoded_image_string), format="png")
    return torch.from_numpy(255 * np.atleast_3d(picture)[..., 0]).round()


def psnr_by_hand(images, clean):
    errors = (images.clamp(0, 1) - clean).square().flatten(1).mean(1)
    return float((-10 * errors.log10()).mean())


# --- pictures


@pytest.mark.parametrize("num_stages", [3, 4, 6, 9])
def test_the_picture_shows_noisy_images_the_steps_of_inference_and_clean_images(
    tmp_path, num_stages
):
    energy, images = energy_module(), data(tmp_path)
    callback = DenoisingPictures(5, num_stages=num_stages)
    trainer(tmp_path, callback).validate(energy, datamodule=images, verbose=False)
    (event,) = events(tmp_path).Images("val/denoising")
    noisy, clean = (part[:5] for part in next(iter(images.val_dataloader())))
    shown = {3: [2, 4, 6], 4: [2, 3, 5, 6], 6: range(1, 7), 9: range(1, 7)}[num_stages]
    iterates = descent(energy.energy, noisy, 6)
    expected = grid([noisy, *(iterates[step] for step in shown), clean])
    assert (pixels(event) - expected).abs().max() <= 1  # of 255


def test_without_inference_the_picture_has_the_output_alone_between(tmp_path):
    network, images = feedforward_module(), data(tmp_path)
    trainer(tmp_path, DenoisingPictures(3)).validate(network, datamodule=images, verbose=False)
    (event,) = events(tmp_path).Images("val/denoising")
    noisy, clean = (part[:3] for part in next(iter(images.val_dataloader())))
    with torch.no_grad():
        expected = grid([noisy, network.energy.encoder.net(noisy), clean])
    assert (pixels(event) - expected).abs().max() <= 1


def test_each_validation_of_a_training_run_gives_a_picture_the_sanity_check_none(tmp_path):
    run = trainer(tmp_path, DenoisingPictures(2), max_epochs=2)
    run.fit(energy_module(), datamodule=data(tmp_path))
    found = events(tmp_path)
    assert [event.step for event in found.Images("val/denoising")] == [2, 4]
    assert len(found.Images("val/energy_path")) == 2


def test_another_logger_gets_the_figures_and_no_picture(tmp_path):
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    run = trainer(tmp_path, DenoisingPictures(2), logger=logger, max_epochs=1)
    run.fit(energy_module(), datamodule=data(tmp_path))
    assert "val/psnr_noisy" in (tmp_path / "logs" / "metrics.csv").read_text()
    assert list(tmp_path.rglob("events.*")) == []


def test_images_that_are_done_at_the_start_are_shown_as_they_are():
    x = torch.rand(2, 1, 4, 4)
    shown = stages(energy_module(gtol=1e6), x, 3)
    torch.testing.assert_close(shown, x[None], rtol=0, atol=0)
    assert not shown.requires_grad


@pytest.mark.parametrize("arguments", [{"num_pictures": 0}, {"num_stages": 0}])
def test_a_picture_of_nothing_is_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}=0 is out of range"):
        DenoisingPictures(**arguments)


# --- scores


@pytest.mark.parametrize("make", [energy_module, feedforward_module])
def test_the_scores_are_those_of_all_images_and_of_their_noise(tmp_path, make):
    network, images = make(), data(tmp_path)
    run = trainer(tmp_path, DenoisingPictures(2))
    (found,) = run.test(network, datamodule=images, verbose=False)
    noisy, clean = (torch.cat(part) for part in zip(*images.test_dataloader(), strict=True))
    assert len(clean) == 20
    assert found["test/psnr_noisy"] == pytest.approx(psnr_by_hand(noisy, clean), abs=1e-4)
    with torch.no_grad():
        denoised = network(noisy)
    assert found["test/psnr"] == pytest.approx(psnr_by_hand(denoised, clean), abs=1e-4)
    assert found["test/loss"] == pytest.approx(
        float((denoised - clean).square().sum((1, 2, 3)).mean()), rel=1e-4
    )


def test_validation_logs_the_score_by_which_checkpoints_are_compared(tmp_path):
    run = trainer(tmp_path, DenoisingPictures(2), max_epochs=2)
    images = data(tmp_path)
    run.fit(energy_module(), datamodule=images)
    found = events(tmp_path)
    noisy, clean = (torch.cat(part) for part in zip(*images.val_dataloader(), strict=True))
    for value in scalars(found, "val/psnr_noisy").values():
        assert value == pytest.approx(psnr_by_hand(noisy, clean), abs=1e-3)
    assert sorted(scalars(found, "val/psnr")) == sorted(scalars(found, "val/psnr_noisy"))
    assert scalars(found, "val/candidate") == scalars(found, "val/psnr")
