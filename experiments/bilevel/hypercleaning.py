"""Hyper-cleaning: a weight for each training image, learned where half of the labels are wrong.

    w*(λ) = argmin_w Σᵢ σ(λᵢ) CE(w; xᵢ, ỹᵢ) / n + ½ρ‖w‖²,   ℓ(λ) = CE(w*(λ); clean images),

on Fashion-MNIST at 14 × 14 pixels. The inner model is softmax regression, convex, its minimiser
carried along by a few Newton steps after each step on λ; the hypergradients take a few products,
each solve started from the last one. What the weights are worth shows when a network is trained
with them, on both sets of images, beside the same with equal weights, with the clean images alone,
and with the weights of an oracle that knows which labels are wrong.

Source: Franceschi et al., Forward and reverse gradient-based hyperparameter optimization (ICML
2017), section 5.1; with corrupted labels drawn from the nine wrong classes.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hvpopt.lightning.fashion_mnist import find_files, load_from_files, load_from_openml
from hvpopt.minimization import minimize
from hvpopt.nested import Implicit
from hvpopt.nested.hypergradients import hypergradient

CLASSES = 10
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Images:
    """Images as rows of standardised pixels, and their labels."""

    x: Tensor
    """(n, 196)."""
    y: Tensor
    """(n,)."""


@dataclass(frozen=True)
class Corrupted:
    """Many images with labels that may be wrong, a few clean ones, and the test set."""

    train: Images
    is_wrong: Tensor
    """(n,): which of the training labels were replaced by another class."""
    clean: Images
    test: Images

    @classmethod
    def drawn(
        cls, seed: int, *, num_train: int = 10_000, num_clean: int = 500, noise: float = 0.5
    ) -> "Corrupted":
        """A random choice of the training images; the test set is the whole one."""
        files = find_files(None)
        parts = load_from_openml() if files is None else load_from_files(files)
        (images, labels), (test_images, test_labels) = parts["train"], parts["test"]
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(images), generator=generator)
        train, clean = rows[:num_train], rows[num_train : num_train + num_clean]
        is_wrong = torch.rand(num_train, generator=generator) < noise
        other = labels[train] + torch.randint(1, CLASSES, (num_train,), generator=generator)
        given = torch.where(is_wrong, other % CLASSES, labels[train])
        return cls(
            train=Images(_pixels(images[train]), given),
            is_wrong=is_wrong,
            clean=Images(_pixels(images[clean]), labels[clean]),
            test=Images(_pixels(test_images), test_labels),
        )


def _pixels(images: Tensor) -> Tensor:
    """2 × 2 means of uint8 images, with about the mean and deviation of all of them taken out."""
    return (F.avg_pool2d(images[:, None].float() / 255, 2).flatten(1) - 0.286) / 0.32


def logits(w: Weights, x: Tensor) -> Tensor:
    """Of softmax regression."""
    return x @ w["weight"] + w["bias"]


@dataclass(frozen=True)
class Cleaning:
    """The bilevel problem and how it is solved."""

    num_outer_steps: int = 10
    lr: float = 0.5
    """Adam's, on λ, in units of the logits of the weights."""
    penalty: float = 0.1
    """ρ."""
    newton_steps: int = 2
    """Inner iterations after each outer step; the first solve has ten times as many."""
    max_products: int = 15
    """Of a hypergradient."""

    def inner_loss(self, w: Weights, scores: Tensor, images: Images) -> Tensor:
        """Σᵢ σ(λᵢ) CEᵢ / n + ½ρ‖w‖²."""
        losses = F.cross_entropy(logits(w, images.x), images.y, reduction="none")
        penalty = 0.5 * self.penalty * (w["weight"] ** 2).sum()
        return (torch.sigmoid(scores) * losses).mean() + penalty

    def run(self, data: Corrupted) -> "Cleaned":
        """λ from zeros, all weights ½."""
        scores = torch.zeros(len(data.train.y))
        optimizer = torch.optim.Adam([scores], lr=self.lr)
        w = {
            "weight": torch.zeros(data.train.x.shape[1], CLASSES),
            "bias": torch.zeros(CLASSES),
        }
        start, before = None, w
        adjoint = Implicit(max_steps=self.max_products, rtol=1e-3, residual_warning=math.inf)
        num_products = 0
        began = time.perf_counter()
        for step in range(self.num_outer_steps):
            solved = minimize(
                lambda w, scores: self.inner_loss(w, scores, data.train),
                w,
                args=(scores,),
                method="newton-cg",
                gtol=1e-5,
                max_iter=self.newton_steps * (10 if step == 0 else 1),
                max_products=200,
            )
            w = solved.x
            before = w if step == 0 else before
            found = hypergradient(
                lambda w, scores: self.inner_loss(w, scores, data.train),
                lambda w, scores: F.cross_entropy(logits(w, data.clean.x), data.clean.y),
                w,
                scores,
                adjoint=adjoint,
                start=start,
            )
            start = found.adjoint
            num_products += solved.nhev + found.num_products
            scores.grad = found.value * len(scores)  # so that Adam's ε is small beside it
            optimizer.step()
        seconds = time.perf_counter() - began
        return Cleaned(torch.sigmoid(scores), before, w, num_products, seconds)


