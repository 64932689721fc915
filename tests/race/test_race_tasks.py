"""The tasks of the races against closed forms."""

import itertools
import math

import numpy
import pytest
import torch
from hvpopt.experiments.race import (
    Adding,
    Autoencoder,
    DigitsMLP,
    DriftingDigits,
    FourRegions,
    LogisticRegression,
    Pinn,
    Regression,
)
from hvpopt.experiments.race.adding import sequences
from hvpopt.experiments.race.autoencoder import sparse_
from hvpopt.experiments.race.fits import LogisticProblem
from hvpopt.experiments.race.pinn import EQUATIONS, Convection, Reaction, Wave
from hvpopt.experiments.race.rivals import scikit_learn_newton_cg
from hvpopt.experiments.race.streams import regions
from idx_files import write_fashion_mnist
from torch import nn

CPU = torch.device("cpu")


def places(equation, count=40):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.rand(2, count, 1, generator=generator, dtype=torch.float64)
    return (equation.end * x).requires_grad_(), t.requires_grad_()


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_closed_form_solves_the_equation_and_its_conditions(name):
    equation = EQUATIONS[name]()
    x, t = places(equation)
    assert equation.residual(equation.solution, x, t).abs().max() < 1e-9
    for condition in equation.conditions(equation.solution, x.detach(), t.detach()):
        assert condition.abs().max() < 1e-4  # the Gaussian is 1e-4 of periodic


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        # of u = x² t³
        (Convection(), lambda x, t: 3 * x**2 * t**2 + 40 * 2 * x * t**3),
        (Reaction(), lambda x, t: 3 * x**2 * t**2 - 5 * x**2 * t**3 * (1 - x**2 * t**3)),
        (Wave(), lambda x, t: 6 * x**2 * t - 4 * 2 * t**3),
    ],
)
def test_the_residual_of_a_polynomial_is_its_derivatives_by_hand(equation, expected):
    x, t = places(equation)
    torch.testing.assert_close(
        equation.residual(lambda x, t: x**2 * t**3, x, t), expected(x, t), rtol=1e-12, atol=1e-12
    )


def test_the_conditions_of_the_wave_are_values_velocity_and_both_ends():
    x, t = torch.tensor([[0.5]]).double(), torch.tensor([[0.25]]).double()
    value, velocity, left, right = Wave().conditions(lambda x, t: x + 3 * t + 1, x, t)
    assert value.item() == pytest.approx(0.5 + 1 - 1.5)  # sin π/2 + ½ sin 5π/2
    assert (velocity.item(), left.item(), right.item()) == (3.0, 1.75, 2.75)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_solution_has_no_error_and_zero_has_the_relative_error_one(name):
    problem = Pinn(equation=name, dtype="float64").build(0, CPU)
    assert problem.error_of(problem.equation.solution) == 0
    assert problem.error_of(lambda x, t: torch.zeros_like(x)) == pytest.approx(1)
    assert problem.loss_of(problem.equation.solution) < 1e-9


def test_the_points_of_a_pinn_lie_inside_and_the_paper_s_sizes_are_a_flag():
    problem = Pinn(equation="wave").build(3, CPU)
    assert problem._x.shape == problem._t.shape == (1_000, 1)
    assert 0 < problem._x.min() < problem._x.max() < 1
    assert 0 < problem._t.min() < problem._t.max() <= 1
    assert Pinn(paper_size=True).sizes == (200, 10_000, 257, 101)


def test_the_loss_of_a_pinn_weighs_the_mean_of_each_condition_alike():
    problem = Pinn(equation="wave", dtype="float64").build(0, CPU)
    # u = 1: residual 0, velocity 0, both ends 1, initial values 1 − solution
    initial = 1 - problem.equation.solution(problem._initial, torch.zeros_like(problem._initial))
    expected = initial.square().mean() + 2
    assert problem.loss_of(lambda x, t: 1 + 0 * (x * t) ** 2).item() == pytest.approx(
        expected.item()
    )


TASKS = {
    "pinn": Pinn(),
    "digits": DigitsMLP(),
    "regression": Regression(num_examples=50, num_features=5),
    "adding": Adding(length=6, batch_size=4),
    "drift": DriftingDigits(),
    "regions": FourRegions(),
}


