"""The bilevel experiments: their pieces against closed forms, their commands at tiny sizes."""

import json

import pytest
import torch
from hvpopt.experiments.bilevel import hypercleaning, ridge, step_sizes
from hvpopt.experiments.bilevel.__main__ import main, mean_and_error
from hvpopt.experiments.bilevel.hypercleaning import Cleaning, Corrupted, Images

from hvpopt.lightning.fashion_mnist import find_files
from hvpopt.nested import BackOptimization, ForwardMode
from hvpopt.nested.hypergradients import unrolled_hypergradient

needs_fashion_mnist = pytest.mark.skipif(
    find_files(None) is None, reason="needs Debian's dataset-fashion-mnist"
)


def test_ridge_follows_the_closed_form_and_beats_a_single_penalty():
    problem = ridge.Regression.drawn(0, features=12, relevant=3, rows=20)
    _, found = ridge.learn(problem, num_steps=15)
    assert found.error < 1e-6
    assert found.learned < found.shared < found.least_squares


def test_the_closed_form_of_ridge_is_the_difference_quotient_of_its_solutions():
    problem = ridge.Regression.drawn(1, features=5, relevant=2, rows=10)
    penalties = torch.linspace(-1, 1, 5, dtype=torch.float64)
    h = 1e-5
    for j, expected in enumerate(problem.closed_form(penalties)):
        e = h * torch.eye(5, dtype=torch.float64)[j]
        up, down = (
            problem.outer_loss(problem.solution(p), p) for p in (penalties + e, penalties - e)
        )
        assert float(expected) == pytest.approx(float((up - down) / (2 * h)), abs=1e-8)


def blobs(*, num_train: int, num_clean: int) -> Corrupted:
    """Ten well separated classes, with 30% of the training labels wrong."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(10, 8, generator=generator)

    def drawn(n: int) -> Images:
        y = torch.arange(n) % 10
        return Images(centres[y] + torch.randn(n, 8, generator=generator), y)

    train, clean, test = drawn(num_train), drawn(num_clean), drawn(200)
    is_wrong = torch.rand(num_train, generator=generator) < 0.3
    given = torch.where(is_wrong, (train.y + 3) % 10, train.y)
    return Corrupted(Images(train.x, given), is_wrong, clean, test)


def test_cleaning_finds_the_wrong_labels_of_separated_classes():
    data = blobs(num_train=200, num_clean=50)
    found = Cleaning(num_outer_steps=6, penalty=0.01).run(data)
    assert found.weights.shape == (200,)
    assert found.detection(data.is_wrong) > 90  # 70 where none is found
    assert found.weights[data.is_wrong].mean() < 0.5 < found.weights[~data.is_wrong].mean()


def test_images_without_weight_teach_a_network_nothing():
    data = blobs(num_train=200, num_clean=50)
    weights = (~data.is_wrong).float()
    nothing = Images(data.train.x, torch.where(data.is_wrong, 0, data.train.y))
    found = [
        hypercleaning.network(images, weights, data.test, seed=0, steps=30)
        for images in (data.train, nothing)
    ]
    assert found[0] == found[1] > 80


@needs_fashion_mnist
def test_corrupted_data_are_corrupted_as_stated_and_disjoint():
    data = Corrupted.drawn(3, num_train=2000, num_clean=100, noise=0.4)
    same = Corrupted.drawn(3, num_train=2000, num_clean=100, noise=0.0)
    assert torch.equal(data.train.x, same.train.x)
    assert torch.equal(data.train.y != same.train.y, data.is_wrong)  # never the right class
    assert 0.36 < float(data.is_wrong.float().mean()) < 0.44
    assert (data.train.x.shape, data.test.x.shape) == ((2000, 196), (10_000, 196))
    assert abs(float(data.test.x.mean())) < 0.1
    assert 0.8 < float(data.test.x.std()) < 1.2
    distances = torch.cdist(data.clean.x, data.train.x)
    assert int((distances == 0).sum()) == 0


def test_step_sizes_have_the_same_hypergradient_by_forward_and_reverse_mode():
    task = step_sizes.Digits(num_steps=6, batch_size=16)
    sizes = step_sizes.constant(-1.0, 0.8)
    found = [
        unrolled_hypergradient(
            task.step(0),
            lambda state, _: task.loss(state["weights"]),
            task.start(0),
            sizes,
            num_steps=task.num_steps,
            adjoint=adjoint,
        )
        for adjoint in (ForwardMode(), BackOptimization(num_tapes=0))
    ]
    for name in sizes:
        torch.testing.assert_close(found[0].value[name], found[1].value[name], rtol=1e-4, atol=1e-6)
    assert float(found[0].outer_loss) == pytest.approx(task.final_loss(sizes, 0), rel=1e-5)


def test_a_schedule_of_equal_steps_is_the_constant_step():
    task = step_sizes.Digits(num_steps=4)
    sizes = step_sizes.constant(-1.0, 0.8)
    same = step_sizes.scheduled(task, sizes)
    assert task.final_loss(same, 5) == task.final_loss(sizes, 5)
    assert same["log_sizes"].shape == (4, 4)


def test_a_run_that_diverges_counts_as_infinite():
    task = step_sizes.Digits(num_steps=30)
    assert task.final_loss(step_sizes.constant(200.0, 0.9), 0) == float("inf")


@pytest.mark.parametrize(
    "experiment",
    ["ridge", "step_sizes", pytest.param("hypercleaning", marks=needs_fashion_mnist)],
)
def test_every_command_runs_at_tiny_sizes(experiment, capsys, tmp_path):
    path = tmp_path / "numbers.json"
    main([experiment, "--quick", "--seeds", "1", "--json", str(path)])
    written = json.loads(path.read_text())
    assert written["quick"] is True
    assert len(written["rows"]) == (3 if experiment == "step_sizes" else 1)
    assert "±" in capsys.readouterr().out


def test_the_mean_has_its_standard_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == "2.00 ± 0.58"  # 1 / √3
    assert mean_and_error([1.5]) == "1.50"


def test_missing_data_and_bad_options_are_one_sentence(capsys, monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("Fashion-MNIST was not found: install it")

    monkeypatch.setattr(Corrupted, "drawn", missing)
    with pytest.raises(SystemExit) as ended:
        main(["hypercleaning", "--quick"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "Fashion-MNIST was not found: install it\n"
    with pytest.raises(SystemExit):
        main(["ridge", "--json", "/no/such/folder/x.json"])
    assert "there is no folder /no/such/folder" in capsys.readouterr().err
