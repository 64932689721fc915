"""What SophiaH, SophiaG and AdaHessian share: refreshes, resuming, failures, groups."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of, flat, problem
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from hvpopt.optim.adahessian import AdaHessian
from hvpopt.optim.report import Outcome
from hvpopt.optim.sophia import SophiaG, SophiaH

OPTIMIZERS = [SophiaH, SophiaG, AdaHessian]
# by engine="graph" nothing is probed, so that runs can be counted
every = pytest.mark.parametrize("cls", OPTIMIZERS)


def closure_for(optimizer, task):
    return closure_of(optimizer, lambda: task.loss(task.net(task.x)))


@every
def test_between_estimates_a_step_is_one_plain_run_of_the_closure(cls):
    task = problem("transformer")
    optimizer = cls(task.params, lr=0.01, update_every=3, engine="graph")
    modes, graphs = [], []

    def loss():
        modes.append(len(_get_current_function_mode_stack()))
        return task.loss(task.net(task.x))

    plain = closure_of(optimizer, loss)

    def closure():
        value = plain()
        graphs.append(any(p.grad is not None and p.grad.requires_grad for p in task.params))
        return value

    for step in range(7):
        modes.clear()
        before = flat(task.params)
        optimizer.step(closure)
        report = optimizer.last_report
        is_due = step % 3 == 0
        assert report.is_refreshed == is_due
        assert report.num_closure_runs == len(modes) == (2 if is_due and cls is SophiaG else 1)
        assert report.num_products == (1 if is_due and cls is not SophiaG else 0)
        assert (min(modes) > 0) == is_due
        assert not torch.equal(flat(task.params), before)
    assert not any(graphs)
    assert optimizer.num_products == (0 if cls is SophiaG else 3)


@every
def test_a_step_without_an_estimate_has_the_gradient_of_an_ordinary_one(cls):
    ours, theirs = problem("dropout"), problem("dropout")
    optimizer = cls(ours.params, lr=0.0, update_every=2)
    for _ in range(4):
        state = torch.get_rng_state()
        loss = optimizer.step(closure_for(optimizer, ours))
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        expected = theirs.closure()()
        assert torch.equal(torch.get_rng_state(), after)
        torch.testing.assert_close(loss, expected.detach())
        for p, q in zip(ours.params, theirs.params, strict=True):
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy"])
@every
def test_a_run_resumed_between_estimates_continues_bit_for_bit(cls, how):
    def run(optimizer, task, num_steps):
        for _ in range(num_steps):
            optimizer.step(closure_for(optimizer, task))

    torch.manual_seed(0)
    whole = problem("dropout", torch.float32)
    one = cls(whole.params, update_every=4)
    run(one, whole, 6)
    random, params = torch.get_rng_state(), [p.detach().clone() for p in whole.params]
    if how == "deepcopy":
        part, two = copy.deepcopy((whole, one))
    else:
        part = problem("dropout", torch.float32)
        two = cls(part.params, update_every=4)
        saved = copy.deepcopy(one.state_dict())
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        two.load_state_dict(saved)
        with torch.no_grad():
            for p, value in zip(part.params, params, strict=True):
                p.copy_(value)
    torch.set_rng_state(random)
    run(one, whole, 7)
    torch.set_rng_state(random)
    run(two, part, 7)
    assert torch.equal(flat(whole.params), flat(part.params))
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


@every
def test_the_seed_determines_the_estimates_and_the_global_generator_is_left_alone(cls):
    results = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        task = problem("mlp")
        optimizer = cls(task.params, seed=seed, update_every=1)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        for _ in range(3):
            optimizer.step(closure_for(optimizer, task))
        assert torch.equal(torch.get_rng_state(), before)
        key = "square" if cls is AdaHessian else "curvature"
        results.append(flat([optimizer.state[p][key] for p in task.params]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@every
@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("where", ["loss", "gradient", "product"])
def test_what_is_not_finite_moves_nothing(cls, where, num_steps):
    """In a step with an estimate (after 4 steps), and between (after 1)."""
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    zeros = torch.zeros(2)
    optimizer = cls([w], update_every=4, engine="graph")
    for _ in range(num_steps):
        optimizer.step(closure_of(optimizer, lambda: F.mse_loss(w, zeros)))
    before, state = w.detach().clone(), copy.deepcopy(optimizer.state_dict())
    losses = {
        "loss": lambda: F.mse_loss(w, zeros) * math.inf,
        "gradient": lambda: F.mse_loss(w, zeros) + (w - w.detach()).abs().sqrt().sum(),
        # the gradient vanishes at zero, and the second derivative does not exist
        "product": lambda: F.mse_loss(w, zeros) + ((w - w.detach()).abs() ** 1.5).sum(),
    }
    optimizer.step(closure_of(optimizer, losses[where]))
    report = optimizer.last_report
    if where == "product" and (num_steps == 1 or cls is SophiaG):  # has no second derivative
        assert report.outcome is Outcome.STEPPED
        return
    assert report.outcome is getattr(Outcome, f"NONFINITE_{where.upper()}")
    assert torch.equal(w, before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    optimizer.step(closure_of(optimizer, lambda: F.mse_loss(w, zeros)))
    assert optimizer.last_report.outcome is Outcome.STEPPED
    assert optimizer.last_report.is_refreshed == (num_steps == 4)


@every
@pytest.mark.parametrize("num_steps", [1, 3])
def test_an_exception_leaves_parameters_and_state(cls, num_steps):
    task = problem("dropout")
    optimizer = cls(task.params, update_every=3)
    plain = closure_for(optimizer, task)
    for _ in range(num_steps):
        optimizer.step(plain)
    before, state = flat(task.params), copy.deepcopy(optimizer.state_dict())

    def closure():
        plain()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(flat(task.params), before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


@every
def test_a_closure_that_returns_none_skips_the_step_also_between_estimates(cls):
    task = problem("mlp")
    optimizer = cls(task.params, update_every=2)
    optimizer.step(closure_for(optimizer, task))
    for _ in range(2):
        before, state = flat(task.params), copy.deepcopy(optimizer.state_dict())
        assert optimizer.step(lambda: None) is None
        assert optimizer.last_report.outcome is Outcome.SKIPPED
        assert torch.equal(flat(task.params), before)
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
        optimizer.step(closure_for(optimizer, task))


@every
def test_groups_have_options_of_their_own_and_schedulers_multiply(cls):
    task = problem("mlp")
    names = [name for name, _ in task.net.named_parameters()]
    assert names[1] == "0.bias"
    groups = [
        {"params": task.params[:2], "lr": 0.0},
        {"params": task.params[2:3], "weight_decay": 0.5},
        {"params": task.params[3:]},
    ]
    optimizer = cls(groups, lr=0.01, eps=1e30)  # so great that no gradient moves anything
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    start = [p.detach().clone() for p in task.params]
    for _ in range(2):
        optimizer.step(closure_for(optimizer, task))
        scheduler.step()
    for i, (p, before) in enumerate(zip(task.params, start, strict=True)):
        factor = (1 - 0.01 * 0.5) * (1 - 0.005 * 0.5) if i == 2 else 1.0
        torch.testing.assert_close(p, factor * before, rtol=1e-12, atol=1e-12)


@every
def test_frozen_and_unused_parameters_stay_and_a_late_one_gets_an_estimate_at_once(cls, caplog):
    used, late, unused, frozen = (nn.Parameter(torch.ones(2)) for _ in range(4))
    frozen.requires_grad_(False)
    zeros = torch.zeros(2)
    optimizer = cls([used, unused, frozen], lr=0.01, update_every=5, weight_decay=0.1)

    def step(loss):
        optimizer.step(closure_of(optimizer, loss))
        return optimizer.last_report.is_refreshed

    refreshed = [step(lambda: F.mse_loss(used, zeros)) for _ in range(3)]
    assert refreshed == [True, False, False]
    assert "Parameter number 1 (shape (2,)) got no gradient" in caplog.text
    optimizer.add_param_group({"params": [late]})
    refreshed = [step(lambda: F.mse_loss(used + late, zeros)) for _ in range(4)]
    assert refreshed == [True, False, True, False]
    frozen.requires_grad_(True)
    assert step(lambda: F.mse_loss(used + frozen, zeros))
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(late, torch.ones(2))
    assert not torch.equal(frozen, torch.ones(2))
    before = unused.detach().clone()
    step(lambda: F.mse_loss(used + unused, zeros))  # waits for its first estimate
    assert torch.equal(unused, before)
    for _ in range(4):
        step(lambda: F.mse_loss(used + unused, zeros))
    assert not torch.equal(unused, before)


@every
def test_a_loss_that_never_calls_backward_is_refused_also_between_estimates(cls):
    task = problem("mlp")
    optimizer = cls(task.params, update_every=2)
    optimizer.step(closure_for(optimizer, task))
    before = flat(task.params)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"never called loss\.backward\(\)"):
            optimizer.step(lambda: task.loss(task.net(task.x)))
    assert torch.equal(flat(task.params), before)


@every
def test_a_closure_between_estimates_has_to_return_its_loss(cls):
    task = problem("mlp")
    optimizer = cls(task.params, update_every=2)
    optimizer.step(closure_for(optimizer, task))
    plain = closure_for(optimizer, task)
    with pytest.raises(TypeError, match="returned a dict, where the loss is expected"):
        optimizer.step(lambda: {"loss": plain()})
    with pytest.raises(TypeError, match="returned a NoneType, where the loss is expected"):
        optimizer.step(lambda: [plain(), None][1])


@every
def test_parameters_of_mixed_dtype_train(cls):
    single = nn.Parameter(torch.ones(2))
    double = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = cls([single, double], lr=0.01, update_every=2)
    target = torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        optimizer.step(
            closure_of(optimizer, lambda: F.mse_loss(torch.cat([single.double(), double]), target))
        )
    assert single.dtype == torch.float32
    assert (single < 1).all()
    assert (double < 1).all()
