"""`hvpopt task=spectrum` and `hvpopt task=compare`: from runs' folders to reports."""

import pickle
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from logs import own_logging
from omegaconf import OmegaConf
from spectrum_modules import Points, Regression, report

from hvpopt import cli
from hvpopt.cli.checkpoints import short_names
from hvpopt.lightning.spectrum import Compare, Spectrum, Subject, read_json, write_json
from hvpopt.lightning.spectrum.subjects import load_weights, loader_of

TRAIN = [
    "optimizer=adamw",
    "model=mlp",
    "data.num_train=40",
    "data.batch_size=16",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "callbacks.progress_bar=null",
    "callbacks.curvature_monitor=null",
]
FEW = [
    "task.accelerator=cpu",
    "task.progress=false",
    "task.num_top=2",
    "task.num_bottom=1",
    "task.max_steps=4",
    "task.num_probes=2",
    "task.density_steps=2",
    "task.density_probes=2",
    "task.slice_points=3",
    "task.plane_points=2",
    "hydra.run.dir=out",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs with networks of different widths, in folders a and b."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, own_logging():
        patch.chdir(folder)
        for name, widths in (("a", "[4]"), ("b", "[6,3]")):
            chosen = [*TRAIN, f"model.net.widths={widths}", f"hydra.run.dir={name}"]
            patch.setattr("sys.argv", ["hvpopt", *chosen])
            cli.main()
    return folder


@pytest.fixture
def copied(runs, tmp_path):
    """The runs in the folder that the command runs in."""
    for name in ("a", "b"):
        shutil.copytree(runs / name, tmp_path / name)
    return tmp_path


def test_a_run_is_reported_with_its_own_model_and_data(hvpopt, copied):
    code, out, err = hvpopt("task=spectrum", "ckpt_path=a", *FEW)
    assert (code, err) == (0, "")
    assert f"a/checkpoints/best.ckpt: model and data as in {copied}/a/config.yaml." in out
    table = dict(line.split(maxsplit=1) for line in out.splitlines() if line.strip())
    assert table["checkpoint"] == "a/best"
    assert table["page"] == str(copied / "out" / "spectrum.html")
    assert table["curves"].endswith(f"tensorboard --logdir {copied / 'out' / 'tensorboard'}")
    (found,) = read_json(copied / "out" / "spectrum.json")
    assert found.num_params == 64 * 4 + 4 + 4 * 10 + 10  # the run's widths
    assert found.data == "train data, 3 batches"  # and its batches
    assert (found.step, found.epoch, found.optimizer) == (3, 1, "AdamW")
    assert (copied / "out" / "spectrum.html").read_text().startswith("<!DOCTYPE html>")
    assert list((copied / "out" / "tensorboard").glob("events.*"))


def test_what_is_given_goes_before_the_runs_own(hvpopt, copied):
    code, _, err = hvpopt(
        "task=spectrum",
        "ckpt_path=b/checkpoints/last.ckpt",
        "data.batch_size=8",
        "task.curvature=ggn",
        "logger=none",
        *FEW,
    )
    assert (code, err) == (0, "")
    (found,) = read_json(copied / "out" / "spectrum.json")
    assert found.data == "train data, 5 batches"
    assert (found.name, found.curvature, found.bottom) == ("b/last", "ggn", ())
    assert not (copied / "out" / "tensorboard").exists()


def test_checkpoints_are_compared_with_each_other_and_with_an_earlier_report(hvpopt, copied):
    write_json(copied / "old.json", [report("old")])
    code, out, err = hvpopt("task=compare", "ckpt_path=[a,b,old.json]", *FEW)
    assert (code, err) == (0, "")
    heads = next(line for line in out.splitlines() if line.startswith("checkpoint"))
    assert heads.split() == ["checkpoint", "a/best", "b/best", "old"]
    found = read_json(copied / "out" / "spectrum.json")
    assert [r.name for r in found] == ["a/best", "b/best", "old"]
    assert found[2] == report("old")
    assert found[0].num_params != found[1].num_params


def test_a_loss_that_sums_over_labels_needs_no_options(hvpopt, tmp_path):
    chosen = [x for x in TRAIN if x.startswith(("trainer", "callbacks.progress"))]
    chosen += ["trainer.log_every_n_steps=1", "data.batch_size=16"]
    sizes = ["data.num_train=50", "data.num_val=8", "data.num_test=8"]
    code, _, err = hvpopt("experiment=blocks_mlp", *chosen, *sizes, "hydra.run.dir=mlp")
    assert code == 0, err
    code, out, err = hvpopt("task=spectrum", "ckpt_path=mlp", *FEW)
    assert (code, err) == (0, "")
    (found,) = read_json(tmp_path / "out" / "spectrum.json")
    assert found.weights == "weighed by their examples, over which they are means"
    assert f"losses of the train data, 4 batches are {found.weights}." in out
    assert "4 batches, weighed by their examples" in (tmp_path / "out/spectrum.html").read_text()


MISTAKES = {
    "task=spectrum": "ckpt_path: this task needs a checkpoint, ckpt_path=FILE or a run's folder",
    "task=spectrum ckpt_path=nope": "ckpt_path=nope: there is no such file.",
    "task=spectrum ckpt_path=.": "ckpt_path=. is a folder without checkpoints/best.ckpt or",
    "task=spectrum ckpt_path=a/config.yaml": "a/config.yaml cannot be read as a checkpoint",
    "task=spectrum ckpt_path=a model=cnn": "belongs to another network: net.0.weight is",
    "task=spectrum ckpt_path=a model=mlp model.net.widths=[5]": "net.1.weight is (4, 64) there and",
    "task=spectrum ckpt_path=[a,b]": "reads one checkpoint, and got 2: give one as ckpt_path=FILE",
    "task=compare ckpt_path=a": "task=compare puts several checkpoints side by side, and got 1",
    "task=compare ckpt_path=[a,nope.json]": "ckpt_path=nope.json: there is no such file",
    "task=compare ckpt_path=[a,.hydra.json]": ".hydra.json is no report of task=spectrum",
    "task=spectrum ckpt_path=a task.curvatur=ggn": "Did you mean 'curvature'?",
    "task=spectrum ckpt_path=a task.curvature=gng": "task.curvature='gng' is not accepted",
    "task=spectrum ckpt_path=a task.num_probes=0": "num_probes=0 is out of range",
    "task=spectrum ckpt_path=a task.subjects=[1]": "task.subjects is filled in from ckpt_path",
    "task=spectrum ckpt_path=broken": "config.yaml, the run's configuration, cannot be read",
    "task=spectrum ckpt_path=foreign": "belongs to another network",  # the default one
    "task=spectrum ckpt_path=evil": "task.subjects[0].module.net._target_=os.system is not allowed",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_gets_one_sentence(hvpopt, copied, arguments):
    (copied / ".hydra.json").write_text("{}")
    config = OmegaConf.load(copied / "a" / "config.yaml")
    config.model.net._target_ = "os.system"
    contents = {"broken": "a: [", "foreign": "a: 1", "evil": OmegaConf.to_yaml(config)}
    for name, content in contents.items():
        shutil.copytree(copied / "a" / "checkpoints", copied / name / "checkpoints")
        (copied / name / "config.yaml").write_text(content)
    few = [text for text in FEW if "num_probes" not in text or "num_probes" not in arguments]
    code, out, err = hvpopt(*arguments.split(), *few)
    assert code == 1
    assert MISTAKES[arguments] in err
    assert err.strip().count("\n") == 0
    assert "page" not in out
    if "foreign" in arguments:
        assert "config.yaml is no run's configuration: model and data are this command's" in out


def test_without_a_runs_configuration_the_given_model_is_taken(hvpopt, copied):
    shutil.copy(copied / "a" / "checkpoints" / "best.ckpt", copied / "alone.ckpt")
    arguments = ("model=mlp", "model.net.widths=[4]", "data.num_train=20")
    code, _, err = hvpopt("task=spectrum", "ckpt_path=alone.ckpt", *arguments, *FEW)
    assert (code, err) == (0, "")
    assert read_json(copied / "out" / "spectrum.json")[0].checkpoint == "alone.ckpt"


# --- the parts


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["outputs/x/checkpoints/best.ckpt"], ["x/best"]),
        (["o/x/checkpoints/best.ckpt", "o/y/checkpoints/best.ckpt"], ["x", "y"]),
        (["o/x/checkpoints/best.ckpt", "o/x/checkpoints/last.ckpt"], ["best", "last"]),
        (["x.ckpt", "o/y.ckpt"], ["x", "o/y"]),
    ],
)
def test_names_are_what_tells_the_checkpoints_apart(files, names):
    assert short_names([Path(file) for file in files]) == names


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"text", "cannot be read as a checkpoint .it is damaged, or holds more than weights"),
        (pickle.dumps({"state_dict": Evil()}), "cannot be read as a checkpoint"),
        ([1], "is not a checkpoint of Lightning: it lacks state_dict"),
        ({"state_dict": {"first.weight": torch.zeros(2, 2)}}, "belongs to another network"),
    ],
    ids=["text", "code", "list", "network"],
)
def test_a_file_that_is_no_checkpoint_of_this_network_is_refused(tmp_path, content, match, capsys):
    path = tmp_path / "file.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    module = Regression()
    before = module.first.weight.detach().clone()
    with pytest.raises(ValueError, match=match):
        load_weights(path, module)
    assert torch.equal(module.first.weight, before)
    assert capsys.readouterr().out == ""


