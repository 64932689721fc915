"""Every optimizer in a Lightning run that is cut off, resumed, and given parameters on the way."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hvpopt
from hvpopt.lightning.resume import RandomState
from hvpopt.preconditioners import EmpiricalFisherDiagonal, Jacobi, Nystrom
from hvpopt.solvers.stopping import EisenstatWalker

OPTIMIZERS = {
    "newton_cg": lambda p: hvpopt.NewtonCG(p),
    "newton_cg warm": lambda p: hvpopt.NewtonCG(p, preconditioner=None, weight_decay=0.01),
    "newton_cg nystrom": lambda p: hvpopt.NewtonCG(p, preconditioner=Nystrom(rank=3, every=4)),
    "newton_cg fisher": lambda p: hvpopt.NewtonCG(
        p, preconditioner=EmpiricalFisherDiagonal(every=3), warm_start=0.95
    ),
    "newton_cg debiased": lambda p: hvpopt.NewtonCG(p, curvature_fraction=0.5, debiased=True),
    "newton_cg forcing": lambda p: hvpopt.NewtonCG(
        p,
        curvature="hessian",
        cg_stop=EisenstatWalker(),
        weight_decay=0.1,
        decoupled_weight_decay=True,
    ),
    "nys_newton_cg": lambda p: hvpopt.NysNewtonCG(p, rank=3, every=3, max_cg_steps=10),
    "trust_region": lambda p: hvpopt.TrustRegionNewtonCG(p),
    "trust_region jacobi": lambda p: hvpopt.TrustRegionNewtonCG(
        p, preconditioner=Jacobi(num_probes=2, every=3)
    ),
    "smd": lambda p: hvpopt.SMD(p),
    "smd group": lambda p: hvpopt.SMD(p, gain="group", overshoot_guard=False),
    "sophia_h": lambda p: hvpopt.SophiaH(p, lr=0.01, update_every=3),
    "sophia_g": lambda p: hvpopt.SophiaG(p, lr=0.01, update_every=3),
    "adahessian": lambda p: hvpopt.AdaHessian(p, update_every=3),
    "handover": lambda p: hvpopt.Handover(
        p,
        [
            hvpopt.Stage(torch.optim.Adam, steps=1, lr=0.01),
            hvpopt.Stage(hvpopt.SophiaH, steps=2, update_every=2),
            hvpopt.Stage(hvpopt.NewtonCG, preconditioner=Nystrom(rank=3, every=3)),
        ],
    ),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Net(L.LightningModule):
    """With dropout, batch norm, and a learning rate that falls."""

    def __init__(self, make_optimizer):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(8, 3)
        self.make_optimizer = make_optimizer

    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.head(self.body(x)), y)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(p for p in self.parameters() if p.requires_grad)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def fit(folder, make_optimizer, num_epochs, *, resume=None, callbacks=()):
    L.seed_everything(1, verbose=False)
    x = torch.randn(20, 6)
    rows = TensorDataset(x, x[:, :3].argmax(1))
    data = DataLoader(rows, batch_size=10, generator=torch.Generator())  # draws nothing of ours
    net = Net(make_optimizer)
    checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = L.Trainer(
        max_epochs=num_epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[checkpoints, RandomState(), *callbacks],
    )  # fmt: skip
    if resume is not None:
        torch.manual_seed(99)  # what the resumed run draws must come from the checkpoint
    trainer.fit(net, data, ckpt_path=resume, weights_only=None if resume is None else True)
    return net, trainer.optimizers[0]


@every
def test_a_resumed_run_goes_on_bit_for_bit(name, tmp_path):
    whole, optimizer = fit(tmp_path / "whole", OPTIMIZERS[name], 4)
    again, resumed = fit(
        tmp_path / "again", OPTIMIZERS[name], 4, resume=tmp_path / "whole" / "epoch=1.ckpt"
    )
    for (key, value), other in zip(
        whole.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key
    assert repr(plain(optimizer.state_dict())) == repr(plain(resumed.state_dict()))


def plain(state):
    """Nested containers with numbers in the place of tensors, to all digits."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


class Unfreezes(BaseFinetuning):
    """Trains the head alone, and all from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, initial_denom_lr=2.0)


@every
def test_parameters_that_come_later_are_trained(name, tmp_path):
    net, optimizer = fit(tmp_path, OPTIMIZERS[name], 4, callbacks=[Unfreezes()])
    L.seed_everything(1, verbose=False)
    torch.randn(20, 6)
    first = Net(OPTIMIZERS[name])
    assert len(optimizer.param_groups) == 2
    moved = [
        not torch.equal(p, q) for p, q in zip(net.parameters(), first.parameters(), strict=True)
    ]
    assert all(moved)
    assert all(p.isfinite().all() for p in net.parameters())
    assert optimizer.param_groups[1]["lr"] < optimizer.param_groups[0]["lr"]
    if "damping" in optimizer.param_groups[0]:
        assert all(isinstance(group["damping"], float) for group in optimizer.param_groups)
