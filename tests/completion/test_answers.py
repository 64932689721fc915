"""The networks, and what they and a Gaussian answer, against closed forms."""

import pytest
import torch
from completion_problems import images, module_of, seeded
from hvpopt.experiments.completion.answers import Gaussian, completed
from hvpopt.experiments.completion.networks import energy, feedforward
from hvpopt.experiments.completion.questions import QUESTIONS
from hvpopt.experiments.completion.scores import Reader


def answer_of(module, question, given, view):
    return completed(module.energy, module.minimizer, question, given, view)


# --- networks


def test_the_energy_is_half_the_squared_distance_from_its_autoencoders_output():
    e = energy([9], activation="tanh").double()
    y = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    p = {name.split("net.")[1]: value for name, value in e.named_parameters()}
    hidden = torch.tanh(y.flatten(1) @ p["0.0.weight"].T + p["0.0.bias"])
    output = hidden @ p["1.weight"].T + p["1.bias"]
    unknown = torch.zeros(3, 2, 8, 8, dtype=torch.float64)
    expected = 0.5 * ((y.flatten(1) - output) ** 2).sum(1)
    torch.testing.assert_close(e(unknown, y), expected)


@pytest.mark.parametrize("kind", ["energy", "feedforward"])
@pytest.mark.parametrize("name", ["pixels", "rectangle", "half"])
def test_known_pixels_remain_as_given_to_the_bit(kind, name):
    given, question = images(), QUESTIONS[name]
    view = question.view(given, seeded())
    answer = answer_of(module_of(kind), question, given, view)
    known = view[:, 1:] == 1
    assert torch.equal(answer[known], given[known])
    assert bool(((answer >= 0) & (answer <= 1)).all())
    assert bool((answer[~known] != given[~known]).all())


@pytest.mark.parametrize("kind", ["energy", "feedforward"])
@pytest.mark.parametrize("name", ["means", "sums"])
def test_answers_about_measurements_are_minima_within_the_bounds_of_pixels(kind, name):
    given, question = images().double(), QUESTIONS[name]
    module, view = module_of(kind).double(), question.view(images().double(), seeded())
    answer = answer_of(module, question, given, view).requires_grad_()
    matrix = question.matrix.double()
    onto = torch.linalg.pinv(matrix) @ matrix
    encoding = {name: part.detach() for name, part in module.energy.encoder(view).items()}
    (slope,) = torch.autograd.grad(module.energy.head.head(encoding, answer).sum(), answer)
    slope = slope + 10 * ((answer - given).flatten(1) @ onto).view_as(answer)
    left = (answer - (answer - slope).clamp(0, 1)).detach()
    assert float(left.abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["energy", "feedforward"])
@pytest.mark.parametrize("name", list(QUESTIONS))
def test_an_answer_depends_on_what_is_known_alone(kind, name):
    """Images that differ in what is not known get one answer."""
    question = QUESTIONS[name]
    first = images().double()
    view = question.view(first, seeded())
    if question.masks is not None:
        second = torch.where(view[:, 1:] == 1, first, 0.25)
    else:
        matrix = question.matrix.double()
        free = torch.eye(64).double() - torch.linalg.pinv(matrix) @ matrix
        second = first + 0.1 * (torch.rand(12, 64).double() @ free).view_as(first)
    module = module_of(kind).double()
    one = answer_of(module, question, first, view)
    other = answer_of(module, question, second, question.view(second, seeded()))
    torch.testing.assert_close(one, other)
    assert float((first - second).abs().max()) > 0.01


def test_the_feedforward_answer_to_measurements_is_the_nearest_image_to_its_guess():
    given, question = 0.3 + 0.4 * images().double(), QUESTIONS["sums"]
    module, matrix = module_of("feedforward").double(), question.matrix.double()
    view = question.view(given, seeded())
    guess = module.energy.encoder(view)["guess"].flatten(1)
    answer = answer_of(module, question, given, view).flatten(1)
    # by the normal equations of ½‖y − guess‖² + 10/2 ‖P (y − image)‖², whose minimum is inside
    P = torch.linalg.pinv(matrix) @ matrix
    expected = torch.linalg.solve(torch.eye(64) + 10 * P, (guess + 10 * given.flatten(1) @ P).T).T
    assert bool(((expected > 0) & (expected < 1)).all())
    torch.testing.assert_close(answer, expected, atol=1e-6, rtol=0)


