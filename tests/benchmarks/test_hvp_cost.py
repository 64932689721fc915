"""The benchmark of products: its counts and measures against closed forms, its output's form."""

import json

import pytest
import torch
from hvpopt.experiments.benchmarks import models
from hvpopt.experiments.benchmarks.bounds import FlopBound, flop_bound
from hvpopt.experiments.benchmarks.hvp_cost import QUICK, main
from hvpopt.experiments.benchmarks.tasks import tasks
from hvpopt.experiments.benchmarks.timing import Times, interleaved_times, peak_bytes

CPU = torch.device("cpu")
MIB = 2**20


def test_quick_prints_and_writes_every_product_of_every_network(capsys, tmp_path):
    path = tmp_path / "cost.json"
    main(["--quick", "--repeats", "1", "--json", str(path)])
    written = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"] in printed
    assert "/" not in written["machine"]
    assert (written["device"], written["repeats"], written["quick"]) == ("cpu", 1, True)
    assert [m["model"].split()[0] for m in written["models"]] == ["MLP", "CNN", "GPT"]
    for model in written["models"]:
        assert model["model"] in printed
        found = {(row["what"], row["engine"]) for row in model["rows"]}
        for what, engines in {
            "one-shot loss + gradient + HVP": {
                "dual",
                "graph",
                "finite_difference",
                "products.grad_and_hvp",
            },
            "repeated HVP, one application": {"graph", "finite_difference", "products.linearize"},
            "one-shot GGN product": {"dual", "graph", "products.ggnvp"},
            "repeated GGN product, one application": {"dual", "graph"},
        }.items():
            assert {engine for name, engine in found if name == what} == engines
            assert what in printed
        for row in model["rows"]:
            assert 0 < row["time_ratio_min"] <= row["time_ratio"] <= row["time_ratio_max"]
            assert row["memory_ratio"] > 0
            assert 1 <= row["flop_bound"] <= 3
        assert model["gradient_seconds"] > 0
        assert model["gradient_peak_mib"] > 0


def test_only_the_networks_asked_for_are_measured(capsys):
    main(["--quick", "--repeats", "1", "--models", "mlp"])
    printed = capsys.readouterr().out
    assert "MLP" in printed
    assert "GPT" not in printed


@pytest.mark.parametrize("name", QUICK)
def test_every_way_to_a_product_gives_the_same_numbers(name):
    """Finite differences only where the network is smooth: they step across ReLU's kinks."""
    torch.manual_seed(0)
    problem = QUICK[name](CPU)
    values: dict[str, list[torch.Tensor]] = {}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(torch, "randn_like", torch.ones_like)  # the same direction for all
        with tasks(problem, FlopBound(1, 2)) as entries:
            for task in entries:
                for run in (task.run, task.whole):
                    result = run()
                    product = result[2] if isinstance(result, tuple) else result
                    parts = product.values() if isinstance(product, dict) else product
                    flat = torch.cat([t.reshape(-1) for t in parts])
                    curvature = "ggn" if "GGN" in task.what else "hessian"
                    values.setdefault(curvature, []).append(flat)
                    reference = values[curvature][0]
                    error = float((flat - reference).norm() / reference.norm())
                    approximate = task.engine == "finite_difference"
                    if name == "gpt" or not approximate:
                        assert error < (1e-2 if approximate else 1e-4), (task.what, task.engine)
    assert {k: len(v) for k, v in values.items()} == {"hessian": 14, "ggn": 10}


def test_the_bound_of_deep_equal_layers_is_the_textbooks():
    """Forward 1, backward 2: products cost 3, 2, 5/3 and 4/3 gradients."""
    deep = FlopBound(forward=10, backward=20)
    assert deep.one_shot_hvp == pytest.approx(3)
    assert deep.repeated_hvp == pytest.approx(2)
    assert deep.one_shot_ggn == pytest.approx(5 / 3)
    assert deep.repeated_ggn == pytest.approx(4 / 3)


def test_the_bound_of_a_first_layer_is_counted_without_its_input_gradient():
    first = FlopBound(forward=10, backward=10)
    assert (first.one_shot_hvp, first.repeated_hvp) == (2.0, 1.0)
    assert (first.one_shot_ggn, first.repeated_ggn) == (1.5, 1.0)


def test_the_flops_of_a_perceptron_are_its_matrix_products():
    problem = models.mlp(CPU, batch=4, width=8)
    layers = [2 * 4 * 784 * 8, 2 * 4 * 8 * 8, 2 * 4 * 8 * 10]
    bound = flop_bound(problem)
    assert bound.forward == sum(layers)
    assert bound.backward == 2 * sum(layers) - layers[0]


@pytest.mark.parametrize("name", QUICK)
def test_the_problem_as_a_function_is_the_closure(name):
    problem = QUICK[name](CPU)
    before = {k: b.clone() for k, b in problem.module.named_buffers()}
    value = problem.value(problem.params())
    for k, b in problem.module.named_buffers():
        assert torch.equal(b, before[k])
    assert float(problem.closure().detach()) == pytest.approx(float(value), rel=1e-5)
    assert all(p.grad is not None for p in problem.module.parameters())


def test_a_copy_has_parameters_of_its_own():
    problem = QUICK["mlp"](CPU)
    copied = problem.copy()
    with torch.no_grad():
        for p in problem.module.parameters():
            p.zero_()
    assert any(bool(p.any()) for p in copied.module.parameters())


def test_the_peak_is_the_most_that_was_held_at_once():
    def hold(*sizes: int) -> list[torch.Tensor]:
        return [torch.empty(size * MIB, dtype=torch.uint8) for size in sizes]

    def task() -> None:
        first = hold(1, 2)
        del first[0]
        first += hold(1)
        del first
        hold(2)

    assert peak_bytes(task, CPU) == pytest.approx(3 * MIB, rel=0.01)


def test_what_was_there_before_does_not_count_as_released():
    held = [torch.empty(4 * MIB, dtype=torch.uint8)]

    def task() -> None:
        held.clear()
        torch.empty(MIB, dtype=torch.uint8)

    assert peak_bytes(task, CPU) == pytest.approx(MIB, rel=0.01)


def test_tasks_take_turns_and_the_first_rounds_do_not_count():
    order: list[str] = []
    times = interleaved_times(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, device=CPU
    )
    assert "".join(order) == "abababab"
    assert [len(t.seconds) for t in times.values()] == [3, 3]
    with pytest.raises(ValueError, match="repeats ≥ 1, got 0"):
        interleaved_times({}, repeats=0, device=CPU)


def test_ratios_are_taken_within_rounds():
    slow, fast = Times((2.0, 40.0, 3.0)), Times((1.0, 10.0, 1.0))
    assert slow.ratios_to(fast) == (3.0, 2.0, 4.0)
    assert slow.median == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nothing"], "choose cpu or cuda"),
        (["--device", "meta"], "choose cpu or cuda"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--models", "rnn"], "invalid choice: 'rnn'"),
        (["--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
    ],
)
def test_bad_options_are_one_clear_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["--quick", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quick_runs_on_a_gpu(tmp_path):
    path = tmp_path / "cost.json"
    main(["--quick", "--repeats", "1", "--device", "cuda", "--json", str(path)])
    written = json.loads(path.read_text())
    assert written["machine"] == torch.cuda.get_device_name()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_clear_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["--quick", "--device", "cuda"])
    assert "torch sees no CUDA device here" in capsys.readouterr().err
