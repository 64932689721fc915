"""The peak signal-to-noise ratio against its closed form and arithmetic in NumPy."""

import math

import numpy as np
import pytest
import torch

from hvpopt.lightning.image_scores import ImagePSNR, psnr


def by_hand(images, target):
    errors = (np.clip(images.numpy(), 0, 1) - target.numpy()) ** 2
    return -10 * np.log10(errors.mean(axis=(1, 2, 3)))


def noisy_and_clean(count=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(count, 1, 6, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 1, 6, 5, generator=generator, dtype=torch.float64)
    return clean + 0.1 * torch.arange(1, count + 1)[:, None, None, None] * noise, clean


def test_a_constant_error_has_the_closed_form():
    target = torch.full((3, 1, 4, 4), 0.4)
    errors = torch.tensor([0.1, 0.01, 0.5])
    images = target + errors[:, None, None, None]
    torch.testing.assert_close(psnr(images, target), -20 * errors.log10(), rtol=1e-5, atol=0)


def test_pixels_are_clipped_first():
    target = torch.zeros(1, 1, 2, 2)
    images = torch.tensor([[[[-3.0, 0.5], [7.0, 0.0]]]])  # 0, 0.5, 1, 0
    assert float(psnr(images, target)) == pytest.approx(-10 * math.log10(1.25 / 4))


def test_each_image_has_its_own_ratio():
    images, clean = noisy_and_clean()
    np.testing.assert_allclose(psnr(images, clean), by_hand(images, clean), rtol=1e-6)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_the_score_is_the_mean_over_images_whatever_the_batches(stage):
    images, clean = noisy_and_clean()
    scores = ImagePSNR()
    for part in (slice(0, 2), slice(2, 9)):
        scores.update(stage, images[part], clean[part])
    expected = by_hand(images, clean).mean()
    assert scores.figures(stage) == {scores.main_figure: pytest.approx(expected)}


def test_figures_forget_the_images_that_they_are_of_and_stages_are_apart():
    images, clean = noisy_and_clean()
    scores = ImagePSNR()
    scores.update("val", images[:3], clean[:3])
    scores.update("test", images[3:5], clean[3:5])
    first = scores.figures("val")
    assert first == {"psnr": pytest.approx(by_hand(images[:3], clean[:3]).mean())}
    scores.update("val", images[5:], clean[5:])
    assert scores.figures("val") == {"psnr": pytest.approx(by_hand(images[5:], clean[5:]).mean())}
    assert scores.figures("test") == {
        "psnr": pytest.approx(by_hand(images[3:5], clean[3:5]).mean())
    }
