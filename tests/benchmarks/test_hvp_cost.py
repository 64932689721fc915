"""The benchmark of products: its counts and measures against closed forms, its output's form."""

import json
from contextlib import ExitStack

import pytest
import torch
from hvpopt.experiments.benchmarks import models
from hvpopt.experiments.benchmarks.bounds import FlopBound, flop_bound
from hvpopt.experiments.benchmarks.hvp_cost import main
from hvpopt.experiments.benchmarks.models import QUICK
from hvpopt.experiments.benchmarks.tasks import flat, further_tasks, many_vector_tasks, tasks
from hvpopt.experiments.benchmarks.timing import (
    Times,
    free_bytes,
    interleaved_times,
    peak_bytes,
    timed,
)
from torch.autograd import grad

from hvpopt.engines.support import differentiable_kernels

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize("name", QUICK)
def test_quick_prints_and_writes_every_product_of_every_network(name, capsys, tmp_path):
    path = tmp_path / "cost.json"
    main(["--quick", "--repeats", "1", "--models", name, "--json", str(path)])
    written = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"] in printed
    assert "/" not in written["machine"]
    assert (written["device"], written["repeats"], written["quick"]) == ("cpu", 1, True)
    assert [m["model"].lower()[:3] for m in written["models"]] == [name[:3]]
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
            assert row["failure"] is None
            assert 1 <= row["flop_bound"] <= 3
        assert model["gradient_seconds"] > 0
        assert model["gradient_peak_mib"] > 0


def test_only_the_networks_asked_for_are_measured(capsys):
    main(["--quick", "--repeats", "1", "--models", "mlp"])
    printed = capsys.readouterr().out
    assert "MLP" in printed
    assert "GPT" not in printed


def dense_way(problem, curvature, v):
    """The product by torch's double backward alone, the GGN's by the double-vjp trick."""
    params = list(problem.module.parameters())
    with differentiable_kernels():
        z = problem.module(problem.inputs)
        if curvature == "hessian":
            grads = grad(problem.loss(z), params, create_graph=True)
            return flat(grad(grads, params, v))
        u = torch.zeros_like(z, requires_grad=True)
        pulled = grad(z, params, u, create_graph=True)
        slope = grad(problem.loss(z), z, create_graph=True)
        curved = grad(slope, z, grad(pulled, u, v, retain_graph=True), retain_graph=True)
        return flat(grad(z, params, curved))


@pytest.mark.parametrize("name", QUICK)
def test_every_way_to_a_product_gives_the_same_numbers(name):
    """Finite differences only where the network is smooth: they step across ReLU's kinks."""
    problem = QUICK[name](CPU)
    vs = [list(problem.direction(i).values()) for i in range(8)]
    expected = {
        (c, i): dense_way(problem.copy(), c, vs[i]) for c in ("hessian", "ggn") for i in (0, 7)
    }
    bound = FlopBound(1, 2)
    for task in (*tasks(bound), *further_tasks(bound), *many_vector_tasks(bound, 8)):
        with ExitStack() as stack:
            run = task.prepare(problem.copy(), stack)
            for result in (run(), run()):
                for i in {0, task.product.count - 1}:
                    reference = expected[task.product.curvature, i]
                    found = task.read(result, i).detach()
                    error = float((found - reference).norm() / reference.norm())
                    if task.is_exact or name in ("gpt", "lstm"):
                        assert error < (1e-4 if task.is_exact else 1e-2), task


def test_directions_are_the_same_for_all_and_different_from_each_other():
    problem = QUICK["mlp"](CPU)
    several = problem.directions(3)
    for i in range(3):
        for name, v in problem.copy().direction(i).items():
            assert torch.equal(several[name][i], v)
    assert not torch.equal(flat(problem.direction(0)), flat(problem.direction(1)))


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


def test_the_flops_of_a_recurrent_network_are_its_matrix_products():
    batch, length, width = 4, 3, 8
    bound = flop_bound(models.lstm(CPU, batch=batch, length=length, width=width))
    gates = 2 * batch * length * width * 4 * width
    assert bound.forward == 2 * (gates + gates) + 2 * batch * length * width * 256
    assert 1 < bound.repeated_hvp < 2 < bound.one_shot_hvp < 3


def test_a_residual_network_has_its_depth_and_widths():
    problem = models.resnet(CPU, batch=2, width=4, size=8)
    assert problem.name == "ResNet-18 of width 4, 2×3×8×8"
    convolutions = [m for m in problem.module.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len([m for m in convolutions if m.kernel_size == (3, 3)]) + 1 == 18
    assert convolutions[-1].out_channels == 32


def test_without_running_statistics_the_function_is_the_same():
    problem = QUICK["resnet"](CPU)
    stateless = problem.without_statistics()
    assert not list(stateless.module.buffers())
    assert list(problem.module.buffers())
    assert torch.equal(stateless.value(problem.params()), problem.value(problem.params()))


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


def test_a_timed_task_returns_its_result_and_its_seconds():
    result, seconds = timed(lambda: 7, CPU)
    assert result == 7
    assert 0 < seconds < 1


def test_a_machine_has_free_memory():
    assert free_bytes(CPU) > 2**20


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
        (["--seconds", "0"], "--seconds must be positive, got 0"),
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
