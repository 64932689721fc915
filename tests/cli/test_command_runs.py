"""What the command runs: its outputs, resumption, sweeps, help."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from omegaconf import OmegaConf
from quick_runs import QUICK


def only_output(folder: Path) -> Path:
    (path,) = folder.glob("outputs/*/*")
    return path


def test_a_run_leaves_its_outputs_prints_no_warning_and_ends_with_a_table(hvpopt, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, out, err = hvpopt(*QUICK)
    assert (code, err) == (0, "")
    folder = only_output(tmp_path)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        ".hydra/config.yaml",
        "hvpopt.log",
        "summary.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    } <= names
    assert any(name.startswith("tensorboard/events.out") for name in names)
    config = (folder / "config.yaml").read_text()
    assert "${" not in config
    assert OmegaConf.load(folder / "config.yaml").output_dir == str(folder)
    table = out.strip().splitlines()
    assert [line.split("  ")[0] for line in table] == [
        "optimizer",
        "test loss",
        "test accuracy",
        "seconds",
        "steps",
        "products",
        "outputs",
        "curves",
    ]
    assert table[4].split() == ["steps", "2"]
    assert table[-1].endswith(f"tensorboard --logdir {folder / 'tensorboard'}")
    log = (folder / "hvpopt.log").read_text()
    assert all(line in log for line in table)
    assert "`Trainer.fit` stopped" in log  # Lightning's messages are in the job log


def test_a_run_resumes_from_a_checkpoint(hvpopt, tmp_path):
    hvpopt(*QUICK, "hydra.run.dir=first", "model=cnn")
    hvpopt(*QUICK, "hydra.run.dir=whole", "model=cnn", "trainer.max_epochs=2")
    code, out, err = hvpopt(
        *QUICK,
        "hydra.run.dir=rest",
        "model=cnn",
        "trainer.max_epochs=2",
        "ckpt_path=first/checkpoints/last.ckpt",
    )
    assert (code, err) == (0, "")
    assert "Resuming from first/checkpoints/last.ckpt" in out
    whole, rest = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "rest")
    )
    assert all(torch.equal(whole[key], rest[key]) for key in whole)

    code, _, err = hvpopt(*QUICK, "model=cnn", "ckpt_path=first/checkpoints/last.ckpt")
    assert code == 1
    assert "set trainer.max_epochs to more than 1" in err


def test_a_sweep_runs_every_combination_and_ends_with_a_table(hvpopt, tmp_path):
    overrides = [text for text in QUICK if not text.startswith("optimizer=")]
    code, out, err = hvpopt(
        *overrides, "optimizer=adamw,sgd", "-m", "seed=1,2", "hydra.sweep.dir=sweep"
    )
    assert (code, err) == (0, "")
    table = out[out.rindex("\nrun ") :].strip().splitlines()
    assert len(table) == 1 + 4
    for line, (optimizer, seed) in zip(
        table[1:], [("adamw", 1), ("adamw", 2), ("sgd", 1), ("sgd", 2)], strict=True
    ):
        assert f"optimizer={optimizer}" in line
        assert f"seed={seed}" in line
    assert re.search(r"test/accuracy +seconds +outputs$", table[0])
    assert (tmp_path / "sweep" / "3" / "config.yaml").is_file()


def test_version(hvpopt):
    code, out, _ = hvpopt("--version")
    assert code == 0
    assert re.fullmatch(r"hvpopt \d+\.\d+.*\n", out)


def test_info_works_as_in_hydra(hvpopt):
    code, out, _ = hvpopt("--info", "defaults", "experiment=digits_adamw")
    assert code == 0
    assert "optimizer/adamw" in out


def test_help_is_our_own(hvpopt):
    code, out, _ = hvpopt("--help")
    assert code == 0
    for part in (
        "usage: hvpopt",
        "optimizer: adahessian, adamw, handover, lbfgs, newton_cg, nys_newton_cg, sgd, smd",
        "experiment: autoencoder_adamw",
        "hvpopt -m optimizer=newton_cg,smd,adamw,lbfgs seed=1,2,3",
        "max_epochs: ",
    ):
        assert part in out


def test_a_process_ends_with_the_sentence_and_exit_code_of_a_mistake(tmp_path):
    arguments = (
        "optimizer=adamw",
        "optimizer.lr=-1",
        "callbacks=none",
        f"hydra.run.dir={tmp_path}",
    )
    result = subprocess.run(
        [sys.executable, "-m", "hvpopt.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.strip() == "hvpopt: optimizer (AdamW): Invalid learning rate: -1"


def test_importing_the_command_imports_no_lightning():
    code = "import hvpopt.cli, sys; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
