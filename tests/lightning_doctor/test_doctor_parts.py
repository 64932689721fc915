"""Differences, times and memory: what the doctor measures with."""

import time

import lightning as L
import pytest
import torch
from torch import nn

from hvpopt import trees
from hvpopt.lightning.cost import peak_bytes
from hvpopt.lightning.doctor.cost import medians
from hvpopt.lightning.doctor.report import columns
from hvpopt.lightning.doctor.subject import Subject, differences, distance

CPU = torch.device("cpu")


class Point(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def subject(function, values=(0.5, -2.0, 1.0)):
    point = Point(values)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return Subject(point, trainer, [point.w], lambda: function(point.w), [])


def test_differences_of_a_quartics_gradients_are_exact():
    found = subject(lambda w: (w**4).sum() / 12)  # Hessian diag(w²), error of order h⁴ is zero
    v = [torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)]
    found_differences = differences(found, v)
    expected = [torch.tensor([0.25, 8.0, -1.0], dtype=torch.float64)]
    assert distance(found_differences.product, expected) < 1e-9
    assert found_differences.error < 1e-2
    assert found.params[0].tolist() == [0.5, -2.0, 1.0]
    assert found.params[0].grad is None


def test_the_error_estimate_holds_the_error_and_is_large_at_a_kink():
    smooth = subject(lambda w: w.exp().sum())
    v = [torch.ones(3, dtype=torch.float64)]
    found = differences(smooth, v)
    assert distance(found.product, [smooth.params[0].detach().exp()]) < found.error < 1e-3
    kink = differences(subject(lambda w: (w - 0.5).abs().sum() + (w**2).sum()), v)
    assert kink.error > 0.1


def test_a_loss_without_curvature_is_not_taken_for_a_wrong_product():
    slope = torch.tensor([1 / 3, -2 / 7, 5 / 9], dtype=torch.float64)
    v = [torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)]
    assert differences(subject(lambda w: (slope * w).sum()), v).error > 0.1


def test_the_gradient_counts_every_backward():
    module = subject(lambda w: (w**2).sum())
    loss, grad = module.gradient()
    assert (loss, grad[0].tolist()) == (5.25, [1.0, -4.0, 2.0])
    assert module.num_backwards == 1


def test_distance_is_relative():
    a, b = [torch.tensor([3.0, 0.0])], [torch.tensor([0.0, 4.0])]
    assert distance(a, b) == 1.25
    zero = trees.zeros_like(a)
    assert distance(zero, zero) == 0.0
    assert distance(a, zero) == float("inf")


def test_peak_memory_is_the_most_that_was_held_at_once():
    held = [torch.ones(2**18)]

    def task():
        held.clear()  # of what was there before
        a = torch.empty(2**20, dtype=torch.float32)
        del a
        b, c = (torch.empty(2**19, dtype=torch.float32) for _ in range(2))
        return b, c

    assert peak_bytes(task, CPU) == pytest.approx(4 * 2**20, rel=1e-3)
    assert peak_bytes(lambda: None, CPU) == 0
    with pytest.raises(ValueError, match="known of the CPU and of CUDA, not of meta"):
        peak_bytes(lambda: None, torch.device("meta"))


def test_times_are_medians_of_rounds_in_turns():
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(0.02 if len(calls) < 3 else 0.004)  # the first round does not count

    taken = medians({"slow": slow, "fast": lambda: calls.append("fast")}, device=CPU, seconds=0.0)
    assert calls == ["slow", "fast"] * 4
    assert 0.004 <= taken["slow"] < 0.02
    assert taken["fast"] < taken["slow"]


def test_columns_are_as_wide_as_their_widest_cell():
    assert columns([["a", "bcd"], ["ef", "g"]]) == "a   bcd\nef  g"
