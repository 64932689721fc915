"""The denoising experiment: two networks of one size, and its commands at tiny sizes."""

import dataclasses
import functools
import json

import hydra
import pytest
import torch
from hvpopt.experiments.denoising.__main__ import main
from hvpopt.experiments.denoising.networks import NoiseSubtraction
from hvpopt.experiments.denoising.noise_levels import (
    Run,
    answers,
    at_other_noise,
    scaled,
    with_noise,
)
from hydra import compose, initialize_config_module
from idx_files import write_fashion_mnist
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvpopt.cli.targets import check_targets
from hvpopt.lightning.noisy_images import NoisyFashionMNIST
from hvpopt.lightning.phases import Phase
from hvpopt.lightning.spen import SPENModule
from hvpopt.nested import GradientDescent, HeavyBall, Unconstrained
from hvpopt.nested.energies import denoising, feedforward
from hvpopt.nested.losses import EndToEnd, Minimizer

TINY = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=3",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "callbacks.progress_bar=null",
    "data.num_val=10",
    "data.num_test=10",
]
NAMES = ["denoising_energy", "denoising_feedforward"]


def energy_of(name):
    with initialize_config_module("hvpopt.conf", job_name="test", version_base="1.3"):
        config = compose("config", [f"experiment={name}", "output_dir=."])
    resolved = OmegaConf.to_container(config, resolve=True)
    check_targets(resolved)
    return hydra.utils.instantiate(resolved["model"]["energy"], _convert_="all")


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_both_experiments_have_as_many_parameters():
    energy, feedforward = (energy_of(name) for name in NAMES)
    assert num_parameters(energy) == num_parameters(feedforward) == 6849


def test_with_one_set_of_weights_the_network_subtracts_what_the_energy_sums():
    torch.manual_seed(0)
    net = NoiseSubtraction(activation="tanh")
    prior = denoising(widths=[16, 16], activation="tanh").head.prior
    weights = {name.replace("net.", "noise."): p for name, p in prior.state_dict().items()}
    net.load_state_dict(weights | {"noise.4.bias": torch.zeros(1)})
    x = torch.rand(2, 1, 7, 6)
    torch.testing.assert_close((x - net(x)).sum((1, 2, 3)), prior(x))


def test_the_gain_multiplies_the_first_convolution_at_the_start():
    priors = []
    for gain in (1.0, 5.0):
        torch.manual_seed(0)
        priors.append(denoising(widths=[3, 4], gain=gain).head.prior.state_dict())
    plain, scaled = priors
    torch.testing.assert_close(scaled.pop("net.0.weight"), 5 * plain.pop("net.0.weight"))
    assert all(torch.equal(scaled[name], plain[name]) for name in plain)
    with pytest.raises(ValueError, match="gain=0 is out of range"):
        denoising(gain=0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kernel_size": 4}, "kernel_size=4 is even"),
        ({"last_kernel_size": 0}, "last_kernel_size=0 is out of range"),
        ({"last_kernel_size": 2}, "last_kernel_size=2 is even"),
        ({"widths": [3, 0]}, "a layer's channels=0 is out of range"),
        ({"num_channels": 0}, "num_channels=0 is out of range"),
        ({"activation": "sotfplus"}, "Did you mean 'softplus'"),
    ],
)
def test_networks_out_of_range_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        NoiseSubtraction(**arguments)


def run_of(name, hvpopt, tmp_path, *overrides):
    """The folder of an experiment's command, run at tiny sizes."""
    (tmp_path / "images").mkdir(exist_ok=True)
    write_fashion_mnist(tmp_path / "images")
    folder = tmp_path / name
    code, out, err = hvpopt(
        f"experiment={name}",
        f"hydra.run.dir={folder}",
        f"data.root={tmp_path / 'images'}",
        *TINY,
        *overrides,
    )
    assert (code, err) == (0, "")
    assert "test psnr noisy" in out
    return folder


