import warnings

import pytest
import torch
from nested.smooth_energy import problem
from torch import nn
from torch.autograd import forward_ad

from hvpopt.nested import (
    ADJOINTS,
    BackOptimization,
    Backtracking,
    Box,
    Checkpointed,
    ForwardMode,
    GradientDescent,
    HeavyBall,
    Implicit,
    Logits,
    MirrorDescent,
    Neumann,
    NewtonDescent,
    Simplex,
    Truncated,
    adjoint_named,
    minimize_energy,
    relu_like,
)

Y = torch.full((3, 2), 0.5)


def square(x, y):
    return (y**2).sum(1)


@pytest.mark.parametrize(
    ("energy", "kind", "message"),
    [
        (lambda x, y: (y**2).sum(), ValueError,
         r"returned shape \(\) for y of shape \(3, 2\); expected \(3,\).*do not reduce over the"),
        (lambda x, y: y**2, ValueError,
         r"returned shape \(3, 2\).*expected \(3,\).*as by flatten\(1\).sum\(1\)"),
        (lambda x, y: [1.0], TypeError, r"returned a list; expected a tensor of shape \(3,\)"),
        (lambda x, y: y.sum(1).long(), TypeError, r"returned torch.int64; expected floating point"),
        (lambda x, y: y.detach().sum(1), ValueError, r"does not depend on y by operations that"),
        (lambda x, y: (y.sum(1) - 1).log(), ValueError,
         r"not finite at y0 for 3 of 3 examples \(example 0 has energy -inf\)"),
        (lambda x, y: (y - 0.5).abs().sqrt().sum(1), ValueError, r"or its gradient is not finite"),
        (lambda x, y: nn.functional.batch_norm(y, None, None, training=True).sum(1), ValueError,
         r"depends on the others through a batch normalisation by statistics of the batch"),
    ],
)  # fmt: skip
def test_bad_energies_are_named(energy, kind, message):
    with pytest.raises(kind, match=message):
        minimize_energy(energy, None, Y)


@pytest.mark.parametrize("adjoint", ["unrolled", "back_optimization"])
def test_an_energy_that_starts_infinite_is_named_in_training_too(adjoint):
    weight = torch.tensor(1e30, requires_grad=True)
    with pytest.raises(ValueError, match=r"for 3 of 3 examples \(example 0 has energy inf\)"):
        minimize_energy(lambda x, y: (weight * y * 1e20).sum(1), None, Y, adjoint=adjoint)


def test_a_batch_norm_without_running_statistics_is_named():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, x, y):
            return self.norm(y).sum(1)

    with pytest.raises(ValueError, match=r"through 'norm' \(BatchNorm1d\) by statistics of the ba"):
        minimize_energy(Normed(), None, Y)


@pytest.mark.parametrize(
    ("x", "y0", "kind", "message"),
    [
        (None, [0.5], TypeError, r"y0 is a list; expected a tensor \(batch, \*shape\)"),
        (None, torch.ones(2, 2).long(), TypeError, r"y0 is torch.int64; expected floating point"),
        (None, torch.ones(3), ValueError, r"y0 has shape \(3,\); expected \(batch, \*shape\)"),
        (None, torch.ones(0, 3), ValueError, r"y0 has shape \(0, 3\).*at least one example"),
        ({"a": torch.ones(2, 5)}, Y, ValueError, r"x\['a'\] has shape \(2, 5\) for a batch of 3"),
        (
            torch.tensor(1.0),
            Y,
            ValueError,
            r"x has shape \(\) for a batch of 3: expected the batch",
        ),
    ],
)
def test_bad_inputs_are_named(x, y0, kind, message):
    with pytest.raises(kind, match=message):
        minimize_energy(square, x, y0)


def test_a_start_outside_of_the_domain_is_named():
    with pytest.raises(ValueError, match=r"y0 lies outside of its domain Box"):
        minimize_energy(square, None, Y + 1, domain=Box())


