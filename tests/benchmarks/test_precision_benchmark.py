"""The table of accuracy by precision: its reference, its scale, its output's form."""

import json

import pytest
import torch
from hvpopt.experiments.benchmarks import accuracy
from hvpopt.experiments.benchmarks.accuracy import (
    ENGINES,
    PRECISIONS,
    REFERENCE,
    Precision,
    Row,
    compute,
)
from hvpopt.experiments.benchmarks.precision import QUICK, main, table

from hvpopt import products

CPU = torch.device("cpu")
HALF = next(p for p in PRECISIONS if p.scaled)


def test_quick_prints_and_writes_every_engine_in_every_precision(capsys, tmp_path):
    path = tmp_path / "precision.json"
    main(["--quick", "--json", str(path)])
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert (written["device"], written["quick"], written["directions"]) == ("cpu", True, 1)
    assert written["versions"]["torch"] == torch.__version__
    assert [m["model"].split()[0] for m in written["models"]] == ["CNN", "GPT", "LSTM"]
    for model in written["models"]:
        assert model["model"] in printed
        found = [(r["precision"], r["curvature"], r["engine"]) for r in model["rows"]]
        assert sorted(found) == sorted(
            (p.name, c, e) for p in PRECISIONS for c, engines in ENGINES.items() for e in engines
        )
        exact = [r for r in model["rows"] if r["engine"] != "finite_difference"]
        largest = {"float64": 1e-12, "float32": 1e-5, "bfloat16 autocast": 0.2, HALF.name: 0.2}
        for row in exact:
            if row["failure"] is None:
                assert row["gradient"] < largest[row["precision"]]
                assert row["product"] < largest[row["precision"]]
            else:
                assert row["precision"] == HALF.name  # torch may have no kernel
        assert all(r["exponent"] is None for r in exact if r["precision"] != HALF.name)


def test_only_the_networks_asked_for_are_measured(capsys):
    main(["--quick", "--models", "lstm"])
    printed = capsys.readouterr().out
    assert "LSTM" in printed
    assert "GPT" not in printed


def test_the_reference_is_the_product_of_the_loss_in_float64():
    problem = accuracy._cast(QUICK["gpt"](CPU), torch.float64)
    values = compute(problem, REFERENCE, "hessian", "graph", 1)
    named = {name: p.detach() for name, p in problem.module.named_parameters()}
    v = dict(zip(named, accuracy._direction(problem, 0), strict=True))
    loss, grad, product = products.grad_and_hvp(problem.value, named, v)
    torch.testing.assert_close(values.loss, loss)
    torch.testing.assert_close(values.gradient, accuracy._flat(list(grad.values())))
    torch.testing.assert_close(values.products[0], accuracy._flat(list(product.values())))
    norm = torch.cat([x.reshape(-1) for x in v.values()]).norm()
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=1e-6, atol=0)
    assert all(torch.equal(x, x.float().double()) for x in v.values())


def test_a_scaled_loss_is_scaled_back():
    """By powers of two, so that float32 products are the same to the last bit."""
    problem = QUICK["lstm"](CPU)
    plain = compute(problem, Precision("float32", torch.float32), "hessian", "graph", 1)
    scaled = compute(
        problem, Precision("scaled", torch.float32, scaled=True), "hessian", "graph", 1
    )
    assert (plain.exponent, scaled.exponent) == (None, 16)
    assert torch.equal(plain.loss, scaled.loss)
    assert torch.equal(plain.gradient, scaled.gradient)
    assert torch.equal(plain.products, scaled.products)


def test_a_loss_scale_that_overflows_backs_off(monkeypatch):
    problem = QUICK["lstm"](CPU)
    monkeypatch.setattr(accuracy, "FIRST_EXPONENT", 130)  # 2¹²⁸ is infinite in float32
    scaled = compute(problem, Precision("scaled", torch.float32, scaled=True), "ggn", "graph", 1)
    assert scaled.is_finite
    assert 100 < scaled.exponent < 128


def test_what_torch_cannot_compute_is_a_note_below_the_table():
    rows = [
        Row("float64", "hessian", "graph", 0.0, 0.0, 0.0),
        *(
            Row("float64", c, e, 0.0, 0.0, 2e-7)
            for c, e in columns()
            if (c, e) != ("hessian", "graph")
        ),
        *(Row("half", c, e, failure="no kernel") for c, e in columns()),
    ]
    lines = table(rows).splitlines()
    assert "reference" in lines[1]
    assert lines[1].count("2e-07") == 3
    assert lines[2].count("–") == 7
    assert lines[3] == "  half, hessian graph: no kernel"


def columns() -> list[tuple[str, str]]:
    return [(c, e) for c, engines in ENGINES.items() for e in engines]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "meta"], "--device meta: choose cpu or cuda"),
        (["--models", "mlp"], "invalid choice: 'mlp'"),
        (["--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
    ],
)
def test_bad_options_are_one_clear_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["--quick", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_clear_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["--quick", "--device", "cuda"])
    assert "torch sees no CUDA device here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quick_runs_on_a_gpu(tmp_path):
    path = tmp_path / "precision.json"
    main(["--quick", "--device", "cuda", "--json", str(path)])
    written = json.loads(path.read_text())
    assert written["machine"] == torch.cuda.get_device_name()
