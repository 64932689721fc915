"""The world after one plain run of a closure."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from problems import Problem, problem


@contextmanager
def as_after_one_plain_run(name: str) -> Iterator[Problem]:
    """Gives a problem; at the end its world must be that after one plain run of its closure."""
    plain, task = problem(name), problem(name)
    torch.manual_seed(5)
    plain.closure()()
    expected = torch.rand(3)
    torch.manual_seed(5)
    yield task
    assert torch.equal(torch.rand(3), expected)
    for ours, theirs in zip(task.params, plain.params, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
        assert not ours.grad.requires_grad
    for ours, theirs in zip(task.net.buffers(), plain.net.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
