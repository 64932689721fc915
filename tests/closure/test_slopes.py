"""Slopes of the loss by the outputs against gradients of single examples."""

import pytest
import torch
import torch.nn.functional as F
from problems import flat, problem
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hvpopt.closure import ClosureOracle, NoBackwardError
from hvpopt.closure.slopes import sampled_slopes
from hvpopt.engines.base import fill, vjp
from hvpopt.isolation import World
from hvpopt.likelihoods import NoLikelihoodError

LABELS = torch.tensor([0, 2, 1, 0, 2, 0])
TARGET = torch.linspace(0, 1, 18, dtype=torch.float64).reshape(6, 3)
LOSSES = {
    "cross_entropy": (F.cross_entropy, LABELS, 6),
    "mse_loss": (F.mse_loss, TARGET, 18),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, TARGET, 18),
    "poisson_nll_loss": (F.poisson_nll_loss, TARGET, 18),
}


def collected(closure, params, kind="empirical", **options):
    """Every (z, u, Jᵀu) that the callback is given."""
    seen = []

    def then(outputs, slopes):
        pulled = flat(fill(vjp(outputs, params, slopes), params))
        seen.append((list(outputs), list(slopes), pulled))

    with ClosureOracle(closure, params) as oracle:
        oracle.trace_along([torch.zeros_like(p) for p in params])
        sampled_slopes(oracle, kind, then=then, **{"seed": 0, **options})
    return seen


@pytest.mark.parametrize("name", LOSSES)
def test_the_slopes_of_each_example_pull_back_to_its_weighted_gradient(name):
    func, labels, count = LOSSES[name]
    task = problem("mlp")
    task.loss = lambda z: func(z, labels)
    pulled = []

    def then(outputs, slopes):
        (z,), (u,) = outputs, slopes
        assert u.shape == z.shape
        assert not u.requires_grad
        for n in range(6):
            alone = torch.zeros_like(u)
            alone[n] = u[n]
            pulled.append(flat(fill(vjp([z], task.params, [alone]), task.params)))

    with ClosureOracle(task.closure(), task.params) as oracle:
        oracle.trace_along([torch.zeros_like(p) for p in task.params])
        sampled_slopes(oracle, "empirical", seed=0, then=then)
    for n, got in enumerate(pulled):
        one = func(task.net(task.x[n : n + 1]), labels[n : n + 1], reduction="sum")
        g = flat(list(torch.autograd.grad(one, task.params)))
        torch.testing.assert_close(got, g / count**0.5)
    assert len(pulled) == 6


@pytest.mark.parametrize("name", LOSSES)
def test_pulled_back_slopes_at_sampled_labels_have_the_ggn_for_their_second_moment(name):
    func, labels, _ = LOSSES[name]
    task = problem("mlp")
    task.loss = lambda z: func(z, labels)
    seen = collected(task.closure(), task.params, "monte_carlo", num_samples=600)
    pulled = torch.stack([p for *_, p in seen])
    exact = task.dense_ggn()
    sampled = pulled.T @ pulled / len(pulled)
    assert (sampled - exact).norm() < 0.15 * exact.norm()  # 1/√600 and the matrix's rank
    assert pulled.mean(0).norm() < 4 * (exact.trace() / 600).sqrt()


def test_random_signs_are_one_for_each_term():
    task = problem("mlp")
    plain = collected(task.closure(), task.params)[0][1][0]
    seen = collected(task.closure(), task.params, num_samples=20, random_signs=True)
    ratios = torch.stack([u / plain for _, (u,), _ in seen])
    torch.testing.assert_close(ratios.abs(), torch.ones_like(ratios))
    assert torch.equal(ratios.round(), ratios[..., :1].round().expand_as(ratios))
    signs = ratios[..., 0].round()
    assert len(signs.unique(dim=0)) > 10
    assert signs.unique(dim=1).shape[1] == 6


def test_a_seed_fixes_labels_and_signs_and_leaves_the_global_generator_alone():
    task = problem("mlp")
    options = {"kind": "monte_carlo", "num_samples": 2, "random_signs": True}
    before = torch.get_rng_state()
    runs = [
        flat([p for *_, p in collected(task.closure(), task.params, seed=seed, **options)])
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])


