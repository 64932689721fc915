"""What contestants are, what their steps do, and rivals that are no optimizers."""

import threading

import pytest
import torch
from bowl import CPU, BowlProblem, entry
from hvpopt.experiments.race.contestants import PACKAGES, Contestant
from hvpopt.experiments.race.results import Result
from hvpopt.experiments.race.rivals import MuonWithAdamW, _paused, torchmin_steps
from hvpopt.experiments.race.turns import Run
from torch import nn


def test_the_steps_of_an_optimizer_are_those_of_a_plain_loop():
    contestant = Contestant.of("SGD", entry(options={"lr": 0.25, "momentum": 0.5}))
    problem = BowlProblem()
    steps = contestant.start(problem, contestant.options)
    for _ in range(3):
        next(steps)
    w, v, observed = 0.0, 0.0, []
    for _ in range(3):
        observed.append(1.5 * (w - 1) ** 2)
        v = 0.5 * v + (w - 1)
        w -= 0.25 * v
    assert problem.module.weight.tolist()[0] == pytest.approx([w, w])
    assert problem.observed == pytest.approx(observed)


def test_the_graph_of_the_gradient_is_kept_on_the_steps_that_ask_for_it():
    seen = []

    class Watcher(torch.optim.SGD):
        def step(self, closure):
            loss = super().step(closure)
            seen.append(all(p.grad.requires_grad for g in self.param_groups for p in g["params"]))
            return loss

    from hvpopt.experiments.race.contestants import optimizer_steps

    run = Run(
        "r",
        BowlProblem(),
        optimizer_steps(BowlProblem(), Watcher, {"lr": 0.1}, create_graph_every=3),
        seed=0,
        device=CPU,
    )
    while len(seen) < 7:
        run.turn(run.clock + 1e-9)
    assert run.note is None
    assert seen[:7] == [True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "race.contestants.x must name one of optimizer, minimizer, solver, got none"),
        (entry(minimizer="newton-cg"), r"got \['optimizer', 'minimizer'\]"),
        (entry(lr=1), "race.contestants.x has no key 'lr': choose of optimizer, minimizer"),
        (entry(grid={"lr": 1}), "race.contestants.x.grid.lr=1: expected a list of candidates"),
        (entry(grid={"lr": []}), r"grid.lr=\[\]: expected a list of candidates"),
        ({"optimizer": "torch.optim.SDG"}, "torch.optim.SDG does not exist. Did you mean 'SGD'"),
        ({"optimizer": "os.system"}, "x.optimizer=os.system is not allowed"),
    ],
)
def test_an_entry_that_cannot_be_understood_is_refused(description, message):
    with pytest.raises(ValueError, match=message):
        Contestant.of("x", description)


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(PACKAGES, "no_such_package", "no-such-package")
    contestant = Contestant.of("x", {"optimizer": "no_such_package.Fast"})
    assert contestant.missing_package == "no-such-package"
    assert not contestant.is_ours
    result = Result(contestant, absent=contestant.missing_package)
    assert result.notes() == ["not installed (pip install no-such-package)"]


def test_ours_are_the_optimizers_of_hvpopt():
    assert Contestant.of("x", {"optimizer": "hvpopt.NewtonCG"}).is_ours
    muon = Contestant.of("x", {"optimizer": "hvpopt.experiments.race.rivals.MuonWithAdamW"})
    assert not muon.is_ours


def test_muon_gets_the_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    twin = nn.Linear(4, 3)
    twin.load_state_dict(module.state_dict())
    inputs = torch.randn(8, 4)
    both = MuonWithAdamW(list(module.parameters()), lr=0.01)
    muon = torch.optim.Muon(
        [twin.weight], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([twin.bias], lr=0.01, weight_decay=0.0)
    for _ in range(3):

        def closure():
            both.zero_grad()
            loss = module(inputs).square().mean()
            loss.backward()
            return loss

        both.step(closure)
        twin.zero_grad()
        twin(inputs).square().mean().backward()
        muon.step()
        adamw.step()
    assert torch.equal(module.weight, twin.weight)
    assert torch.equal(module.bias, twin.bias)


def test_a_call_pauses_in_its_callback_and_is_ended_by_closing():
    log = []

    def call(callback):
        for i in range(10):
            log.append(i)
            callback(torch.tensor(i))

    paused = _paused(call)
    assert log == []
    assert next(paused).item() == 0
    assert next(paused).item() == 1
    assert log == [0, 1]
    num_threads = threading.active_count()
    paused.close()
    assert threading.active_count() == num_threads - 1
    assert log == [0, 1]


def test_the_end_and_the_errors_of_a_paused_call_arrive():
    assert [x.item() for x in _paused(lambda callback: callback(torch.tensor(3)))] == [3]

    def fails(callback):
        callback(torch.tensor(3))
        raise ValueError("inside")

    paused = _paused(fails)
    next(paused)
    with pytest.raises(ValueError, match="inside"):
        next(paused)


@pytest.mark.parametrize("method", ["newton-cg", "trust-ncg"])
def test_pytorch_minimize_minimises_the_problem_step_by_step(method):
    pytest.importorskip("torchmin")
    problem = BowlProblem()
    steps = torchmin_steps(problem, method, {})
    next(steps)
    assert 0 <= problem.evaluate().loss < 1.5
    for _ in steps:
        pass
    assert problem.evaluate().loss < 1e-12
