"""Faults at every point of every optimizer's step: parameters and state stay in order."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from problems import closure_of, flat, problem

import hvpopt
from hvpopt.closure import ClosureOracle
from hvpopt.optim.report import Outcome
from hvpopt.preconditioners import EmpiricalFisherDiagonal, Jacobi, Kronecker, Nystrom

OPTIMIZERS = {
    "newton_cg": lambda p: hvpopt.NewtonCG(p, max_cg_steps=7),
    "newton_cg hessian": lambda p: hvpopt.NewtonCG(p, curvature="hessian", max_cg_steps=7),
    "newton_cg fisher": lambda p: hvpopt.NewtonCG(
        p, preconditioner=EmpiricalFisherDiagonal(every=1), max_cg_steps=7, weight_decay=0.01
    ),
    "newton_cg debiased": lambda p: hvpopt.NewtonCG(
        p, preconditioner=Kronecker(every=1), curvature_fraction=0.7, debiased=True
    ),
    "newton_cg decoupled": lambda p: hvpopt.NewtonCG(
        p, max_cg_steps=5, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "nys_newton_cg": lambda p: hvpopt.NysNewtonCG(p, rank=3, every=1, max_cg_steps=5),
    "trust_region": lambda p: hvpopt.TrustRegionNewtonCG(p, max_cg_steps=7),
    "trust_region jacobi": lambda p: hvpopt.TrustRegionNewtonCG(
        p, preconditioner=Jacobi(num_probes=2, every=1), max_cg_steps=7
    ),
    "newton_cg nystrom": lambda p: hvpopt.NewtonCG(
        p, preconditioner=Nystrom(rank=3, every=1), max_cg_steps=5
    ),
    "smd": lambda p: hvpopt.SMD(p),
    "smd unguarded": lambda p: hvpopt.SMD(p, overshoot_guard=False, gain="group"),
    "sophia_h": lambda p: hvpopt.SophiaH(p, lr=0.01, update_every=1),
    "sophia_g": lambda p: hvpopt.SophiaG(p, lr=0.01, update_every=1),
    "adahessian": lambda p: hvpopt.AdaHessian(p),
    "handover": lambda p: hvpopt.Handover(
        p,
        [hvpopt.Stage(torch.optim.SGD, steps=1, lr=0.1), hvpopt.Stage(hvpopt.NewtonCG)],
    ),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


class Run:
    """An optimizer after some steps, whose next step can be repeated from the same random state."""

    def __init__(self, name, num_steps=2):
        self.task = problem("dropout")
        self.optimizer = OPTIMIZERS[name](self.task.params)
        self.plain = closure_of(self.optimizer, lambda: self.task.loss(self.task.net(self.task.x)))
        torch.manual_seed(1)
        for _ in range(num_steps):
            self.step(self.plain)
        self.before = self.now()

    def step(self, closure=None):
        torch.manual_seed(2)
        self.optimizer.step(self.plain if closure is None else closure)
        return self.optimizer.last_report

    def now(self):
        state = copy.deepcopy(self.optimizer.state_dict())
        state.pop("names", None)  # text is not compared
        state.pop("position", None)  # which counts steps that fail, too
        return flat(self.task.params), state


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def expected(name):
    """What an undisturbed third step leaves, and how often it runs the closure."""
    run, calls = Run(name), []
    run.step(lambda: (calls.append(1), run.plain())[1])
    return run.now(), len(calls)


def check(run, report, after):
    """The step failed and left nothing, or it made something of what was left."""
    assert torch.isfinite(flat(run.task.params)).all()
    if report.outcome.failed:
        same(run.now(), run.before)
        assert not run.step().outcome.failed
        same(run.now(), after)
        return
    if report.outcome is Outcome.REJECTED:
        same(flat(run.task.params), run.before[0])
    assert not run.step().outcome.failed
    assert torch.isfinite(flat(run.task.params)).all()


def spoilt_runs(name, spoil, outcome):
    """Spoils one run of a step's closure after the other; the first is the one that counts."""
    after, num_runs = expected(name)
    for at in range(1, num_runs + 1):
        run, calls = Run(name), []

        def loss(run=run, calls=calls, at=at):
            calls.append(1)
            return spoil(run.task, len(calls) == at)

        report = run.step(closure_of(run.optimizer, loss))
        assert (report.outcome is outcome) or at > 1
        check(run, report, after)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_at_any_run_of_the_closure(name, bad):
    def loss(task, spoilt):
        value = task.loss(task.net(task.x))
        return value * 0 + bad if spoilt else value

    spoilt_runs(name, loss, Outcome.NONFINITE_LOSS)