@pytest.mark.parametrize("name", TASKS)
def test_equal_seeds_give_equal_problems_and_leave_the_global_generator_alone(name):
    before = torch.get_rng_state()
    problems = [TASKS[name].build(seed, CPU) for seed in (1, 1, 2)]
    for _ in range(3):
        assert all([problem.advance() for problem in problems])
    losses = [problem.loss().item() for problem in problems]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), before)
    evaluations = [problem.evaluate() for problem in problems]
    assert str(evaluations[0]) == str(evaluations[1])
    assert TASKS[name].describe()


def test_the_penalty_of_the_digits_is_half_the_square_of_all_weights():
    plain, penalised = (DigitsMLP(penalty=c).build(0, CPU) for c in (0.0, 0.5))
    square = sum(p.square().sum().item() for p in plain.module.parameters())
    assert penalised.loss().item() == pytest.approx(plain.loss().item() + 0.25 * square)


def test_the_condition_of_the_regression_is_the_hessian_s():
    task = Regression(num_examples=60, num_features=20, condition=1e4)
    problem = task.build(0, CPU)
    hessian = 2 * problem.inputs.T @ problem.inputs / 60
    values = torch.linalg.eigvalsh(hessian)
    assert values[-1] == pytest.approx(2)
    assert values[-1] / values[0] == pytest.approx(1e4)
    with torch.no_grad():
        problem.module.weight.copy_(problem.truth)
    evaluation = problem.evaluate()
    assert (evaluation.loss, evaluation.metric) == (pytest.approx(0, abs=1e-25), 0)


def small_logistic():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(80) % 10
    return LogisticProblem(inputs, labels, 1e-2)


def test_the_gradient_norm_of_the_logistic_regression_is_that_of_the_formula():
    problem = small_logistic()
    torch.nn.init.normal_(problem.module.weight, generator=torch.Generator().manual_seed(1))
    weight = problem.module.weight.detach().numpy()
    inputs, onehot = problem.inputs.numpy(), numpy.eye(10)[problem.labels.numpy()]
    scores = inputs @ weight.T
    p = numpy.exp(scores) / numpy.exp(scores).sum(1, keepdims=True)
    by_weight = (p - onehot).T @ inputs / 80 + 1e-2 * weight
    by_bias = (p - onehot).mean(0)
    expected = math.sqrt((by_weight**2).sum() + (by_bias**2).sum())
    assert problem.evaluate().metric == pytest.approx(expected, rel=1e-12)


def test_scikit_learn_minimises_the_same_function():
    problem = small_logistic()
    for _ in itertools.islice(scikit_learn_newton_cg(problem), 20):
        pass
    assert problem.evaluate().metric < 1e-8


def test_the_logistic_regression_reads_fashion_mnist(tmp_path):
    write_fashion_mnist(tmp_path)
    task = LogisticRegression(num_images=30, root=str(tmp_path))
    problem = task.build(0, CPU)
    assert problem.inputs.shape == (30, 784)
    assert problem.evaluate().loss == pytest.approx(math.log(10))


def test_absent_data_are_named_with_the_option_that_helps(tmp_path):
    task = LogisticRegression(num_images=30, root=str(tmp_path / "nowhere"))
    with pytest.raises(
        FileNotFoundError, match=r"holds no .* In a race the folder is race\.task\.root"
    ):
        task.build(0, CPU)


def test_the_autoencoder_goes_through_its_images_in_batches(tmp_path):
    write_fashion_mnist(tmp_path)
    problem = Autoencoder(num_images=50, batch_size=20, root=str(tmp_path)).build(0, CPU)
    seen = []
    for _ in range(2):
        assert problem.advance()
        seen.append(problem._batch)
    both = torch.cat(seen).flatten(1)
    assert len(both.unique(dim=0)) == 40  # no image twice before all but a rest were there
    evaluation = problem.evaluate()
    assert evaluation.metric == pytest.approx(784 * evaluation.loss)