@dataclass(frozen=True)
class Cleaned:
    """What hyper-cleaning found."""

    weights: Tensor
    """σ(λ), (n,)."""
    before: Weights
    """Softmax regression with equal weights."""
    after: Weights
    """With the weights before the last outer step."""
    num_products: int
    """Hessian products, of the inner solves and the hypergradients."""
    seconds: float
    """Of wall-clock."""

    def detection(self, is_wrong: Tensor) -> float:
        """Percent of the labels that a threshold of ½ tells rightly as wrong or right."""
        return 100 * float(((self.weights < 0.5) == is_wrong).float().mean())


def network(images: Images, weights: Tensor, test: Images, *, seed: int, steps: int) -> float:
    """The test accuracy, percent, of an MLP with 128 units.

    Adam at 2e-3, so many steps on batches of 100 weighted images.
    """
    generator = torch.Generator().manual_seed(seed)
    size = images.x.shape[1]
    layers = [
        torch.randn(size, 128, generator=generator) / math.sqrt(size),
        torch.zeros(128),
        torch.randn(128, CLASSES, generator=generator) / math.sqrt(128),
        torch.zeros(CLASSES),
    ]
    layers = [p.requires_grad_() for p in layers]

    def output(x: Tensor) -> Tensor:
        return torch.tanh(x @ layers[0] + layers[1]) @ layers[2] + layers[3]

    optimizer = torch.optim.Adam(layers, lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(images.y), (100,), generator=generator)
        losses = F.cross_entropy(output(images.x[rows]), images.y[rows], reduction="none")
        optimizer.zero_grad()
        (weights[rows] * losses).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return accuracy(output(test.x), test.y)


def accuracy(output: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * float((output.argmax(1) == labels).float().mean())


@dataclass(frozen=True)
class Outcome:
    """Test accuracies of one seed, in percent."""

    seed: int
    regression_uncleaned: float
    """Softmax regression on the corrupted images, equal weights."""
    regression_cleaned: float
    """With the weights learned."""
    uncleaned: float
    """The network on all images, equal weights."""
    clean_only: float
    """On the clean ones alone."""
    cleaned: float
    """On all, with the weights learned."""
    oracle: float
    """On all but those whose labels are wrong."""
    detection: float
    """Percent of the labels told rightly as wrong or right."""
    num_products: int
    seconds: float
    """Of the cleaning."""


def outcome(seed: int, data: Corrupted, cleaning: Cleaning, *, steps: int = 3000) -> Outcome:
    """One seed: of the data, the corruption and the networks."""
    found = cleaning.run(data)
    both = Images(torch.cat([data.train.x, data.clean.x]), torch.cat([data.train.y, data.clean.y]))
    ones = torch.ones(len(data.clean.y))

    def trained(weights: Tensor) -> float:
        return network(both, torch.cat([weights, ones]), data.test, seed=seed, steps=steps)

    def tested(w: Weights) -> float:
        return accuracy(logits(w, data.test.x), data.test.y)

    return Outcome(
        seed=seed,
        regression_uncleaned=tested(found.before),
        regression_cleaned=tested(found.after),
        uncleaned=trained(torch.ones(len(data.train.y))),
        clean_only=network(data.clean, ones, data.test, seed=seed, steps=steps),
        cleaned=trained(found.weights),
        oracle=trained((~data.is_wrong).float()),
        detection=found.detection(data.is_wrong),
        num_products=found.num_products,
        seconds=found.seconds,
    )
