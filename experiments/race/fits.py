"""Fits of full batches: a perceptron on digits, least squares, logistic regression."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpopt.lightning.nets import mlp

from .data import digits, fashion_mnist
from .problem import Evaluation, Problem, Target, Task, seeded


@dataclass(frozen=True, kw_only=True)
class DigitsMLP(Task):
    """A tanh perceptron on the training part of scikit-learn's digits, all in one batch.

    The loss has a penalty, because the network separates the classes: without one, the loss goes
    to zero as the weights grow, and whoever makes the largest steps is ahead at 1e-10.

    Args:
        width: units of each of the two hidden layers.
        penalty: the loss is the mean cross-entropy + ½ penalty ‖θ‖².
    """

    metric_name: ClassVar[str] = "test error"

    width: int = 64
    penalty: float = 1e-4

    def build(self, seed: int, device: torch.device) -> "ClassifierProblem":
        """The network of the seed."""
        with seeded(seed):
            module = mlp(widths=(self.width, self.width)).to(device)
        return ClassifierProblem(module, self.penalty, *digits(device))

    def describe(self) -> str:
        """The task in a sentence."""
        return (
            f"digits, tanh perceptron 64-{self.width}-{self.width}-10, cross-entropy of all "
            f"1,168 training images, penalty {self.penalty:g}"
        )


class ClassifierProblem(Problem):
    """A network and images with labels, for training and for the test."""

    def __init__(
        self,
        module: nn.Module,
        penalty: float,
        images: Tensor,
        labels: Tensor,
        test_images: Tensor,
        test_labels: Tensor,
    ) -> None:
        self.module, self.penalty = module, penalty
        self._train, self._test = (images, labels), (test_images, test_labels)

    def loss(self) -> Tensor:
        """The mean cross-entropy of all training images, and the penalty."""
        images, labels = self._train
        loss = F.cross_entropy(self.module(images), labels)
        if not self.penalty:
            return loss
        squares = torch.stack([p.square().sum() for p in self.module.parameters()])
        return loss + 0.5 * self.penalty * squares.sum()

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Training loss, and share of test images that are classified wrongly."""
        images, labels = self._test
        wrong = self.module(images).argmax(1) != labels
        return Evaluation(float(self.loss()), float(wrong.double().mean()))


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """Linear least squares in float64 with given condition number, in a random basis; the
    targets are exact, so that the least loss is zero. Metric: relative error of the weights.

    Args:
        num_examples, num_features: shape of the inputs.
        condition: of the Hessian.
    """

    metric_name: ClassVar[str] = "relative error of the weights"
    is_metric_logarithmic: ClassVar[bool] = True
    target: ClassVar[Target] = Target("loss", 1e-12)

    num_examples: int = 1_000
    num_features: int = 200
    condition: float = 1e6

    def build(self, seed: int, device: torch.device) -> "RegressionProblem":
        """Inputs and true weights of the seed; the initial weights are zero."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n, d = self.num_examples, self.num_features
        left, right = torch.linalg.qr(normal(n, d))[0], torch.linalg.qr(normal(d, d))[0]
        # the loss is ‖Xw − y‖²/n: the Hessian's eigenvalues are 2 s²/n, from 2 down
        spread = torch.logspace(0, -0.5, d, base=self.condition, dtype=torch.float64)
        inputs = n**0.5 * (left * spread) @ right.T
        return RegressionProblem(inputs.to(device), normal(d).to(device))

    def describe(self) -> str:
        """The task in a sentence."""
        return (
            f"least squares, {self.num_examples:,} examples, {self.num_features} features, "
            f"condition {self.condition:.0e}, float64, until the loss is 1e-12"
        )


class RegressionProblem(Problem):
    """A linear layer that is to find the true weights."""

    module: nn.Linear

    def __init__(self, inputs: Tensor, truth: Tensor) -> None:
        self.inputs, self.truth = inputs, truth
        self.module = _zero_linear(len(truth), 1, bias=False).to(inputs)
        self._targets = inputs @ truth

    def loss(self) -> Tensor:
        """The mean of squares."""
        return F.mse_loss(self.module(self.inputs).squeeze(1), self._targets)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Loss, and relative error of the weights."""
        error = self.module.weight.squeeze(0) - self.truth
        return Evaluation(float(self.loss()), float(error.norm() / self.truth.norm()))


@dataclass(frozen=True, kw_only=True)
class LogisticRegression(Task):
    """Multinomial logistic regression on Fashion-MNIST in float64, until the norm of the gradient
    of F = mean cross-entropy + ½ penalty ‖W‖² is 1e-8; the biases are not penalised.

    Args:
        num_images: so many, the first.
        penalty: in the units of the loss; scikit-learn's C is 1/(penalty · num_images).
        paper_size: the whole training part, 59,990 images.
        root: a folder with the four IDX files.
    """

    metric_name: ClassVar[str] = "gradient norm"
    is_metric_logarithmic: ClassVar[bool] = True
    target: ClassVar[Target] = Target("metric", 1e-8)

    num_images: int = 5_000
    penalty: float = 1e-3
    paper_size: bool = False
    root: str | Path | None = None

    def build(self, seed: int, device: torch.device) -> "LogisticProblem":
        """The images of the first; the weights start at zero, whatever the seed."""
        count = 59_990 if self.paper_size else self.num_images
        images, labels = fashion_mnist(count, self.root, device)
        return LogisticProblem(images.flatten(1).double(), labels, self.penalty)

    def describe(self) -> str:
        """The task in a sentence."""
        count = 59_990 if self.paper_size else self.num_images
        return (
            f"logistic regression, {count:,} images of Fashion-MNIST, penalty {self.penalty:g}, "
            "float64, until the gradient's norm is 1e-8"
        )


class LogisticProblem(Problem):
    """A linear layer, its examples and its penalty."""

    module: nn.Linear

    def __init__(self, inputs: Tensor, labels: Tensor, penalty: float) -> None:
        self.inputs, self.labels, self.penalty = inputs, labels, penalty
        self.module = _zero_linear(inputs.shape[1], 10).to(inputs)

    def loss(self) -> Tensor:
        """F."""
        penalty = 0.5 * self.penalty * self.module.weight.square().sum()
        return F.cross_entropy(self.module(self.inputs), self.labels) + penalty

    def evaluate(self) -> Evaluation:
        """F and the norm of its gradient."""
        loss = self.loss()
        grads = torch.autograd.grad(loss, list(self.module.parameters()))
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        return Evaluation(loss.item(), norm.item())


def _zero_linear(num_in: int, num_out: int, bias: bool = True) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, num_in, num_out, bias=bias)  # draws no numbers
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer
