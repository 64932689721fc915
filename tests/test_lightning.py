"""An ordinary LightningModule, unchanged, under automatic optimization."""

import lightning as L
import pytest
import torch
from fits import Ordinary, fit, world
from problems import flat, problem
from torch import nn

import hvpopt
from hvpopt.preconditioners import Kronecker, Nystrom

pytestmark = [
    # the data are in memory, and workers would only cost time
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
]


def frozen(optimizer):
    """Keeps an optimizer's step from moving anything, so that its world can be compared."""
    optimizer.register_step_pre_hook(lambda o, a, k: o.held.extend(_data(o)))
    optimizer.register_step_post_hook(lambda o, a, k: _restore(o))
    optimizer.held = []
    return optimizer


def _data(optimizer):
    return [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]


def _restore(optimizer):
    with torch.no_grad():
        for p, held in zip(
            (p for g in optimizer.param_groups for p in g["params"]), optimizer.held, strict=True
        ):
            p.copy_(held)
    optimizer.held.clear()


OPTIMIZERS = {
    "newton_cg": lambda p: hvpopt.NewtonCG(p),
    "newton_cg hessian": lambda p: hvpopt.NewtonCG(p, curvature="hessian", max_cg_steps=5),
    "newton_cg dual": lambda p: hvpopt.NewtonCG(p, engine="dual", max_cg_steps=3),
    "newton_cg kronecker": lambda p: hvpopt.NewtonCG(p, preconditioner=Kronecker(), max_cg_steps=5),
    "newton_cg nystrom": lambda p: hvpopt.NewtonCG(p, preconditioner=Nystrom(rank=4)),
    "trust_region": lambda p: hvpopt.TrustRegionNewtonCG(p, max_cg_steps=5),
    "sophia_h": lambda p: hvpopt.SophiaH(p, update_every=3),
    "sophia_g": lambda p: hvpopt.SophiaG(p, update_every=3),
    "adahessian": lambda p: hvpopt.AdaHessian(p),
    "smd": lambda p: hvpopt.SMD(p),
    "smd unguarded": lambda p: hvpopt.SMD(p, overshoot_guard=False),
    "smd hessian": lambda p: hvpopt.SMD(p, curvature="hessian", overshoot_guard=False),
}


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 4}], ids=["plain", "4 batches"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fit_leaves_the_world_as_sgd_with_the_same_update_does(name, options, tmp_path):
    theirs = world(*fit(lambda p: frozen(torch.optim.SGD(p, 0.1)), tmp_path / "sgd", **options))
    ours = world(*fit(lambda p: frozen(OPTIMIZERS[name](p)), tmp_path / "ours", **options))
    zero_grads = ours["hooks"][1].pop("zero_grad"), theirs["hooks"][1].pop("zero_grad")
    assert zero_grads[0] == zero_grads[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours["calls"] == 8
    assert ours["by_hand"] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 4}], ids=["plain", "4 batches"]
)
def test_smd_without_meta_learning_trains_like_sgd(options, tmp_path):
    theirs, *_ = fit(lambda p: torch.optim.SGD(p, 0.1), tmp_path / "sgd", **options)
    ours, *_ = fit(
        lambda p: hvpopt.SMD(p, 0.1, mu=0, overshoot_guard=False), tmp_path / "smd", **options
    )
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 4}],
    ids=str,
)
@pytest.mark.parametrize("name", ["newton_cg", "smd"])
def test_smoke_the_loss_falls_under_lightnings_options(name, options, tmp_path):
    net, *_ = fit(OPTIMIZERS[name], tmp_path, epochs=20, **options)
    assert sum(net.outputs[-4:]) < sum(net.outputs[:4])


@pytest.mark.parametrize("name", ["newton_cg", "smd"])
def test_a_closure_that_never_comes_is_explained(name):
    optimizer = OPTIMIZERS[name]([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=r"'16-mixed'.*use 'bf16-mixed'"):
        optimizer.step()


class Skips(Ordinary):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_training_step_that_returns_none_skips_its_batch(tmp_path):
    net, trainer, _ = fit(OPTIMIZERS["newton_cg"], tmp_path, module=Skips)
    assert net.num_calls == 6
    assert trainer.optimizers[0].num_steps == 8


@pytest.mark.parametrize("name", ["newton_cg", "smd"])
def test_manual_optimization_steps_with_a_closure_as_automatic_does(tmp_path, name):
    class Manual(Ordinary):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                loss = super(Manual, self).training_step(batch, batch_idx)["loss"]
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    manual = fit(OPTIMIZERS[name], tmp_path / "manual", module=Manual)
    expected = fit(OPTIMIZERS[name], tmp_path / "automatic")
    assert manual[0].num_calls == expected[0].num_calls == 8
    for ours, theirs in zip(manual[0].parameters(), expected[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", [hvpopt.NewtonCG, hvpopt.SMD])
def test_fabric_steps_as_plain_torch_does(make):
    results = []
    for fabric in (None, L.Fabric(accelerator="cpu", devices=1)):
        task = problem("mlp")
        net, optimizer = task.net, make(task.params)
        if fabric is not None:
            net, optimizer = fabric.setup(net, optimizer)
        backward = torch.Tensor.backward if fabric is None else fabric.backward

        def closure(net=net, optimizer=optimizer, backward=backward, task=task):
            optimizer.zero_grad()
            loss = task.loss(net(task.x))
            backward(loss)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        results.append(flat(task.params))
    assert torch.equal(*results)
