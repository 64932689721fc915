"""Step sizes of an optimizer, learned by differentiating through its steps.

An MLP on scikit-learn's digits is trained by T = 30 steps of the heavy ball on mini-batches,

    m ← μ m − α ∂f/∂w,   w ← w + m,

and ℓ is the training loss after the last step. Learned are log α for each weight matrix and bias
and the logit of μ, first the same at all steps (5 numbers, by forward mode), then step sizes of
their own for each step (4 T + 1 numbers, by reverse mode). Each outer step takes another initial
network and other batches, and so do the runs that judge.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hvpopt.nested.adjoints import BackOptimization, ForwardMode
from hvpopt.nested.hypergradients import unrolled_hypergradient

Weights = dict[str, Tensor]
State = dict[str, Weights]
SHAPES = {"w1": (64, 32), "b1": (32,), "w2": (32, 10), "b2": (10,)}
JUDGES = range(10_000, 10_020)
"""Seeds of the runs that judge; those learned on are below."""


@dataclass(frozen=True)
class Digits:
    """Scikit-learn's digits, and training runs on them."""

    num_steps: int = 30
    batch_size: int = 128
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)

    def __post_init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.tensor(digits.data, dtype=torch.float32) / 16
        object.__setattr__(self, "x", (x - x.mean()) / x.std())
        object.__setattr__(self, "y", torch.tensor(digits.target))

    def start(self, seed: int) -> State:
        """Random weights, and no momentum."""
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.randn(shape, generator=generator) / math.sqrt(shape[0])
            if len(shape) > 1
            else torch.zeros(shape)
            for name, shape in SHAPES.items()
        }
        return {
            "weights": weights,
            "momentum": {n: torch.zeros_like(w) for n, w in weights.items()},
        }

    def loss(self, weights: Weights, rows: Tensor | slice = slice(None)) -> Tensor:
        """The mean cross-entropy of some rows."""
        hidden = torch.tanh(self.x[rows] @ weights["w1"] + weights["b1"])
        return F.cross_entropy(hidden @ weights["w2"] + weights["b2"], self.y[rows])

    def step(self, seed: int) -> Callable[[State, Weights, int], State]:
        """The heavy ball's step, on batches that the seed and t decide."""

        def step(state: State, sizes: Weights, t: int) -> State:
            generator = torch.Generator().manual_seed(1_000_003 * seed + t)
            rows = torch.randint(len(self.x), (self.batch_size,), generator=generator)
            gradient = torch.func.grad(self.loss)(state["weights"], rows)
            mu = torch.sigmoid(sizes["momentum"])
            log_sizes = (
                sizes["log_sizes"] if sizes["log_sizes"].dim() == 1 else sizes["log_sizes"][t]
            )
            moved, weights = {}, {}
            for i, (name, g) in enumerate(gradient.items()):
                moved[name] = mu * state["momentum"][name] - log_sizes[i].exp() * g
                weights[name] = state["weights"][name] + moved[name]
            return {"weights": weights, "momentum": moved}

        return step

    def final_loss(self, sizes: Weights, seed: int) -> float:
        """The training loss after all steps of one run; infinite where it diverged."""
        state, step = self.start(seed), self.step(seed)
        with torch.no_grad():
            for t in range(self.num_steps):
                state = step(state, sizes, t)
            loss = float(self.loss(state["weights"]))
        return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class Outcome:
    """Mean training losses of `JUDGES` after T steps, with the means' standard errors."""

    what: str
    """How the step sizes were found."""
    num_hparams: int
    """How many numbers they are."""
    loss: float
    """The mean."""
    standard_error: float
    """Of the mean, over the runs."""


def judged(task: Digits, what: str, sizes: Weights, count: int) -> Outcome:
    """How step sizes do in runs that they were not learned on."""
    losses = torch.tensor([task.final_loss(sizes, seed) for seed in JUDGES])
    return Outcome(what, count, float(losses.mean()), float(losses.std()) / len(losses) ** 0.5)


def constant(log_size: float, momentum: float) -> Weights:
    """One step size for all weights, and μ."""
    mu = torch.tensor(momentum)
    return {"log_sizes": torch.full((len(SHAPES),), log_size), "momentum": torch.logit(mu)}


def tuned(task: Digits, *, runs: int = 3) -> Weights:
    """The best constant step size and momentum of a grid of 12 × 4."""
    grid = [
        constant(math.log(10.0) * (k / 4), momentum)
        for k in range(-8, 4)
        for momentum in (0.5, 0.8, 0.9, 0.95)
    ]
    return min(grid, key=lambda sizes: sum(task.final_loss(sizes, seed) for seed in range(runs)))


def learned(task: Digits, start: Weights, *, num_outer_steps: int, lr: float = 0.03) -> Weights:
    """Step sizes that Adam finds from a start, each of its steps on another run.

    A few of them go by forward mode, many by reverse mode.
    """
    sizes = {name: x.clone() for name, x in start.items()}
    adjoint = ForwardMode() if _size(sizes) <= 8 else BackOptimization()
    optimizer = torch.optim.Adam(sizes.values(), lr=lr)
    for seed in range(num_outer_steps):
        found = unrolled_hypergradient(
            task.step(seed),
            lambda state, sizes: task.loss(state["weights"]),
            task.start(seed),
            sizes,
            num_steps=task.num_steps,
            adjoint=adjoint,
        )
        for name, x in sizes.items():
            x.grad = found.value[name]
        torch.nn.utils.clip_grad_norm_(sizes.values(), 1.0)  # long paths have cliffs
        optimizer.step()
    return sizes


def scheduled(task: Digits, sizes: Weights) -> Weights:
    """The same step sizes at every step, as numbers of their own."""
    return {**sizes, "log_sizes": sizes["log_sizes"].repeat(task.num_steps, 1)}


def outcomes(task: Digits, *, num_outer_steps: tuple[int, int] = (40, 120)) -> list[Outcome]:
    """The grid's best, then learned step sizes, each started from what came before it.

    Args:
        task: The runs.
        num_outer_steps: For the few numbers, and for the many.
    """
    best = tuned(task)
    few = learned(task, best, num_outer_steps=num_outer_steps[0])
    many = learned(task, scheduled(task, few), num_outer_steps=num_outer_steps[1])
    return [
        judged(task, "one step size and momentum, grid of 48", best, 2),
        judged(task, "a step size for each weight, learned", few, _size(few)),
        judged(task, "one for each weight and step, learned", many, _size(many)),
    ]


def _size(sizes: Weights) -> int:
    return sum(x.numel() for x in sizes.values())