@every
def test_a_gradient_that_is_not_finite_at_any_run_of_the_closure(name):
    def loss(task, spoilt):
        z = task.net(task.x)
        return task.loss(z + (z - z.detach()).abs().sqrt() if spoilt else z)

    spoilt_runs(name, loss, Outcome.NONFINITE_GRADIENT)


@every
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_first_step_that_fails_leaves_an_optimizer_as_new(name, where):
    fresh = Run(name, 0)
    fresh.step()
    after = fresh.now()
    run = Run(name, 0)

    def loss():
        z = run.task.net(run.task.x)
        nothing = (z - z.detach()).abs().sqrt()
        return run.task.loss(z + nothing) * (math.nan if where == "loss" else 1.0)

    run.step(closure_of(run.optimizer, loss))
    if name == "handover":  # torch's SGD, which looks at nothing
        return
    assert run.optimizer.last_report.outcome is getattr(Outcome, f"NONFINITE_{where.upper()}")
    same(flat(run.task.params), run.before[0])
    run.step()
    same(run.now(), after)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite_at_any_point(name, bad, monkeypatch):
    if name == "sophia_g":
        pytest.skip("takes no products")
    after, _ = expected(name)
    fault = Fault(monkeypatch, bad)
    outcomes = set()
    for at in range(1, 1000):
        run = Run(name)
        fault.arm(at)
        report = run.step()
        if not fault.disarm():
            break
        outcomes.add(report.outcome)
        check(run, report, after)
    same(run.now(), after)
    assert Outcome.NONFINITE_PRODUCT in outcomes


class Fault:
    """Spoils the n-th product since it was armed."""

    def __init__(self, monkeypatch, bad):
        self.at, self.count, self.bad = 0, 0, bad
        product, trace_along = ClosureOracle._product, ClosureOracle.trace_along

        def along(oracle, *args):
            *point, v = trace_along(oracle, *args)
            return *point, self.spoilt(v)

        monkeypatch.setattr(ClosureOracle, "_product", lambda *args: self.spoilt(product(*args)))
        monkeypatch.setattr(ClosureOracle, "trace_along", along)

    def arm(self, at):
        self.at, self.count = at, 0

    def disarm(self):
        """Whether there was an n-th product."""
        was_met, self.at = self.count >= self.at, 0
        return was_met

    def spoilt(self, v):
        self.count += 1
        return [torch.full_like(x, self.bad) for x in v] if self.count == self.at else v


PACKAGE = Path(hvpopt.__file__).parent
PARTS = tuple(str(PACKAGE / part) for part in ("optim", "solvers", "preconditioners"))


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that runs in hvpopt's optimizers and solvers."""

    def __init__(self, at=None):
        self.at, self.num_lines = at, 0

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PARTS) or frame.f_code.co_name == "undo":
            return None
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self.at:
                raise KeyboardInterrupt
        return self

    def run(self, step):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            step()
        finally:
            sys.settrace(before)


@every
def test_an_interrupt_at_any_line_leaves_the_step_undone_or_done(name):
    run = Run(name)
    counter = Interrupter()
    counter.run(run.step)
    after = run.now()
    places = torch.randperm(counter.num_lines, generator=torch.Generator().manual_seed(0))[:12]
    undone, run = 0, Run(name)
    for at in (places + 1).tolist():
        interrupter = Interrupter(at)
        with pytest.raises(KeyboardInterrupt):
            interrupter.run(run.step)
        if torch.equal(flat(run.task.params), run.before[0]):
            same(run.now(), run.before)
            undone += 1
        else:
            same(run.now(), after)
            run = Run(name)
    assert undone > 6
    run.step()
    same(run.now(), after)
