"""A bowl to race on, its contestants, and results made by hand."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from hvpopt.experiments.race.contestants import Contestant
from hvpopt.experiments.race.problem import Evaluation, Problem, Target, Task
from hvpopt.experiments.race.results import Result
from hvpopt.experiments.race.turns import Record, Run
from torch import nn

CPU = torch.device("cpu")


class BowlProblem(Problem):
    """½ Σ (w − 1)² from w = 0; torch.nn.Linear(2, 1) holds w and a bias."""

    def __init__(self, seed=0):
        self.module = nn.utils.skip_init(nn.Linear, 2, 1).double()
        for p in self.module.parameters():
            nn.init.zeros_(p)
        self.observed = []

    def loss(self):
        return sum(0.5 * (p - 1).square().sum() for p in self.module.parameters())

    def observe(self, loss):
        self.observed.append(loss.item())

    @torch.no_grad()
    def evaluate(self):
        loss = self.loss().item()
        return Evaluation(loss, math.sqrt(2 * loss))


@dataclass(frozen=True)
class Bowl(Task):
    metric_name: ClassVar[str] = "distance"
    is_metric_logarithmic: ClassVar[bool] = True

    def build(self, seed, device):
        return BowlProblem(seed)

    def describe(self):
        return "a bowl"


class BowlWithTarget(Bowl):
    target = Target("metric", 1e-3)


def entry(**kwargs):
    return {"optimizer": "torch.optim.SGD", **kwargs}


def finished(name, *runs, optimizer="torch.optim.SGD"):
    """A result with records (seconds, loss) for each seed."""
    result = Result(Contestant.of(name, {"optimizer": optimizer}))
    for seed, points in enumerate(runs):
        run = Run(name, BowlProblem(), iter(()), seed=0, device=CPU)
        run.records = [
            Record(s, i, Evaluation(loss, 10 * loss)) for i, (s, loss) in enumerate(points)
        ]
        run.clock, run.num_steps = points[-1][0], len(points) - 1
        result.runs[seed] = run
    return result


def contestants():
    return {
        "SGD": entry(grid={"lr": [0.1, 0.5]}),
        "LBFGS": {"optimizer": "torch.optim.LBFGS"},
        "NewtonCG": {"optimizer": "hvpopt.NewtonCG", "options": {"curvature": "hessian"}},
        "fails": entry(options={"lr": -1.0}),
    }