def test_weights_alone_are_enough(tmp_path):
    module = Regression()
    state = {name: torch.ones_like(x) for name, x in module.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "weights.ckpt")
    origin = load_weights(tmp_path / "weights.ckpt", module)
    assert (origin.epoch, origin.step, origin.optimizer) == (0, 0, "")
    assert torch.equal(module.first.weight, torch.ones(1, 3, dtype=torch.float64))
    subject = Subject(module, Points(), tmp_path / "weights.ckpt", name="ones")
    options = {"progress": False, "accelerator": "cpu", "num_probes": 2, "output_dir": tmp_path}
    found = Spectrum(subjects=[subject], slice_points=0, plane_points=0, **options)()
    x, y = Points().points
    assert found.loss == pytest.approx((x.sum(1) - y).square().mean().item())
    assert found.name == "ones"


def test_a_module_hears_of_a_trainers_checkpoint_before_its_weights_come(tmp_path):
    class Phased(Regression):
        phase = 0

        def on_load_checkpoint(self, checkpoint):
            assert torch.equal(self.first.weight, Regression().first.weight)
            self.phase = checkpoint["phase"]

    content = {"state_dict": {n: 0 * x for n, x in Regression().state_dict().items()}, "phase": 2}
    torch.save(content, tmp_path / "weights.ckpt")
    torch.save({**content, "pytorch-lightning_version": "2.6"}, tmp_path / "trained.ckpt")
    for name, phase in (("weights", 0), ("trained", 2)):
        module = Phased()
        load_weights(tmp_path / f"{name}.ckpt", module)
        assert module.phase == phase
        assert not module.first.weight.any()


