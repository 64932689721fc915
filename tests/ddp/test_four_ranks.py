"""Four processes under DistributedDataParallel: the joined batch's steps, and one decision."""

import math
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from problems import closure_of, flat, problem
from ranks import in_processes
from torch import nn

import hvpopt
from hvpopt import likelihoods
from hvpopt.closure import ClosureOracle
from hvpopt.closure.rows import Rows
from hvpopt.engines.graph import GraphRecorder
from hvpopt.preconditioners import Jacobi, Nystrom
from hvpopt.solvers.stopping import ResidualNorm

SIZE = 4
EVEN, UNEVEN = (3, 3, 3, 3), (2, 1, 3, 1)
pytestmark = pytest.mark.slow  # four processes that import torch

# Systems solved to the end: what CG has after some steps depends on rounding, which ranks change.
SOLVED = {"cg_stop": ResidualNorm(rtol=1e-11), "cg_backtracking": False}
OPTIMIZERS = {
    "newton_cg": lambda p: hvpopt.NewtonCG(p),
    "newton_cg plain": lambda p: hvpopt.NewtonCG(p, preconditioner=None, **SOLVED),
    "newton_cg hessian": lambda p: hvpopt.NewtonCG(p, curvature="hessian", weight_decay=0.01),
    "newton_cg nystrom": lambda p: hvpopt.NewtonCG(
        p, preconditioner=Nystrom(rank=4, every=2), **SOLVED
    ),
    "newton_cg debiased": lambda p: hvpopt.NewtonCG(p, curvature_fraction=0.5, debiased=True),
    "nys_newton_cg": lambda p: hvpopt.NysNewtonCG(p, rank=4, max_cg_steps=20),
    "trust_region": lambda p: hvpopt.TrustRegionNewtonCG(p),
    "trust_region jacobi": lambda p: hvpopt.TrustRegionNewtonCG(
        p, preconditioner=Jacobi(num_probes=2, every=2)
    ),
    "smd": lambda p: hvpopt.SMD(p),
    "smd unguarded": lambda p: hvpopt.SMD(p, overshoot_guard=False, gain="tensor"),
    "sophia_h": lambda p: hvpopt.SophiaH(p, lr=0.01, update_every=2),
    "sophia_g": lambda p: hvpopt.SophiaG(p, lr=0.01, update_every=2),
    "adahessian": lambda p: hvpopt.AdaHessian(p),
}
# what ranks draw for themselves is not what one process draws for all
OWN_DRAWS = ("newton_cg debiased", "sophia_g")


def batch(step, sizes):
    """Inputs and labels of a step, for all ranks in their order."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64)
    return x.split(sizes), torch.randint(3, (sum(sizes),), generator=generator).split(sizes)


def steps_of(name):
    """The sizes of the ranks' batches; factors are means over rows where batches are even."""
    return [EVEN, EVEN, EVEN] if name == "newton_cg" else [EVEN, EVEN, UNEVEN, EVEN, UNEVEN]


def train_on_rank(rank, name):
    task = problem("mlp")
    net = nn.parallel.DistributedDataParallel(task.net)
    optimizer = OPTIMIZERS[name](task.params)
    reports = []
    for step, sizes in enumerate(steps_of(name)):
        x, y = (part[rank] for part in batch(step, sizes))
        optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(net(x), y)))  # noqa: B023
        reports.append(optimizer.last_report)
    return flat(task.params), reports


def train_alone(name):
    """One process, whose loss is the mean of the ranks' means."""
    task = problem("mlp")
    optimizer = OPTIMIZERS[name](task.params)
    reports = []
    for step, sizes in enumerate(steps_of(name)):
        x, y = batch(step, sizes)

        def loss(x=x, y=y, sizes=sizes):
            z = task.net(torch.cat(x)).split(sizes)
            return sum(map(F.cross_entropy, z, y)) / SIZE

        optimizer.step(closure_of(optimizer, loss))
        reports.append(optimizer.last_report)
    return flat(task.params), reports


def all_train(rank):
    results = {}
    for name in OPTIMIZERS:
        results[name] = train_on_rank(rank, name)
        check_alike(results[name])
    return results


def check_alike(result):
    """All ranks have the same parameters, bit for bit, and took the same decisions."""
    params, reports = result
    everywhere = [None] * SIZE
    dist.all_gather_object(everywhere, (params, list(map(decisions, reports))))
    for other_params, other_decisions in everywhere:
        assert torch.equal(params, other_params)
        assert other_decisions == everywhere[0][1]


def decisions(report):
    names = ("outcome", "damping", "radius", "cg_steps", "cg_status", "cg_iterate", "step_length")
    return repr([getattr(report, name, None) for name in names])


def test_steps_are_those_of_one_process_on_the_joined_batch(tmp_path, monkeypatch):
    found = in_processes(SIZE, all_train, tmp_path)
    assert found.keys() == OPTIMIZERS.keys()
    draw_labels_as_the_ranks_do(monkeypatch)
    for name, (params, reports) in found.items():
        if name in OWN_DRAWS:
            continue
        alone, reports_alone = train_alone(name)
        torch.testing.assert_close(params, alone, rtol=1e-6, atol=1e-8, msg=name)
        for ours, theirs in zip(reports, reports_alone, strict=True):
            assert ours.outcome is theirs.outcome
            assert ours.num_closure_runs == theirs.num_closure_runs


