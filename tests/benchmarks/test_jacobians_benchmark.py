"""The benchmarks of Jacobians and of J v: what they measure, and their output's form."""

import json

import pytest
import torch
from hvpopt.experiments.benchmarks import image_networks, jacobians, jvp_cost
from hvpopt.experiments.benchmarks.jacobians import WAYS, Case, cases

CPU = torch.device("cpu")
both = pytest.mark.parametrize("benchmark", [jacobians, jvp_cost])


def test_quick_prints_and_writes_every_way_to_every_jacobian(capsys, tmp_path):
    path = tmp_path / "jacobians.json"
    jacobians.main(["--quick", "--repeats", "1", "--device", "cpu", "--json", str(path)])
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    assert written["machines"]["cpu"] in printed
    assert written["versions"]["torch"] == torch.__version__
    assert (written["repeats"], written["quick"]) == (1, True)
    assert len(written["cases"]) == 6
    for name, measured in written["cases"].items():
        assert name in printed
        (on_cpu,) = measured.values()
        assert {*WAYS, "auto", "torch.autograd.functional"} <= on_cpu["seconds"].keys()
        assert all(s > 0 for s in on_cpu["seconds"].values())
        assert on_cpu["auto"] in WAYS
        assert " ms" in on_cpu["reason"]
        assert on_cpu["best"] in WAYS
        assert on_cpu["auto_to_best"] > 0
    worst = max(m["cpu"]["auto_to_best"] for m in written["cases"].values())
    assert written["worst_auto_to_best"] == worst
    assert f"auto / best of the six, at worst: {worst:.2f}" in printed


def test_devices_are_printed_beside_each_other():
    case = cases(CPU, quick=True)[0]
    cpu = jacobians.measure(case, CPU, repeats=1)
    text = jacobians.table(case, {"cpu": cpu, "cuda": cpu})
    assert text.splitlines()[1].split() == ["milliseconds", "cpu", "cuda"]
    (row,) = [line.split() for line in text.splitlines() if line.startswith("    jacfwd ")]
    assert len(row) == 3


def test_the_shapes_are_those_of_the_comparison():
    def shape(case: Case) -> tuple[int, int, tuple[int, ...], bool]:
        return case.rows, case.columns, tuple(case.x.shape), case.batched

    assert [shape(c) for c in cases(CPU, quick=False)] == [
        (10240, 16, (16,), False),
        (16, 10240, (10240,), False),
        (1024, 16384, (1024, 16), False),
        (16, 16384, (16, 1024), False),
        (10240, 16, (4, 16), True),
        (16, 10240, (4, 10240), True),
    ]
    for case in cases(CPU, quick=True):
        value = case.f(case.x)
        assert value.numel() == case.rows * (len(case.x) if case.batched else 1)


def test_a_way_that_is_wrong_is_named():
    case = cases(CPU, quick=True)[0]
    runs = jacobians.runs_of(case)
    right = runs["jvp_loop"]
    runs["jvp_loop"] = lambda: 1.01 * right()
    with pytest.raises(RuntimeError, match=r"inputs, N = 4, M = 128: jvp_loop is off by 1\.0e-02"):
        jacobians.check(case, runs)


def test_quick_prints_and_writes_every_way_to_a_jvp(capsys, tmp_path):
    path = tmp_path / "jvp.json"
    jvp_cost.main(["--quick", "--repeats", "1", "--device", "cpu", "--json", str(path)])
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    names = [(r["network"].split(",")[0], r["with_respect_to"]) for r in written["cpu"]]
    assert names == [(n, of) for n in ("AlexNet", "ResNet-18") for of in ("inputs", "weights")]
    for report in written["cpu"]:
        assert f"{report['network']}, {report['num_parameters']:,} parameters" in printed
        assert {row["way"] for row in report["rows"]} == {
            "hvpopt.products.jvp",
            'hvpopt.products.jvp, "double_reverse"',
            "two VJPs, torch.autograd.grad",
            "torch.func.jvp",
            "torch.autograd.functional.jvp",
        }
        for row in report["rows"]:
            assert row["way"] in printed
            assert all(value > 0 for key, value in row.items() if key != "way")
        assert report["forward_seconds"] > 0
        assert report["gradient_seconds"] > 0
        assert report["gradient_peak_mib"] > report["forward_peak_mib"] > 0


@pytest.mark.parametrize("of", jvp_cost.WITH_RESPECT_TO)
def test_jvps_are_central_differences(of):
    """In float64; the networks' kinks are not met within this step."""
    for network in jvp_cost.networks(CPU, quick=True):
        f, at = jvp_cost.Network("", network.module.double(), network.images.double()).as_function(
            of
        )
        generator = torch.Generator().manual_seed(0)
        v = tuple(torch.randn(x.shape, generator=generator).to(x) for x in at)
        step = 1e-6
        ends = [f(*(x + s * t for x, t in zip(at, v, strict=True))) for s in (step, -step)]
        expected = (ends[0] - ends[1]).detach() / (2 * step)
        for name, way in jvp_cost.ways(f, at, v).items():
            error = float((way() - expected).norm() / expected.norm())
            assert error < 1e-3, name


def test_the_networks_have_their_papers_sizes():
    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        resnet = image_networks.resnet18()
        assert count(resnet) == 11_689_512  # that of the networks in circulation
        assert resnet(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
        alexnet = image_networks.alexnet()
        assert count(alexnet) == 61_100_840
        assert alexnet(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
    ],
)
def test_bad_options_are_one_clear_sentence(benchmark, arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", *arguments])
    assert message in capsys.readouterr().err


@both
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_clear_sentence(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", "--device", "cuda"])
    assert "torch sees no CUDA device here" in capsys.readouterr().err


@both
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quick_runs_on_both_devices(benchmark, tmp_path):
    path = tmp_path / "both.json"
    benchmark.main(["--quick", "--repeats", "1", "--json", str(path)])
    assert json.loads(path.read_text())["machines"].keys() == {"cpu", "cuda"}
