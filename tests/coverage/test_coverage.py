"""Every module of PyTorch's own list has right products, by an engine that can serve it."""

import json
import math

import pytest
import torch
from cubes import Detached
from hvpopt.experiments.coverage.__main__ import main, run
from hvpopt.experiments.coverage.oracle import Differences, differences
from hvpopt.experiments.coverage.outcomes import Outcome, outcomes
from hvpopt.experiments.coverage.samples import (
    NoGradientError,
    Sample,
    module_samples,
    operation_samples,
)
from hvpopt.experiments.coverage.table import table, totals
from torch import nn

EVERY_CASE = [
    pytest.param(
        dtype,
        training,
        id=f"{dtype} {'train' if training else 'eval'}",
        marks=[] if training and dtype == torch.float64 else pytest.mark.slow,
    )
    for dtype in (torch.float64, torch.float32)
    for training in (True, False)
]


# Samples with which no product can agree; why stands in hvpopt/engines/README.md.
EXPLAINED = {
    "as_strided_scatter",
    "nn.functional.max_unpool1d",
    "nn.functional.max_unpool2d",
    "nn.functional.max_unpool3d",
    "nn.functional.hinge_embedding_loss",
    "nn.functional.cosine_embedding_loss",
    "bfloat16",
    "half",
    "chalf",
    "linalg.norm.subgradients_at_zero",
    "masked.logaddexp",
}


@pytest.mark.parametrize(("dtype", "training"), EVERY_CASE)
def test_the_automatic_engine_is_right_on_every_sample_of_every_module(dtype, training):
    found = list(run(module_samples(dtype, training=training), ["auto"]))
    assert len(found) > 1500
    assert [o for o in found if o.verdict not in ("correct", "no gradient")] == []
    others = {o.sample.split(" ")[0] for o in found if o.served_by not in ("graph", "")}
    assert others == {"nn.CTCLoss"}  # by finite differences, which have no substitute


@pytest.mark.slow
def test_the_automatic_engine_is_right_or_refuses_on_samples_of_every_operation():
    found = list(run(operation_samples(torch.float64, per_operation=2), ["auto"]))
    wrong = {o.sample.split(" ")[0] for o in found if o.verdict == "wrong"}
    assert wrong <= EXPLAINED
    assert sum(o.verdict == "correct" for o in found) > 900


def test_the_oracle_is_exact_on_a_polynomial_and_knows_a_kink():
    start, v = (
        [torch.tensor([1.0, -2.0], dtype=torch.float64)],
        [torch.ones(2, dtype=torch.float64)],
    )
    cubic = differences(lambda x: 3 * x[0] ** 2, start, v)
    torch.testing.assert_close(cubic.value, 6 * start[0])
    assert cubic.disagreement(6 * start[0]) < 1e-8
    assert cubic.disagreement(6 * start[0] + 1) > 0.1
    kink = differences(lambda x: (x[0] - 1).clamp(min=0).sign() + x[0], start, v)
    assert kink.error[0] > 1
    assert kink.disagreement(torch.tensor([77.0, 1.0])) < 1e-6  # the first entry does not count
    assert math.isnan(Differences(torch.ones(1), torch.ones(1)).disagreement(torch.ones(1)))


def test_a_wrong_product_is_called_wrong_and_a_refused_one_refused():
    class Layer(nn.Module):
        def forward(self, x):
            return Detached.apply(x)

    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    by_engine = {
        o.engine: o for o in outcomes(Sample("layer", Layer(), (x,), {}), ["auto", "graph"])
    }
    assert by_engine["graph"].verdict == "refused"
    assert by_engine["auto"].verdict == "correct"
    assert by_engine["auto"].served_by == "finite_difference"


def test_a_sample_without_gradient_is_named_so():
    x = torch.ones(2, requires_grad=True)
    (found,) = outcomes(Sample("constant", nn.Hardshrink(10.0), (x.detach(),), {}), ["auto"])
    assert found.verdict == "no gradient"
    with pytest.raises(NoGradientError):
        Sample("constant", nn.ReLU(), (x.detach(),), {}).loss()


def test_the_table_counts_and_names_what_is_not_simply_right():
    found = [
        Outcome("nn.A [0] train", "auto", "graph", "correct", 0.0, ""),
        Outcome("nn.B [0] train", "auto", "finite_difference", "correct", 0.0, ""),
        Outcome("nn.B [1] train", "dual", "", "refused", math.nan, "no a|b"),
    ]
    assert totals(found)["auto"]["correct"] == 2
    lines = table(found).splitlines()
    assert "| `auto` | 2 | 0 | 0 | 0 | 0 |" in lines
    assert "| nn.B | `auto` | correct by finite_difference | 1 |  |" in lines
    assert r"| nn.B | `dual` | refused | 1 | no a\|b |" in lines
    assert not any(line.startswith("| nn.A") for line in lines)


def test_the_command_writes_every_outcome(tmp_path, capsys, monkeypatch):
    def few(dtype, *, training, device):
        linear = nn.Linear(2, 2).to(dtype)
        yield lambda: Sample("nn.Linear [0]", linear, (torch.ones(1, 2, dtype=dtype),), {})

    monkeypatch.setattr("hvpopt.experiments.coverage.__main__.module_samples", few)
    path = tmp_path / "coverage.json"
    main(["--dtypes", "float64", "--engines", "graph", "--json", str(path)])
    assert "| `graph` | 2 |" in capsys.readouterr().out
    assert [o["verdict"] for o in json.loads(path.read_text())] == ["correct", "correct"]
