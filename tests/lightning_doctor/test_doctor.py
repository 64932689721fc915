"""The doctor's findings about a module and its loss, and that it only looks."""

import copy
import random

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doctor_modules import BATCH, Net, Ordinary, once_differentiable_part, without_jvp
from torch import nn

import hvpopt
from hvpopt.lightning.doctor import doctor


def examined(module, **options):
    return doctor(module, BATCH, seconds=0.0, **options)


def test_a_smooth_network_is_served_by_every_engine_and_agrees_with_differences():
    report = examined(Net())
    assert report.can_train
    assert all(e.is_supported for e in report.engines)
    assert {(e.engine, e.curvature) for e in report.engines} == {
        ("graph", "hessian"),
        ("dual", "hessian"),
        ("finite_difference", "hessian"),
        ("graph", "ggn"),
        ("dual", "ggn"),
    }
    assert report.engine("graph", "hessian").error < 1e-7
    assert report.engine("dual", "hessian").error < 1e-7
    assert report.engine("dual", "ggn").error < 1e-12
    assert report.difference_error < 1e-5
    assert report.finding("products, hessian").verdict == "ok"
    assert report.finding("GGN split").text == "found at F.cross_entropy of outputs (6, 4)"
    assert report.finding("likelihood").verdict == "ok"
    assert report.finding("engine='auto', ggn").text == "graph (best for many products)"
    assert report.finding("determinism").text == "two runs from one random state agree exactly"
    assert report.finding("randomness").verdict == "ok"
    assert (report.num_params, report.dtypes, report.device) == (124, ("float64",), "cpu")


def test_the_loss_and_its_gradient_are_the_batchs():
    module = Net()
    loss = module.training_step(BATCH)
    grads = torch.autograd.grad(loss, list(module.parameters()))
    report = examined(module)
    assert report.loss == pytest.approx(loss.item(), rel=1e-12)
    norm = torch.cat([g.flatten() for g in grads]).norm().item()
    assert report.grad_norm == pytest.approx(norm, rel=1e-12)


def test_costs_are_measured_in_gradients():
    report = examined(Net())
    assert report.gradient_seconds > 0
    assert report.gradient_bytes > 0
    for engine in report.engines:
        assert engine.first_cost > 0
        assert engine.further_cost > 0
        assert engine.memory > 0


def snapshot(module):
    numpy_state = np.random.get_state()
    return {
        "params": [p.detach().clone() for p in module.parameters()],
        "pointers": [p.data_ptr() for p in module.parameters()],
        "grads": [p.grad for p in module.parameters()],
        "grad values": [p.grad.clone() for p in module.parameters() if p.grad is not None],
        "buffers": [b.clone() for b in module.buffers()],
        "buffer pointers": [b.data_ptr() for b in module.buffers()],
        "metric": copy.deepcopy(module.accuracy.metric_state),
        "updates": module.accuracy._update_count,
        "modes": [m.training for m in module.modules()],
        "outputs": list(module.outputs),
        "calls": module.num_calls,
        "torch": torch.get_rng_state(),
        "numpy": (numpy_state[0], numpy_state[1].tolist(), numpy_state[2]),
        "python": random.getstate(),
        "names": sorted(vars(module)),
    }


@pytest.mark.parametrize("is_given", [False, True], ids=["its own trainer", "a trainer given"])
def test_it_leaves_no_trace(is_given):
    module = Ordinary(lambda p: hvpopt.NewtonCG(p))
    module.eval()
    for p in list(module.parameters())[:2]:
        p.grad = torch.ones_like(p)
    before = snapshot(module)
    trainer = None
    if is_given:
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, precision="64-true"
        )
        held = dict(vars(trainer.strategy))
    report = examined(module, trainer=trainer)
    assert report.can_train, str(report)
    after = snapshot(module)
    for a, b in zip(before.pop("grads"), after.pop("grads"), strict=True):
        assert a is b
    assert module._trainer is None
    for name in ("names", "numpy"):
        assert after.pop(name) == before.pop(name)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    if trainer is not None:
        assert report.dtypes == ("float64",)
        assert vars(trainer.strategy) == held
        assert not trainer.training


