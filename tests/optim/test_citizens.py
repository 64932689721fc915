"""What users expect of every torch optimizer: hooks, flags, Lightning's options, reports."""

import logging

import pytest
import torch
from fits import fit, world
from problems import closure_of, problem
from test_faults import OPTIMIZERS
from test_lightning import frozen
from torch import nn

import hvpopt
from hvpopt.optim.report import Outcome
from hvpopt.preconditioners.base import Preconditioner

every = pytest.mark.parametrize("name", OPTIMIZERS)
CLASSES = [
    hvpopt.NewtonCG,
    hvpopt.NysNewtonCG,
    hvpopt.TrustRegionNewtonCG,
    hvpopt.SMD,
    hvpopt.SophiaG,
    hvpopt.SophiaH,
    hvpopt.AdaHessian,
]
FLAGS = ["maximize", "foreach", "fused", "capturable", "differentiable"]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("cls", CLASSES)
def test_flags_of_other_optimizers_are_refused_by_name(cls, flag):
    with pytest.raises(TypeError, match=flag):
        cls([nn.Parameter(torch.ones(1))], **{flag: True})
    with pytest.raises(ValueError, match=f"{cls.__name__} has no option '{flag}': remove it from"):
        cls([{"params": [nn.Parameter(torch.ones(1))], flag: True}])
    cls([{"params": [nn.Parameter(torch.ones(1))], flag: False}])


@every
def test_hooks_are_called_once_a_step_and_see_the_parameters_before_and_after(name):
    task = problem("mlp")
    optimizer = OPTIMIZERS[name](task.params)
    seen = []
    see = lambda *_: seen.append(task.params[0].detach().clone())  # noqa: E731
    optimizer.register_step_pre_hook(see)
    optimizer.register_step_post_hook(see)
    closure = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    optimizer.step(closure)
    optimizer.step(closure)
    assert len(seen) == 4
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[3], task.params[0])


@every
def test_hooks_of_the_state_are_called(name):
    task = problem("mlp")
    optimizer = OPTIMIZERS[name](task.params)
    called = []
    optimizer.register_state_dict_pre_hook(lambda o: called.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: called.append(s["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda o: called.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["save", 1, "loaded"]


@every
def test_the_loss_is_returned_as_before_the_step_and_without_a_graph(name):
    task = problem("mlp")
    optimizer = OPTIMIZERS[name](task.params)
    expected = task.loss(task.net(task.x)).detach()
    returned = optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x))))
    torch.testing.assert_close(returned.detach(), expected)


@every
def test_a_closure_that_never_comes_is_explained(name):
    """At once, also where the first of several stages could do without."""
    optimizer = OPTIMIZERS[name](problem("mlp").params)
    with pytest.raises(TypeError, match=r"'16-mixed'.*use 'bf16-mixed'"):
        optimizer.step()


@every
def test_what_is_no_closure_is_refused(name):
    if name == "handover":  # whose first stage is torch's own
        return
    optimizer = OPTIMIZERS[name](problem("mlp").params)
    with pytest.raises(TypeError, match=r"with a Tensor, where the closure itself is expected"):
        optimizer.step(torch.ones(()))


@pytest.mark.parametrize("cls", CLASSES)
def test_what_a_group_would_ignore_is_refused(cls):
    w = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="unknown option 'weight_decy': was 'weight_decay' meant"):
        cls([{"params": w, "weight_decy": 0.1}])
    with pytest.raises(ValueError, match=f"engine='dual' in a parameter group: {cls.__name__} has"):
        cls([{"params": w, "engine": "dual"}])
    optimizer = cls([{"params": w, "name": "head", "initial_lr": 0.1, "max_lr": 1.0}])
    assert optimizer.param_groups[0]["name"] == "head"


@pytest.mark.parametrize("cls", [c for c in CLASSES if c is not hvpopt.SMD])
def test_a_seed_is_a_whole_number(cls):
    for seed in ("a", 1.5, True):
        with pytest.raises(ValueError, match=f"seed={seed!r}: expected a whole number"):
            cls([nn.Parameter(torch.ones(1))], seed=seed)