def test_without_matplotlib_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr("hvpopt.lightning.spectrum.figures.find_spec", lambda name: None)
    subject = Subject(Regression(), Points(), tmp_path / "none.ckpt")
    with pytest.raises(RuntimeError, match=r"pip install 'hvpopt\[experiments\]'"):
        Spectrum(subjects=[subject])()


def test_several_loaders_are_refused():
    with pytest.raises(ValueError, match="Points has 2 val loaders, where one is expected"):
        loader_of(Points(), "val")


def test_counts_of_subjects_are_checked(tmp_path):
    with pytest.raises(ValueError, match="reads one checkpoint, and got 0"):
        Spectrum(subjects=[])()
    with pytest.raises(ValueError, match="side by side, and got 0"):
        Compare(subjects=[])()
    write_json(tmp_path / "two.json", [report("one"), report("two")])
    found = Compare(subjects=[str(tmp_path / "two.json")], output_dir=tmp_path)()
    assert [r.name for r in found] == ["one", "two"]
    again = Compare(subjects=[str(tmp_path / "two.json")] * 2, output_dir=tmp_path)()
    assert [r.name for r in again] == ["one", "two", "one (2)", "two (2)"]


def test_hooks_of_the_data_module_are_applied(tmp_path):
    class Doubled(Points):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch[0], batch[1]

    module = Regression()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "weights.ckpt")
    options = {"progress": False, "accelerator": "cpu", "num_probes": 2, "output_dir": tmp_path}
    values = []
    for data in (Points(), Doubled()):
        subject = Subject(module, data, tmp_path / "weights.ckpt")
        task = Spectrum(subjects=[subject], slice_points=0, plane_points=0, **options)
        values.append(task().top[0].value)
        assert data.trainer is None
    assert values[1] == pytest.approx(4 * values[0], rel=1e-2)
    assert isinstance(module, L.LightningModule)