def test_the_commands_train_and_their_runs_answer_at_other_noise(hvpopt, tmp_path, capsys):
    folders = [run_of(name, hvpopt, tmp_path) for name in NAMES]
    found = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert [results["steps"] for results in found] == [3, 3]
    assert found[0]["test/psnr_noisy"] == found[1]["test/psnr_noisy"]
    for folder in folders:
        written = EventAccumulator(str(folder / "tensorboard"), {"images": 0}).Reload()
        assert len(written.Images("val/denoising")) == 1

    main([*map(str, folders), "--json", str(tmp_path / "found.json")])
    rows = {
        row["what"]: row["psnr"]
        for row in json.loads((tmp_path / "found.json").read_text())["rows"]
    }
    energy, feedforward = NAMES
    assert list(rows) == [
        "noisy",
        energy,
        f"{energy}, fidelity for the noise",
        feedforward,
        f"{feedforward}, images scaled",
    ]
    assert rows[f"{feedforward}, images scaled"]["0.2"] == rows[feedforward]["0.2"]
    for results, name in zip(found, NAMES, strict=True):
        assert rows[name]["0.2"] == pytest.approx(results["test/psnr"], abs=1e-4)
    assert rows["noisy"]["0.2"] == pytest.approx(found[0]["test/psnr_noisy"], abs=1e-4)
    assert sorted(rows["noisy"].values(), reverse=True) == list(rows["noisy"].values())
    table = capsys.readouterr().out.splitlines()
    assert [float(s) for s in table[0].split("σ =")[1:]] == [0.1, 0.15, 0.2, 0.3, 0.4]
    assert [float(number) for number in table[1].split()[1:]] == pytest.approx(
        list(rows["noisy"].values()), abs=0.0051
    )


# --- other noise


def energy_module(num_steps=400, **fidelity):
    torch.manual_seed(0)
    return SPENModule(
        denoising(widths=[3], kernel_size=3, **fidelity),
        functools.partial(torch.optim.Adam, lr=1e-2),
        phases={"all": Phase(EndToEnd(task_loss="squared"))},
        minimizer=Minimizer(
            method=GradientDescent(0.2, num_steps), domain=Unconstrained(), start="initial"
        ),
    ).double()


def test_the_fidelity_for_other_noise_is_that_of_its_variance():
    module, x = energy_module(fidelity=2.0), torch.rand(3, 1, 5, 5, dtype=torch.float64)
    adapted = at_other_noise(module, 0.5)
    y = adapted(x).detach().requires_grad_()
    # four times the weight of the distance, and the same prior
    energy = 8.0 * (y - x).square().sum() + module.energy.head.prior(y).sum()
    (slope,) = torch.autograd.grad(energy, y)
    assert slope.abs().max() < 1e-5
    assert float(torch.nn.functional.softplus(module.energy.head.raw_fidelity.detach())) == (
        pytest.approx(2.0)
    )  # the module itself is as it was
    assert module.minimizer.method.line_search is None


def test_stronger_noise_takes_as_many_steps_more_as_its_fidelity_is_smaller():
    module = energy_module(num_steps=5)
    found = {r: at_other_noise(module, r).minimizer.method.num_steps for r in (0.5, 1.0, 1.5, 2.0)}
    assert found == {0.5: 5, 1.0: 5, 1.5: 12, 2.0: 20}


def test_images_are_scaled_to_the_noise_that_a_network_knows_and_back():
    module = energy_module(num_steps=2)
    x = torch.rand(2, 1, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(scaled(module, 2.0)(x), 2 * module(x / 2))


def test_the_test_images_have_the_same_noise_of_another_strength(tmp_path):
    data = NoisyFashionMNIST(root=write_fashion_mnist(tmp_path), noise=0.3, num_val=10, num_test=10)
    ((noisy, clean),) = data.test_dataloader()
    ((weaker, same),) = with_noise(data, 0.5)
    assert torch.equal(same, clean)
    torch.testing.assert_close(2 * (weaker - clean), noisy - clean, atol=1e-6, rtol=0)


def test_what_has_no_fidelity_or_no_line_search_is_refused():
    module = energy_module()
    module.minimizer = dataclasses.replace(module.minimizer, method=HeavyBall())
    with pytest.raises(TypeError, match=r"HeavyBall.* has no line search"):
        at_other_noise(module, 2.0)
    module.energy = feedforward(torch.nn.Identity())
    with pytest.raises(TypeError, match="GuessDistance has no fidelity"):
        at_other_noise(module, 2.0)


def test_a_folder_without_a_run_and_runs_of_different_noise_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "holds no config.yaml; expected the folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--json", str(tmp_path / "none" / "found.json")])
    assert "there is no folder" in capsys.readouterr().err
    write_fashion_mnist(tmp_path)
    runs = [
        Run(f"run {noise}", energy_module(), NoisyFashionMNIST(root=tmp_path, noise=noise))
        for noise in (0.1, 0.2)
    ]
    with pytest.raises(ValueError, match=r"run 0\.2 was trained with noise=0\.2, run 0\.1 with"):
        answers(runs)