def test_sparse_initialisation_gives_each_unit_fifteen_incoming_weights():
    module = nn.Sequential(nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 8), nn.Linear(8, 5))
    assert sparse_(module, generator=torch.Generator().manual_seed(0)) is module
    counts = [(layer.weight != 0).sum(1) for layer in module if isinstance(layer, nn.Linear)]
    assert counts[0].unique().tolist() == counts[1].unique().tolist() == [15]
    assert counts[2].unique().tolist() == [8]  # no more than there are
    weights = module[0].weight[module[0].weight != 0]
    assert len(weights) == 4500
    assert weights.std().item() == pytest.approx(0.25, rel=0.05)
    assert weights.mean().item() == pytest.approx(0, abs=0.02)
    # which inputs is random: each of 400 is taken some 300 · 15 / 400 times
    taken = (module[0].weight != 0).sum(0).double()
    assert taken.std().item() == pytest.approx(math.sqrt(300 * 15 / 400), rel=0.2)
    assert module[0].bias.unique().tolist() == [0.5]
    with pytest.raises(ValueError, match="num_nonzero=0 is out of range: expected at least 1"):
        sparse_(module, 0, generator=torch.Generator())


def test_a_sparse_start_is_an_option_of_the_autoencoder(tmp_path):
    write_fashion_mnist(tmp_path)
    problem = Autoencoder(num_images=50, sparse=True, root=str(tmp_path)).build(0, CPU)
    first = problem.module[1]
    assert (first.weight != 0).sum(1).unique().tolist() == [15]


@pytest.mark.parametrize("length", [2, 7, 50])
def test_targets_of_the_adding_problem_are_the_sums_of_the_marked_numbers(length):
    inputs, targets = sequences(200, length, torch.Generator().manual_seed(0))
    for sequence, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        marked = [i for i, (_, mark) in enumerate(sequence) if mark == 1]
        assert len(marked) == 2
        assert marked[0] < length // 2 <= marked[1]
        assert target == pytest.approx(sum(sequence[i][0] for i in marked))
        assert all(mark in (0, 1) and 0 <= number < 1 for number, mark in sequence)


def test_the_constant_one_has_the_squared_error_one_sixth():
    _, targets = sequences(20_000, 4, torch.Generator().manual_seed(0))
    assert (targets - 1).square().mean().item() == pytest.approx(1 / 6, rel=0.03)


def test_labels_are_permuted_after_every_period_only():
    problem = DriftingDigits(num_epochs=9, period=3).build(4, CPU)
    permutations = [problem.permutation(epoch).tolist() for epoch in range(9)]
    assert permutations[0] == list(range(10))
    assert all(sorted(p) == list(range(10)) for p in permutations)
    phases = [permutations[i : i + 3] for i in (0, 3, 6)]
    assert all(p == phase[0] for phase in phases for p in phase)
    assert phases[0][0] != phases[1][0] != phases[2][0] != phases[0][0]


def test_the_stream_of_digits_shows_each_image_once_an_epoch_with_its_present_label():
    problem = DriftingDigits(num_epochs=2, period=1, batch_size=64).build(0, CPU)
    images = problem._images.flatten(1)
    num_batches = len(images) // 64
    for epoch in range(2):
        order = problem.permutation(epoch)
        batches = []
        for _ in range(num_batches):
            assert problem.advance()
            batches.append(problem._batch)
        seen = torch.cat([x for x, _ in batches]).flatten(1)
        labels = torch.cat([y for _, y in batches])
        # images may repeat in the data, so their numbers are compared as sets of rows
        assert len(seen) == 64 * num_batches
        where = (torch.cdist(seen, images) == 0).int().argmax(1)
        assert torch.equal(labels, order[problem._labels[where]])
    assert not problem.advance()


def test_the_online_loss_is_the_mean_of_what_was_observed():
    problem = FourRegions(num_steps=3).build(0, CPU)
    assert math.isnan(problem.evaluate().loss)
    for loss in (1.0, 2.0, 6.0):
        assert problem.advance()
        problem.observe(torch.tensor(loss))
    assert problem.evaluate().loss == 3
    assert not problem.advance()


def test_the_four_regions():
    points = torch.tensor(
        [[0.0, 0.1], [0.0, 0.5], [-0.5, 0.1], [0.5, -0.1], [0.7, 0.7], [0.3, -0.9]]
    )
    assert regions(points).tolist() == [0, 1, 1, 2, 3, 3]


def test_the_four_regions_start_with_small_uniform_weights_in_a_network_of_184():
    module = FourRegions().build(0, CPU).module
    weights = torch.cat([p.flatten() for p in module.parameters()])
    assert len(weights) == 184
    assert 0.28 < weights.abs().max() <= 0.3
