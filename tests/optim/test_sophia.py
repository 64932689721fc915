import math

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of, problem
from torch import nn

from hvpopt.likelihoods import Gaussian, NoLikelihoodError
from hvpopt.optim.probes import rademacher, seed_of_step
from hvpopt.optim.sophia import SophiaG, SophiaH

A = torch.tensor([[2.0, 0.5], [0.5, -1.0]], dtype=torch.float64)
B = torch.tensor([1.0, -1.0], dtype=torch.float64)


def quadratic():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    return w, lambda: 0.5 * w @ A @ w - B @ w


class Rule:
    """The paper's update in scalars: algorithm 3."""

    def __init__(self, w, lr, beta1, beta2, gamma, eps, decay):
        self.w, self.m, self.h = list(w), [0.0] * len(w), [0.0] * len(w)
        self.unclipped = 0
        self.constants = lr, beta1, beta2, gamma, eps, decay

    def step(self, g, estimate):
        lr, beta1, beta2, gamma, eps, decay = self.constants
        self.unclipped = 0
        for i in range(len(g)):
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g[i]
            if estimate is not None:
                self.h[i] = beta2 * self.h[i] + (1 - beta2) * estimate[i]
            self.w[i] -= lr * decay * self.w[i]
            ratio = self.m[i] / max(gamma * self.h[i], eps)
            self.unclipped += abs(ratio) < 1
            self.w[i] -= lr * min(max(ratio, -1.0), 1.0)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("engine", ["auto", "dual", "graph"])
def test_sophia_h_follows_a_hand_computed_trace(engine, decay):
    w, loss = quadratic()
    constants = {"lr": 0.2, "gamma": 3.0, "eps": 0.1, "weight_decay": decay}
    optimizer = SophiaH([w], betas=(0.7, 0.6), update_every=3, seed=5, engine=engine, **constants)
    rule = Rule(w.tolist(), 0.2, 0.7, 0.6, 3.0, 0.1, decay)
    clipped = 0
    for step in range(8):
        g = [2 * rule.w[0] + 0.5 * rule.w[1] - 1, 0.5 * rule.w[0] - rule.w[1] + 1]
        estimate = None
        if step % 3 == 0:
            z = rademacher([w], seed_of_step(5, step))[0].tolist()
            # zᵢ Σⱼ Aᵢⱼ zⱼ
            estimate = [2 + 0.5 * z[0] * z[1], 0.5 * z[0] * z[1] - 1]
        optimizer.step(closure_of(optimizer, loss))
        rule.step(g, estimate)
        for got, want in (
            (w.detach(), rule.w),
            (optimizer.state[w]["momentum"], rule.m),
            (optimizer.state[w]["curvature"], rule.h),
        ):
            torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
        report = optimizer.last_report
        assert report.fraction_unclipped == rule.unclipped / 2
        assert report.fraction_negative == 0.5
        assert report.is_refreshed == (step % 3 == 0)
        assert math.isnan(report.curvature_median) != report.is_refreshed
        clipped += rule.unclipped
    assert 0 < clipped < 16  # both cases were met


def test_sophia_g_follows_a_hand_computed_trace():
    """A mean of squares of z = (w₀, w₀ + 2 w₁) against targets, whose labels are z + noise/√2."""
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    targets = torch.tensor([0.5, -1.0], dtype=torch.float64)
    optimizer = SophiaG([w], lr=0.1, betas=(0.5, 0.8), gamma=0.5, update_every=2, seed=3)

    def loss():
        return F.mse_loss(torch.stack([w[0], w[0] + 2 * w[1]]), targets)

    rule = Rule(w.tolist(), 0.1, 0.5, 0.8, 0.5, 1e-12, 0.0)
    for step in range(5):
        z = torch.tensor([rule.w[0], rule.w[0] + 2 * rule.w[1]], dtype=torch.float64)
        slopes = (z - targets).tolist()  # of the mean of two squares
        estimate = None
        if step % 2 == 0:
            generator = torch.Generator().manual_seed(seed_of_step(3, step))
            sampled = (z - Gaussian().sample(z, generator)).tolist()
            # N ĝ⊙ĝ, ĝ the gradient of the mean of N = 2 terms
            estimate = [2 * (sampled[0] + sampled[1]) ** 2, 2 * (2 * sampled[1]) ** 2]
        optimizer.step(closure_of(optimizer, loss))
        rule.step([slopes[0] + slopes[1], 2 * slopes[1]], estimate)
        expected = torch.tensor(rule.h, dtype=torch.float64)
        torch.testing.assert_close(optimizer.state[w]["curvature"], expected)
        torch.testing.assert_close(w.detach(), torch.tensor(rule.w, dtype=torch.float64))
        assert optimizer.last_report.num_closure_runs == (2 if step % 2 == 0 else 1)
        assert optimizer.last_report.fraction_negative == 0


def test_the_constants_are_those_of_the_paper():
    h, g = (cls([nn.Parameter(torch.ones(1))]) for cls in (SophiaH, SophiaG))
    assert h.defaults["gamma"] == 0.01
    assert g.defaults["gamma"] == 0.05
    for optimizer in (h, g):
        assert optimizer.defaults["betas"] == (0.96, 0.99)
        assert optimizer.defaults["eps"] == 1e-12
        assert optimizer._update_every == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_gradient_and_curvature_are_zero_nothing_moves(dtype):
    w = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = SophiaH([w], lr=0.5, engine="graph")
    optimizer.step(closure_of(optimizer, lambda: (w * torch.tensor([1.0, 0.0])).float().sum()))
    assert w.tolist() == [0.5, 1.0]


def test_sophia_g_refuses_a_loss_without_labels_and_leaves_the_parameters():
    w = nn.Parameter(torch.ones(2))
    optimizer = SophiaG([w])
    with pytest.raises(NoLikelihoodError, match=r"hvpopt\.SophiaH does without labels"):
        optimizer.step(closure_of(optimizer, lambda: (w**2).sum()))
    assert w.tolist() == [1.0, 1.0]
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("cls", [SophiaH, SophiaG])
def test_smoke_it_learns(cls):
    task = problem("batchnorm", torch.float32)
    optimizer = cls(task.params, lr=0.02)
    closure = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    losses = [float(optimizer.step(closure)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0 is out of range"),
        ({"betas": (0.9, 1.0)}, r"betas=1\.0 is out of range"),
        ({"betas": 0.9}, r"betas=0\.9: expected two numbers"),
        ({"gamma": -1.0}, r"gamma=-1\.0"),
        ({"eps": -1.0}, r"eps=-1\.0"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0"),
        ({"update_every": 0}, r"update_every=0 is out of range: expected a whole number"),
        ({"seed": 0.5}, r"seed=0\.5: expected a whole number"),
    ],
)
@pytest.mark.parametrize("cls", [SophiaH, SophiaG])
def test_arguments_out_of_range_are_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(2))], **options)
