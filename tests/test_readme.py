"""The commands that the READMEs promise."""

import re
import shlex
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import hvpopt
from hvpopt.cli.preflight import checked_arguments

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *sorted((ROOT / "experiments").rglob("README.md"))]


def commands():
    for readme in READMES:
        fenced = False
        for line in readme.read_text().splitlines():
            fenced ^= line.startswith("```")
            is_code = fenced or line.startswith("    ")
            line = line.strip().partition("  #")[0]
            if is_code and line.startswith("hvpopt "):
                yield pytest.param(line, id=f"{readme.parent.name}: {line}")


@pytest.mark.parametrize("command", list(commands()))
def test_a_documented_command_passes_all_checks_before_the_run(command, tmp_path):
    (tmp_path / "last.ckpt").touch()
    command = command.replace("RUN/checkpoints/last.ckpt", str(tmp_path / "last.ckpt"))
    arguments = [a for a in shlex.split(command)[1:] if a != "--help"]
    assert len(checked_arguments(arguments)) == len(arguments)


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.parent.name)
def test_links_lead_somewhere(readme):
    links = re.findall(r"\]\(([^)#]+)\)", readme.read_text())
    assert [link for link in links if not (readme.parent / link).exists()] == []


def test_nothing_is_left_to_fill_in():
    assert [str(p) for p in READMES if "FILL" in p.read_text()] == []


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_newcomers_example_trains():
    text = (ROOT / "README.md").read_text()
    example = text.partition("class Net(lightning.LightningModule):")[2].partition("```")[0]
    namespace = {"lightning": lightning, "F": F, "hvpopt": hvpopt}
    exec("class Net(lightning.LightningModule):" + example, namespace)

    class Net(namespace["Net"]):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    net = Net()
    with torch.no_grad():
        before = float(F.cross_entropy(net(x), y))
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, DataLoader(TensorDataset(x, y), batch_size=20))
    with torch.no_grad():
        assert float(F.cross_entropy(net(x), y)) < before