@pytest.mark.parametrize("curvature", ["gauss", None, "fisher", "empirical_fisher"])
@pytest.mark.parametrize("cls", [hvpopt.NewtonCG, hvpopt.TrustRegionNewtonCG, hvpopt.SMD])
def test_a_curvature_that_is_not_offered_is_answered_with_those_that_are(cls, curvature):
    message = f"curvature={curvature!r} is unknown: choose 'ggn' or 'hessian'"
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(1))], curvature=curvature)


@pytest.mark.parametrize("cls", [hvpopt.SophiaG, hvpopt.SophiaH])
def test_a_loss_that_is_not_returned_is_missed_at_the_first_step(cls):
    """The steps without an estimate have it from nowhere else."""
    task = problem("mlp")
    optimizer = cls(task.params)
    closure = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    with pytest.raises(TypeError, match="returned a NoneType, where the loss is expected"):
        optimizer.step(lambda: closure() and None)


# --- Lightning's options

MIXED = {"precision": "bf16-mixed"}
OPTIONS = [{"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2, **MIXED}]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
]


@pytest.fixture(scope="module", params=OPTIONS, ids=str)
def plain_run(request, tmp_path_factory):
    """Options, and what one sees after a run of an SGD that does not move."""
    folder = tmp_path_factory.mktemp("sgd")
    return request.param, world(
        *fit(lambda p: frozen(torch.optim.SGD(p, 0.1)), folder, **request.param)
    )


@every
def test_logs_metrics_hooks_and_random_numbers_count_one_run_a_step(name, plain_run, tmp_path):
    """Beside an SGD that does not move either, so that both see the same function throughout."""
    options, theirs = plain_run
    ours = world(*fit(lambda p: frozen(OPTIMIZERS[name](p)), tmp_path / "ours", **options))
    tolerance = 2e-2 if "precision" in options else 1e-5  # kernels differ in bf16's last digit
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for key in ("calls", "hooks", "updates", "step", "random", "by_hand"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every
def test_smoke_the_loss_falls_for_a_while(name, options, tmp_path):
    """Batches of 16 under dropout: Newton's methods are here for what they do, not how well."""
    net, trainer, _ = fit(OPTIMIZERS[name], tmp_path, epochs=8, **options)
    means = torch.stack(net.outputs).reshape(8, 4).mean(1)
    assert means.min() < means[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in net.parameters())
    assert trainer.optimizers[0].last_report.outcome in (Outcome.STEPPED, Outcome.REJECTED)


@every
def test_newtons_methods_warn_once_of_clipping_and_the_others_do_not(name, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="hvpopt")
    fit(OPTIMIZERS[name], tmp_path, gradient_clip_val=0.01)
    count = sum("clipped (Trainer's gradient_clip_val?)" in r.message for r in caplog.records)
    assert count == (1 if name.startswith(("newton", "nys", "trust", "handover")) else 0)


# --- what a report says of failures


class Negative(Preconditioner):
    every = 1

    def is_ready(self, states):
        return True

    def refresh(self, point, states):
        pass

    def solve(self, r, states, shift):
        return [-x for x in r]


@pytest.mark.parametrize("cls", [hvpopt.NewtonCG, hvpopt.TrustRegionNewtonCG])
def test_a_preconditioner_that_is_not_positive_definite_is_named_and_ends_in_an_error(cls):
    w = nn.Parameter(torch.ones(3).double())
    optimizer = cls([w], preconditioner=Negative(), max_consecutive_failures=2)
    closure = closure_of(optimizer, lambda: nn.functional.mse_loss(w, torch.zeros(3).double()))
    optimizer.step(closure)
    assert optimizer.last_report.outcome is Outcome.BROKEN_PRECONDITIONER
    assert optimizer.last_report.cg_status is not None
    assert w.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(FloatingPointError, match="The preconditioner is not positive definite"):
        optimizer.step(closure)


@every
def test_an_exception_is_reported_and_the_next_step_goes_on(name):
    task = problem("mlp")
    optimizer = OPTIMIZERS[name](task.params)
    closure = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    optimizer.step(closure)

    def breaks():
        closure()
        raise KeyboardInterrupt

    optimizer.step(closure)
    steps = getattr(optimizer, "num_steps", None)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(breaks)
    assert optimizer.last_report.outcome is Outcome.INTERRUPTED
    assert optimizer.last_report.num_closure_runs == 1
    assert getattr(optimizer, "num_steps", None) == steps
    optimizer.step(closure)
    assert optimizer.last_report.outcome in (Outcome.STEPPED, Outcome.REJECTED)