def draw_labels_as_the_ranks_do(monkeypatch):
    """In one process: one generator a rank, each for its share of the outputs, in turns."""

    def generators(self):
        ranks = [torch.Generator().manual_seed(self.seed + 1_000_003 * r) for r in range(SIZE)]
        return Turns(ranks)

    uniform = likelihoods._uniform
    monkeypatch.setattr(likelihoods.MonteCarlo, "generator", generators)
    monkeypatch.setattr(likelihoods, "_uniform", lambda like, turns: uniform(like, turns.next()))


class Turns:
    def __init__(self, generators):
        self.generators, self.count = generators, 0

    def next(self):
        self.count += 1
        return self.generators[(self.count - 1) % len(self.generators)]


# In this order in one run: what fails a step comes before what does not, or before a plain step.
FAULTS = [
    None, "loss", "evaluation", "minus infinity", "rise", "gradient", "curvature", "product", None,
    "second derivative", None,
]  # fmt: skip


def spoilt_loss(task, net, x, y, kind, calls):
    """A loss that on this rank is not like the others'."""
    calls.append(1)
    z = net(x)
    nothing = z - z.detach()
    if kind == "gradient":
        z = z + nothing.abs().sqrt()
    if kind == "second derivative":
        z = z + nothing.abs() ** 1.5
    value = F.cross_entropy(z, y)
    if kind == "loss":
        return value * math.nan
    if kind == "minus infinity":
        return value * 0 - math.inf
    if kind == "evaluation" and len(calls) == 2:
        return value * math.nan
    if kind == "rise" and len(calls) >= 2:
        return value + 100.0
    if kind == "curvature":
        value = value - 5.0 * sum((p**2).sum() for p in task.params)
    return value


def spoilt_products():
    """While active, this rank's own products are NaN, before they are averaged."""
    product = GraphRecorder.product

    def spoilt(self, v, **options):
        return [torch.full_like(x, math.nan) for x in product(self, v, **options)]

    return mock.patch.object(GraphRecorder, "product", spoilt)


def all_are_disturbed(rank):
    """Faults on the third rank, in one step each, and what all make of them."""
    outcomes = {}
    for name in OPTIMIZERS:
        task = problem("mlp")
        net = nn.parallel.DistributedDataParallel(task.net)
        optimizer = OPTIMIZERS[name](task.params)
        reports = []
        # of the GGN that SMD has by default nothing else may be a part
        faults = [kind for kind in FAULTS if kind != "curvature" or not name.startswith("smd")]
        for step, kind in enumerate(faults):
            x, y = (part[rank] for part in batch(step, EVEN))
            at = kind if rank == 2 else None
            calls = []
            closure = closure_of(
                optimizer,
                lambda: spoilt_loss(task, net, x, y, at, calls),  # noqa: B023
            )
            with spoilt_products() if at == "product" else nullcontext():
                optimizer.step(closure)
            reports.append(optimizer.last_report)
            assert torch.isfinite(flat(task.params)).all(), (name, kind, step)
            check_alike((flat(task.params), reports[-1:]))
        outcomes[name] = [(k, r.outcome.name) for k, r in zip(faults, reports, strict=True)]
    return outcomes


def test_all_ranks_decide_alike_where_one_sees_what_the_others_do_not(tmp_path):
    outcomes = in_processes(SIZE, all_are_disturbed, tmp_path)
    failures = {
        "loss": "NONFINITE_LOSS",
        "minus infinity": "NONFINITE_LOSS",
        "gradient": "NONFINITE_GRADIENT",
    }
    for name, of_steps in outcomes.items():
        for kind, outcome in of_steps:
            if kind in failures:
                assert outcome == failures[kind], (name, kind)
            elif kind in (None, "evaluation", "rise", "curvature"):
                assert outcome in ("STEPPED", "REJECTED"), (name, kind)
    found = {name: dict(of_steps) for name, of_steps in outcomes.items()}
    assert found["newton_cg plain"]["rise"] == "REJECTED"
    for name in ("newton_cg plain", "newton_cg hessian", "trust_region", "smd"):
        assert found[name]["product"] == "NONFINITE_PRODUCT"
    for name in ("newton_cg hessian", "trust_region", "nys_newton_cg", "adahessian"):
        assert found[name]["second derivative"] == "NONFINITE_PRODUCT"


def parts_on_rank(rank):
    task = problem("mlp")
    net = nn.parallel.DistributedDataParallel(task.net)
    x, y = (part[rank] for part in batch(0, EVEN))

    def closure():
        task.net.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    with ClosureOracle(closure, task.params) as oracle:
        whole = oracle.trace("ggn", rows=Rows(0.4, seed=1))
        parts = [oracle.of_part(whole, which) for which in ("part", "rest")]
        return [(flat(p.grad), flat(p.product(task.tangent()))) for p in (whole, *parts)]


def test_parts_of_a_batch_are_means_over_the_ranks(tmp_path):
    found = in_processes(SIZE, parts_on_rank, tmp_path)
    x, y = batch(0, EVEN)
    rows = Rows(0.4, seed=1)
    chosen = [slice(None), rows.indices(3, "part"), rows.indices(3, "rest")]
    for (grad, product), index in zip(found, chosen, strict=True):
        task = problem("mlp")
        task.x = torch.cat([part[index] for part in x])
        labels = torch.cat([part[index] for part in y])
        task.loss = lambda z, labels=labels: F.cross_entropy(z, labels)
        task.closure()()
        torch.testing.assert_close(grad, flat([p.grad for p in task.params]))
        torch.testing.assert_close(product, task.dense_ggn() @ flat(task.tangent()))
