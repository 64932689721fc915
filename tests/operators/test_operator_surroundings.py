"""An operator leaves no trace in the world, and sees the same function at each pass."""

import copy
import gc
import random
import weakref

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import quiet_trainer
from operator_cases import close, cross_entropy_of, ragged, ten_examples
from problems import flat, problem
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hvpopt.operators import (
    GGNOperator,
    HessianOperator,
    NonDeterministicError,
)


@pytest.fixture
def data():
    return ten_examples()


@pytest.mark.parametrize("name", ["batchnorm", "dropout", "lstm"])
def test_an_operator_leaves_no_trace(name):
    task = problem(name)
    y = torch.arange(len(task.x)) % 3
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(TensorDataset(task.x, y), batch_size=4, shuffle=True, generator=generator)
    for p in task.params:
        p.grad = torch.ones_like(p)
    held = [p.grad for p in task.params]
    state = copy.deepcopy(task.net.state_dict())
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)

    def draws():
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    before, expected = generator.get_state(), (draws(), draws())
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    assert draws() == expected[0]
    op = GGNOperator(lambda b: F.cross_entropy(task.net(b[0]), b[1]), task.params, loader)
    op @ task.tangent()
    op.matmat([torch.stack([x, x]) for x in task.tangent()])
    op.loss(), op.gradient(), op.check_deterministic()
    assert draws() == expected[1]
    assert torch.equal(generator.get_state(), before)
    assert all(
        p.grad is g and torch.equal(g, torch.ones_like(g))
        for p, g in zip(task.params, held, strict=True)
    )
    for key, value in task.net.state_dict().items():
        assert torch.equal(value, state[key])


def test_the_world_is_the_same_after_an_error():
    task = problem("batchnorm")
    state = copy.deepcopy(task.net.state_dict())

    def loss(x):
        value = task.loss(task.net(x))
        if len(x) == 2:
            raise KeyError("broken")
        return value

    op = HessianOperator(loss, task.params, [task.x, task.x[:2]], retain_graphs=True)
    random_state = torch.get_rng_state()
    with pytest.raises(KeyError, match="broken"):
        op.loss()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in task.params)
    for key, value in task.net.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_shuffling_loader_yields_the_same_batches_in_each_pass():
    task = problem("batchnorm")
    y = torch.arange(6) % 3
    seen = []

    def loss(batch):
        seen.append(batch[1].tolist())
        return F.cross_entropy(task.net(batch[0]), batch[1])

    loader = DataLoader(TensorDataset(task.x, y), batch_size=3, shuffle=True)
    op = HessianOperator(loss, task.params, loader)
    first, second = op.loss(), op.loss()
    assert seen[:2] == seen[2:4]
    assert torch.equal(first, second)


def test_dropout_masks_are_fixed_and_differ_between_batches():
    masks = []
    w = nn.Parameter(torch.ones(64))

    def loss(x):
        masks.append(F.dropout(torch.ones(64)))
        return F.mse_loss(w * masks[-1], x)

    op = HessianOperator(loss, [w], [torch.zeros(64)] * 2)
    op.loss()
    torch.rand(3)
    op.gradient()
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])


def test_a_loss_that_changes_is_found_out():
    w, generator = nn.Parameter(torch.ones(3)), torch.Generator()

    def loss(x):
        return F.mse_loss(w * torch.rand(3, generator=generator), x)

    with pytest.raises(NonDeterministicError, match=r"gave losses that differ by .* generators"):
        HessianOperator(loss, [w], [torch.zeros(3)]).check_deterministic()
    HessianOperator(lambda x: F.mse_loss(w**2, x), [w], [torch.zeros(3)]).check_deterministic()


def test_graphs_go_with_the_operator(data):
    net = problem("mlp").net
    held = []

    def loss(batch):
        z = net(batch[0])
        held.append(weakref.ref(z))
        return F.cross_entropy(z, batch[1])

    gc.collect()
    gc.disable()
    try:
        with HessianOperator(loss, net.parameters(), [data], engine="graph") as op:
            op @ problem("mlp").tangent()
        op @ problem("mlp").tangent()
        del op
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


def test_progress_shows_the_batches(data, capsys):
    net = problem("mlp").net
    loss = cross_entropy_of(net)
    HessianOperator(loss, net.parameters(), ragged(data)).loss()
    assert capsys.readouterr().err == ""
    HessianOperator(loss, net.parameters(), ragged(data), progress=True).matvec(
        problem("mlp").tangent()
    )
    assert "hessian products:" in capsys.readouterr().err


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = problem("batchnorm").net

    def training_step(self, batch, batch_idx):
        value = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", value, on_epoch=True)
        return {"loss": value}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_epoch_end(self):
        x = problem("batchnorm").x
        before = dict(self.trainer.callback_metrics), torch.get_rng_state()
        self.operator = GGNOperator(
            lambda b: self.training_step(b, 0), self.parameters(), [(x, torch.arange(6) % 3)]
        )
        self.product = flat(self.operator @ problem("batchnorm").tangent())
        assert self.trainer.callback_metrics == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])


def test_a_training_step_is_a_loss_in_its_own_scale(tmp_path):
    task, module = problem("batchnorm"), Classifier()
    trainer = quiet_trainer(
        1,
        accumulate_grad_batches=2,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        logger=False,
    )
    rows = TensorDataset(task.x, torch.arange(6) % 3)
    trainer.fit(module, DataLoader(rows, batch_size=3, num_workers=0))
    task.net.load_state_dict(module.net.state_dict())
    dense = task.dense_ggn()
    close(module.product, dense @ flat(task.tangent()))
    close(flat(module.operator @ task.tangent()), dense @ flat(task.tangent()))