@pytest.mark.parametrize("name", ["dropout", "batchnorm"])
def test_the_run_sees_the_same_function_and_leaves_no_trace(name):
    task = problem(name)
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params) as oracle:
        oracle.trace_along([torch.zeros_like(p) for p in task.params])
        state = {k: v.clone() for k, v in task.net.state_dict().items()}
        grads = [p.grad.clone() for p in task.params]
        random = torch.get_rng_state()
        outputs = []
        for _ in range(2):
            sampled_slopes(
                oracle, "empirical", seed=0, then=lambda z, u: outputs.append(z[0].detach())
            )
        assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(*outputs)
    for p, g in zip(task.params, grads, strict=True):
        assert torch.equal(p.grad, g)
    for key, value in task.net.state_dict().items():
        assert torch.equal(value, state[key])


def test_each_backward_call_hands_over_its_own_losses():
    task = problem("mlp")

    def closure():
        task.net.zero_grad()
        for rows in (slice(0, 2), slice(2, 6)):
            (F.cross_entropy(task.net(task.x[rows]), LABELS[rows]) / 2).backward()

    seen = collected(closure, task.params, num_samples=2)
    assert [z.shape[0] for (z,), *_ in seen] == [2, 2, 4, 4]
    first = F.cross_entropy(task.net(task.x[:2]), LABELS[:2])
    gradient = flat(list(torch.autograd.grad(first, task.params)))
    # Σ √c ∇ℓ with c = 1/4 for both examples, of whose gradients the loss has the mean
    torch.testing.assert_close(seen[0][2], 2 * gradient * 0.5)


def test_several_losses_have_a_slope_for_each_output():
    task = problem("mlp")

    def loss(z):
        return F.cross_entropy(z[:, :2], LABELS % 2) + 0.5 * F.mse_loss(z[:, 2], TARGET[:, 0])

    task.loss = loss
    ((z, u, _),) = collected(task.closure(), task.params)
    assert [x.shape for x in z] == [x.shape for x in u] == [(6, 2), (6,)]
    torch.testing.assert_close(u[1], (0.5 / 6) ** 0.5 * 2 * (z[1].detach() - TARGET[:, 0]))


def test_the_division_by_lightnings_micro_batches_is_undone(monkeypatch):
    task = problem("mlp")
    (plain,) = collected(task.closure(), task.params)
    task.loss = lambda z: F.cross_entropy(z, torch.arange(6) % 3) / 4
    monkeypatch.setattr(World, "accumulation", 4)
    (divided,) = collected(task.closure(), task.params)
    torch.testing.assert_close(divided[2], plain[2])


def test_a_function_mode_around_the_run_sees_the_layers():
    task, seen = problem("mlp"), []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.linear:
                seen.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    collected(task.closure(), task.params, around=Mode())
    assert seen == [(6, 4), (6, 5), (6, 4)]


def test_activation_checkpointing_and_hooks_change_nothing():
    task, checked = problem("mlp"), problem("mlp")
    expected = collected(task.closure(), task.params)[0][2]
    called = []
    params = checked.params

    def closure():
        checked.net.zero_grad()
        x = checked.x
        for layer in checked.net:
            x = checkpoint(layer, x, use_reentrant=False)
        checked.loss(x).backward()

    with ClosureOracle(closure, params) as oracle:
        oracle.trace_along([torch.zeros_like(p) for p in params])
        handle = params[0].register_hook(lambda g: called.append(g))
        pulled = []
        sampled_slopes(
            oracle,
            "empirical",
            seed=0,
            then=lambda z, u: pulled.append(flat(fill(vjp(z, params, u), params))),
        )
        handle.remove()
    torch.testing.assert_close(pulled[0], expected)
    assert called == []


def test_a_loss_without_a_likelihood_is_refused_with_a_remedy():
    task = problem("mlp")
    for loss, reason in (
        (lambda z: (z**2).mean(), "found no loss function"),
        (lambda z: F.huber_loss(z, TARGET), "calls F.huber_loss, whose Fisher"),
    ):
        task.loss = loss
        with pytest.raises(NoLikelihoodError, match=f"Jacobi and Nystrom do without.*{reason}"):
            collected(task.closure(), task.params)


def test_a_closure_that_stops_calling_backward_is_named():
    task, calls = problem("mlp"), []

    def closure():
        calls.append(None)
        loss = task.loss(task.net(task.x))
        if len(calls) < 3:  # a probe, and the run that counts
            loss.backward()
        return loss

    with pytest.raises(NoBackwardError, match="never called"):
        collected(closure, task.params)