# --- the Gaussian


def drawn(count=400):
    """Images whose pixels go together, inside of [0, 1]."""
    root = torch.randn(64, 64, generator=seeded(1), dtype=torch.float64) / 80
    noise = torch.randn(count, 64, generator=seeded(2), dtype=torch.float64)
    return (0.5 + noise @ root).view(count, 1, 8, 8)


@pytest.mark.parametrize("name", ["pixels", "rectangle", "half"])
def test_the_gaussians_answer_about_pixels_is_the_conditional_mean(name):
    given, question, noise = drawn(), QUESTIONS[name], 0.003
    view = question.view(given[:4], seeded())
    answers = Gaussian(given, noise).completed(question, given[:4], view).flatten(1)
    mean = given.mean(0).flatten()
    centred = given.flatten(1) - mean
    C = centred.T @ centred / len(given) + noise * torch.eye(64)
    for answer, image, known in zip(answers, given.flatten(1), view[:, 1].flatten(1), strict=False):
        k, h = known == 1, known == 0
        expected = mean[h] + C[h][:, k] @ torch.linalg.solve(C[k][:, k], (image - mean)[k])
        torch.testing.assert_close(answer[h], expected, atol=1e-6, rtol=0)
        assert torch.equal(answer[k], image[k])


@pytest.mark.parametrize("name", ["means", "sums"])
def test_the_gaussians_answer_about_measurements_solves_its_normal_equations(name):
    given, question = drawn(), QUESTIONS[name]
    gaussian = Gaussian(given, 0.003)
    view = question.view(given[:4], seeded())
    answer = gaussian.completed(question, given[:4], view).flatten(1)
    matrix = question.matrix.double()
    P = torch.linalg.pinv(matrix) @ matrix
    right = gaussian.mean @ gaussian.precision + 10 * given[:4].flatten(1) @ P
    expected = torch.linalg.solve(gaussian.precision + 10 * P, right.T).T
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=0)


def test_the_gaussians_energy_is_the_quadratic_form_of_the_images_covariance():
    given, noise = drawn(), 0.01
    gaussian = Gaussian(given, noise)
    deviations = given.flatten(1) - given.flatten(1).mean(0)
    C = deviations.T @ deviations / len(given) + noise * torch.eye(64)
    solved = torch.linalg.solve(C, deviations[:3].T).T
    expected = 0.5 * noise * (deviations[:3] * solved).sum(1)
    torch.testing.assert_close(gaussian({}, given[:3]), expected)


# --- scores


def test_the_error_is_of_hidden_pixels_alone_and_clamped():
    given = torch.zeros(20, 1, 8, 8)
    given[10:] = 1.0
    labels = torch.arange(20) // 10
    view = torch.zeros(20, 2, 8, 8)
    view[:, 1, :, :4] = 1
    answer = given.clone()
    answer[:, :, :, :4] = 9.0  # known: not counted
    answer[:10, :, :, 4:] = 0.6
    answer[10:, :, :, 4:] = 1.7  # clamped: right
    score = Reader(given, labels).score(answer, given, view, labels)
    assert score.error == pytest.approx((0.5 * 0.36) ** 0.5)


def test_the_reader_tells_how_many_are_read_rightly():
    given = torch.cat([torch.zeros(10, 1, 8, 8), torch.ones(10, 1, 8, 8)])
    labels = torch.arange(20) // 10
    reader = Reader(given, labels)
    assert reader.accuracy(given, labels) == 100
    mixed = given.clone()
    mixed[:5] = 1.0
    assert reader.accuracy(mixed, labels) == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": [0]}, "a layer's size=0 is out of range"),
        ({"dropout": 1.0}, "dropout=1 drops everything"),
        ({"activation": "swoosh"}, "activation must be one of"),
    ],
)
def test_networks_that_cannot_be_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        feedforward(**arguments)