def test_captured_tensors_are_named_unless_unrolled():
    weight = torch.ones(2, requires_grad=True)
    scaled = weight * 3
    energy = lambda x, y: ((y - scaled) ** 2).sum(1)  # noqa: E731
    with pytest.raises(
        ValueError, match=r"a tensor that was computed outside of it .*\(by MulBack"
    ):
        minimize_energy(energy, None, Y)
    minimize_energy(energy, None, Y, adjoint="unrolled").y.sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        minimize_energy(energy, None, Y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientDescent(num_steps=0), r"num_steps=0 is out of range: expected a whole n"),
        (lambda: GradientDescent(-0.1), r"step_size=-0.1 is out of range"),
        (lambda: GradientDescent(0.0), r"step_size=0 never moves"),
        (
            lambda: GradientDescent(torch.ones(1, 2, 3)),
            r"step_size is a tensor of shape \(1, 2, 3\)",
        ),
        (lambda: GradientDescent(rtol=-1.0), r"rtol=-1.0 is out of range"),
        (lambda: GradientDescent(gtol=-1.0), r"gtol=-1.0 is out of range"),
        (lambda: HeavyBall(momentum=1.0), r"momentum=1 never comes to rest"),
        (lambda: HeavyBall(momentum=1.5), r"momentum=1.5 is out of range"),
        (lambda: NewtonDescent(damping=-1.0), r"damping=-1.0 is out of range"),
        (lambda: NewtonDescent(cg_steps=0), r"cg_steps=0 is out of range"),
        (lambda: Backtracking(shrink=1.0), r"shrink=1.0 must lie strictly between 0 and 1"),
        (lambda: Backtracking(sufficient_decrease=2.0), r"sufficient_decrease=2.0 is out of range"),
        (lambda: Backtracking(max_trials=0), r"max_trials=0 is out of range"),
        (lambda: BackOptimization(num_tapes=-1), r"num_tapes=-1 is out of range"),
        (
            lambda: BackOptimization(products="both"),
            r"products='both' is unknown: choose one of 're",
        ),
        (lambda: Checkpointed(0), r"num_segments=0 is out of range"),
        (lambda: Truncated(0), r"num_steps=0 is out of range"),
        (lambda: Implicit("lu"), r"solver='lu' is unknown: choose 'cg' or 'minres'"),
        (lambda: Implicit(damping=-1.0), r"damping=-1.0 is out of range"),
        (lambda: Implicit(max_steps=0), r"max_steps=0 is out of range"),
        (lambda: Implicit(rtol=-1.0), r"rtol=-1.0 is out of range"),
        (lambda: Implicit(residual_warning=0.0), r"residual_warning=0.0; expected above 0"),
        (lambda: Neumann(0), r"num_terms=0 is out of range"),
        (lambda: Neumann(step_size=0.0), r"step_size=0 sums to nothing"),
        (lambda: ForwardMode(0), r"max_directions=0 is out of range"),
        (lambda: adjoint_named("backprop"), r"adjoint='backprop' is unknown: choose one of 'unrol"),
    ],
)
def test_bad_options_are_named_where_they_are_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_words_of_adjoints_make_them():
    assert set(ADJOINTS) == {
        "unrolled", "checkpointed", "back_optimization", "truncated", "implicit", "neumann",
        "forward",
    }  # fmt: skip
    for name, cls in ADJOINTS.items():
        assert adjoint_named(name) == cls()
        assert cls.name == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": NewtonDescent(), "domain": Simplex()},
            r"NewtonDescent does not go with Simplex",
        ),
        ({"method": MirrorDescent(), "domain": Logits()}, r"MirrorDescent does not go with Logits"),
        (
            {"domain": Box(entropy=1.0)},
            r"has an entropy, whose gradient is infinite on the boundary",
        ),
        (
            {"method": GradientDescent(torch.ones(5))},
            r"step_size has shape \(5,\) for a batch of 3",
        ),
        *(
            (
                {"method": NewtonDescent(), "adjoint": name},
                rf"'{name}' does not go with NewtonDescent, whose steps would take third deriv",
            )
            for name in ("unrolled", "back_optimization", "truncated", "forward")
        ),
        (
            {"method": NewtonDescent(), "adjoint": "neumann"},
            r"Neumann finds no step size in Newton",
        ),
        (
            {"keep_iterates": True, "adjoint": "truncated"},
            r"gives gradients of the last iterate al",
        ),
        ({"max_diverged": 1.5}, r"max_diverged=1.5 is out of range"),
        ({"adjoint": ForwardMode(2)}, r"would carry 6 directions .* more than max_directions=2"),
    ],
)
def test_what_does_not_go_together_is_named(options, message):
    weight = torch.ones(2, 3, requires_grad=True)
    energy = lambda x, y: ((y @ weight) ** 2).sum(1)  # noqa: E731
    domain = options.get("domain", Box())
    y0 = domain.center((3, 2))
    with pytest.raises(ValueError, match=message):
        minimize_energy(energy, None, y0, **options)


def test_an_adjoint_of_another_type_is_named():
    with pytest.raises(TypeError, match=r"adjoint is 0.5; expected an object of Adjoint, such"):
        minimize_energy(square, None, Y, adjoint=0.5)


def test_parameters_changed_before_backward_are_an_error():
    energy, x, _ = problem()
    found = minimize_energy(energy, x, torch.zeros(6, 5, dtype=torch.float64))
    with torch.no_grad():
        energy.weight += 1.0
    with pytest.raises(RuntimeError, match=r"changed in place between the inference and the back"):
        found.y.sum().backward()


@pytest.mark.parametrize("adjoint", ["back_optimization", "truncated", "implicit", "forward"])
@pytest.mark.filterwarnings("ignore:adjoint='implicit' differentiates:UserWarning")
def test_what_cannot_be_differentiated_twice_says_so(adjoint):
    energy, x, _ = problem()
    y0 = torch.zeros(6, 5, dtype=torch.float64)
    found = minimize_energy(energy, x, y0, adjoint=adjoint)
    with pytest.raises(RuntimeError, match=rf"twice through an inference with adjoint='{adjoint}'"):
        torch.autograd.grad(found.y.sum(), x, create_graph=True)


def test_a_level_of_forward_mode_is_named():
    energy, x, _ = problem()
    y0 = torch.zeros(6, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=r"inside a level of forward mode .*='implicit'"):
            minimize_energy(energy, x, y0, adjoint="implicit")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x)).requires_grad_()
        with pytest.raises(RuntimeError, match=r"inside a level of forward mode .*='back_opt"):
            minimize_energy(energy, dual, y0)


class Kinked(nn.Module):
    def __init__(self, kink):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), kink)

    def forward(self, x, y):
        return self.net(y).sum(1) + (y**2).sum(1)


def test_an_energy_with_kinks_warns_once_and_names_them():
    energy = Kinked(nn.ReLU())
    assert relu_like(energy) == ["'net.1' (ReLU)"]
    with pytest.warns(UserWarning, match=r"not smooth \('net.1' \(ReLU\)\).*Use Softplus"):
        minimize_energy(energy, None, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minimize_energy(energy, None, Y)
        minimize_energy(Kinked(nn.Softplus()), None, Y)
    with pytest.warns(UserWarning, match=r"not smooth \(ReluBackward0\)"):
        minimize_energy(lambda x, y: torch.relu(y).sum(1), None, Y)
