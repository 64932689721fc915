"""What a trained energy answers besides what it was trained for: noise of other strength.

The energy s ‖y − x‖² + prior(y) is, up to its scale, the negative logarithm of a posterior under
noise of variance proportional to 1 / s. For noise whose deviation is r times the training's its
fidelity is so s / r², and nothing is trained again. What inference of T steps has made of the
distance term depends on s T: for stronger noise there are T r² steps. For weaker noise, whose
fidelity asks for shorter steps than those of training, a line search finds them image by image.

A feed-forward network has no such place to say how strong the noise is. What can be done is to feed
it images divided by r, with the noise that it knows, and to multiply its answers by r.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from hvpopt.cli.targets import check_targets
from hvpopt.lightning.image_scores import psnr
from hvpopt.lightning.noisy_images import NoisyFashionMNIST
from hvpopt.lightning.spectrum.subjects import load_weights
from hvpopt.lightning.spen import SPENModule
from hvpopt.nested import Backtracking, GradientDescent
from hvpopt.nested.energies import DenoisingHead
from hvpopt.nested.energies.layers import inverse_softplus

RATIOS = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Deviations of the noise, relative to that of the training."""

Denoiser = Callable[[Tensor], Tensor]
"""Noisy images `[B, C, H, W]` to others."""


@dataclass(frozen=True)
class Run:
    """A trained network and the noise that it knows."""

    name: str
    module: SPENModule
    data: NoisyFashionMNIST

    @classmethod
    def loaded(cls, folder: Path) -> "Run":
        """The best checkpoint of a run of `hvpopt experiment=denoising_…`.

        Raises:
            FileNotFoundError: if the folder holds no such run.
            ValueError: if the checkpoint does not belong to the configuration.
        """
        path = folder / "config.yaml"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no config.yaml; expected the folder of a run of `hvpopt "
                "experiment=denoising_energy` or denoising_feedforward."
            )
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        assert isinstance(config, dict)
        parts = {"model": config["model"], "data": config["data"]}
        check_targets(parts)
        module = hydra.utils.instantiate(parts["model"], _convert_="all")
        load_weights(folder / "checkpoints" / "best.ckpt", module)
        return cls(folder.name, module.eval(), hydra.utils.instantiate(parts["data"]))


def at_other_noise(module: SPENModule, ratio: float) -> SPENModule:
    """The module with fidelity and inference for noise whose deviation is `ratio` times the
    training's.

    Raises:
        TypeError: if its energy has no fidelity, or another method than gradient descent.
    """
    adapted = copy.deepcopy(module)
    head, minimizer = adapted.energy.head, adapted.minimizer
    if not isinstance(head, DenoisingHead) or minimizer is None:
        raise TypeError(f"{type(head).__name__} has no fidelity; expected a DenoisingHead.")
    if not isinstance(minimizer.method, GradientDescent):
        raise TypeError(f"{minimizer.method} has no line search; expected GradientDescent.")
    with torch.no_grad():
        fidelity = F.softplus(head.raw_fidelity) / ratio**2
        head.raw_fidelity.copy_(inverse_softplus(fidelity))
    num_steps = math.ceil(minimizer.method.num_steps * max(1.0, ratio**2))
    method = replace(minimizer.method, num_steps=num_steps, line_search=Backtracking())
    adapted.minimizer = replace(minimizer, method=method)
    return adapted


def scaled(module: SPENModule, ratio: float) -> Denoiser:
    """The module's answers to images divided by `ratio`, multiplied by it."""
    return lambda x: ratio * module(x / ratio)


def mean_psnr(denoiser: Denoiser, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The PSNR of a denoiser's answers."""
    with torch.no_grad():
        found = [psnr(denoiser(noisy), clean) for noisy, clean in batches]
    return float(torch.cat(found).mean())


def with_noise(data: NoisyFashionMNIST, ratio: float) -> list[tuple[Tensor, Tensor]]:
    """The test images with the same noise, `ratio` times as strong."""
    return [(clean + ratio * (noisy - clean), clean) for noisy, clean in data.test_dataloader()]


@dataclass(frozen=True)
class Answer:
    """A row of the table."""

    what: str
    """Of which run, and how it answered."""
    psnr: dict[float, float]
    """In decibels, by the noise's deviation."""


def answers(runs: Sequence[Run], ratios: Sequence[float] = RATIOS) -> list[Answer]:
    """The PSNR of the first run's noisy test images, and of what each run makes of them, as it is
    and told of the noise, at the training's noise times the ratios.

    Raises:
        ValueError: if the runs were trained with different noise.
    """
    sigma = runs[0].data.noise
    for run in runs:
        if run.data.noise != sigma:
            raise ValueError(
                f"{run.name} was trained with noise={run.data.noise}, {runs[0].name} with "
                f"noise={sigma}; expected the same."
            )
    images = [with_noise(runs[0].data, ratio) for ratio in ratios]

    def row(what: str, denoisers: Sequence[Denoiser]) -> Answer:
        found = map(mean_psnr, denoisers, images)
        return Answer(what, {round(sigma * r, 6): x for r, x in zip(ratios, found, strict=True)})

    rows = [row("noisy", [torch.nn.Identity()] * len(ratios))]
    for run in runs:
        rows.append(row(run.name, [run.module] * len(ratios)))
        if isinstance(run.module.energy.head, DenoisingHead):
            adapted = [at_other_noise(run.module, ratio) for ratio in ratios]
            rows.append(row(f"{run.name}, fidelity for the noise", adapted))
        else:
            through = [scaled(run.module, ratio) for ratio in ratios]
            rows.append(row(f"{run.name}, images scaled", through))
    return rows
