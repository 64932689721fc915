"""What minimize_energy answers to the wrong kinds of things, and to starts on the bounds."""

import pytest
import torch

from hvpopt.nested import Box, GradientDescent, Implicit, MirrorDescent, Simplex, minimize_energy
from hvpopt.nested.energies import spen
from hvpopt.nested.losses import EndToEnd, Minimizer

Y = torch.full((3, 2), 0.5)


def square(x, y):
    return (y**2).sum(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "gd"},
            r"method is 'gd'; expected an object of Method, such as GradientDescent",
        ),
        (
            {"method": MirrorDescent},
            r"method is the class MirrorDescent; expected an object of Method",
        ),
        ({"domain": "box"}, r"domain is 'box'; expected an object of Domain, such as Box\(\)"),
        ({"domain": Box}, r"domain is the class Box; expected an object of Domain"),
        (
            {"adjoint": Implicit},
            r"adjoint is the class Implicit; expected an object of Adjoint, such",
        ),
    ],
)
def test_words_and_classes_in_the_place_of_objects_are_named(options, message):
    with pytest.raises(TypeError, match=message):
        minimize_energy(square, None, Y, **options)


def test_an_energy_that_is_no_function_is_named():
    with pytest.raises(TypeError, match=r"energy is a NoneType; expected a function E\(x, y\)"):
        minimize_energy(None, None, Y)


def test_an_energy_that_mixes_examples_is_named():
    def centred(x, y):
        return ((y - y.mean(0)) ** 2).sum(1) + y.sum(1)

    with pytest.raises(ValueError, match=r"of one example depends on other rows of y"):
        minimize_energy(centred, None, torch.arange(6.0).view(3, 2))


def test_a_batch_of_one_that_is_squeezed_away_is_named():
    with pytest.raises(ValueError, match=r"nor squeeze a batch of one away"):
        minimize_energy(lambda x, y: y.sum(1).squeeze(), None, Y[:1])


@pytest.mark.parametrize(("domain", "y0"), [(Box(), [0.0, 0.5]), (Simplex(), [1.0, 0.0])])
def test_mirror_descent_from_a_bound_which_it_could_not_leave_is_named(domain, y0):
    with pytest.raises(ValueError, match=r"logits are infinite.*start from domain.center"):
        minimize_energy(square, None, torch.tensor([y0]), domain=domain, method=MirrorDescent(0.1))


def test_transforms_of_torch_func_are_named():
    with pytest.raises(RuntimeError, match=r"inside of a transform of torch.func"):
        torch.func.grad(lambda y: minimize_energy(square, None, y).y.sum())(Y)


@pytest.mark.parametrize("entropy", [0.0, 1.0])
def test_a_saturated_first_guess_gives_finite_gradients(entropy):
    torch.manual_seed(0)
    energy = spen(4, 3, widths=[], num_units=2)
    x, target = 1e3 * torch.randn(5, 4), torch.ones(5, 3)
    guess = energy.initial(energy.encoder(x))
    assert bool(((guess == 0) | (guess == 1)).any())
    inner = Minimizer(MirrorDescent(1e-3), Box(entropy=entropy), start="initial", max_diverged=0)
    EndToEnd()(energy, x, target, inner).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in energy.parameters() if p.grad is not None)


@pytest.mark.parametrize(("start", "method"), [(0.0, MirrorDescent()), (1.5, GradientDescent())])
def test_a_number_to_start_from_is_checked_before_training(start, method):
    with pytest.raises(ValueError, match=r"y0 lies outside of its domain"):
        Minimizer(method, Box(), start=start)