def test_an_optimizer_that_is_given_is_not_stepped():
    net = nn.Linear(10, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    weights = net.weight.detach().clone()
    report = examined(net, loss=lambda b: F.cross_entropy(net(b[0]), b[1]), optimizer=optimizer)
    assert report.finding("one step").text.startswith("Adam moved the parameters by 0.6")
    assert torch.equal(net.weight, weights)
    assert not optimizer.state


def test_a_step_of_a_second_order_optimizer_says_what_it_cost():
    report = examined(Net(make_optimizer=hvpopt.NewtonCG))
    found = report.finding("one step")
    assert found.verdict == "ok"
    assert "products by engine graph (best for many products)" in found.text
    assert report.optimizer == "NewtonCG"


def test_an_operation_without_forward_mode_is_named_with_its_module_and_remedy():
    report = examined(Net(without_jvp(), make_optimizer=hvpopt.NewtonCG))
    assert report.can_train
    dual = report.engine("dual", "hessian")
    assert not dual.is_supported
    assert dual.reason == "no jvp of the custom autograd Function _NoJvp in module 'net.1' (Part)"
    assert "Choose engine='graph'" in dual.remedy
    assert "dual, hessian: Module 'net.1' (Part)" in str(report)
    assert report.engine("graph", "hessian").is_supported
    assert report.finding("engine='auto', hessian").text.startswith("graph")


def test_an_operation_without_double_backward_moves_the_automatic_choice():
    report = examined(Net(once_differentiable_part()))
    graph = report.engine("graph", "hessian")
    assert not graph.is_supported
    assert "once_differentiable in module 'net.1' (Part)" in graph.reason
    assert report.finding("engine='auto', hessian").text.startswith("dual (graph failed:")


def test_a_split_that_is_not_found_prevents_a_ggn_and_not_a_hessian():
    def by_hand(z, y):
        return (z - F.one_hot(y, 4)).square().mean()

    report = examined(Net(make_optimizer=hvpopt.NewtonCG, loss=by_hand))
    assert not report.can_train
    assert report.finding("GGN split").verdict == "warning"
    assert "Compute the loss by one of them" in report.finding("GGN split").remedy
    assert [f.subject for f in report.failures] == ["one step"]
    assert "NewtonCG raised SplitNotFoundError" in report.finding("one step").text
    text = " ".join(str(report).split())
    assert "It cannot train: see one step." in text
    assert text.count("Compute the loss by one of them") == 1
    assert "dual, ggn: see graph, ggn" in text
    hessian = examined(
        Net(make_optimizer=lambda p: hvpopt.NewtonCG(p, curvature="hessian"), loss=by_hand)
    )
    assert hessian.can_train


def test_a_penalty_beside_the_loss_function_is_seen():
    module = Net()
    module.loss = lambda z, y: F.cross_entropy(z, y) + 0.1 * module.net[0].weight.square().sum()
    report = examined(module)
    assert "what bypasses it" in report.finding("GGN split").text
    assert not report.engine("dual", "ggn").is_supported
    assert "choose engine='graph'" in report.engine("dual", "ggn").remedy


def test_random_losses_are_told_from_losses_that_change_by_themselves():
    report = examined(Ordinary())
    assert report.finding("determinism").verdict == "ok"
    assert report.finding("randomness").verdict == "note"

    counter = iter(range(10**6))
    module = Net(loss=lambda z, y: F.cross_entropy(z, y) * (1 + 0.1 * next(counter)))
    changing = examined(module)
    assert changing.finding("determinism").verdict == "warning"
    assert "the loss changes from call to call" in changing.finding("determinism").text


def test_a_derivative_that_is_hidden_from_autograd_is_found_by_differences():
    class Hidden(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

        def training_step(self, batch):
            return (self.w**2).sum() + (self.w * self.w.detach() ** 2).sum()

    report = examined(Hidden())  # g = 2 w + w², of which autograd takes w² for a constant
    found = report.finding("products, hessian")
    assert found.verdict == "warning"
    assert "differ from differences of gradients by" in found.text


def test_kinks_make_no_false_alarm():
    report = examined(Net(nn.Hardtanh(-1e-3, 1e-3)))
    assert report.finding("products, hessian").verdict in ("ok", "note")


def test_frozen_parameters_are_left_out():
    module = Net()
    module.net[0].requires_grad_(False)
    assert examined(module).num_params == 36


def test_the_table_names_everything_that_was_looked_at():
    report = examined(Ordinary(lambda p: hvpopt.SMD(p)))
    text = str(report)
    assert text.startswith("Ordinary with SMD: 276 trained parameters, float32, on cpu\n")
    for finding in report.findings:
        assert finding.subject in text
    assert text.endswith("It can train.")
    assert all(len(line) <= 100 for line in text.splitlines())
    with pytest.raises(KeyError, match="There is no finding of 'nothing'"):
        report.finding("nothing")
    with pytest.raises(KeyError, match="'graph' was not examined for the 'fisher'"):
        report.engine("graph", "fisher")
