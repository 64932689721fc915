"""Energies against formulas written out, and what they promise: convexity, independence."""

import warnings

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from torch import nn

from hvpopt.nested.energies import (
    ConvexEncoder,
    ConvexHead,
    ConvolutionalPrior,
    EncodedEnergy,
    LocalGlobal,
    MLPEncoder,
    deep_value_network,
    denoising,
    input_convex,
    spen,
)
from hvpopt.nested.energies.layers import KINKED, SMOOTH, activation, inverse_softplus, perceptron


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def softplus(z):
    return np.logaddexp(0, z)


def arrays(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def multi_label_energies():
    return {
        "plain": spen(6, 4, widths=[5]),
        "conditional": spen(6, 4, widths=[5, 3], conditional=True, num_units=7),
        "value": deep_value_network(6, 4, widths=[5]),
        "convex": input_convex(6, 4, widths=[5, 3], units=[8, 2]),
    }


def soft_labels(count, num_labels=4):
    return torch.rand(count, num_labels)


# --- formulas


def test_a_plain_spen_is_the_formula_of_the_paper():
    energy = spen(6, 4, widths=[5])
    x, y = torch.randn(3, 6), soft_labels(3)
    p = arrays(energy)
    features = softplus(x.numpy() @ p["encoder.hidden.0.weight"].T + p["encoder.hidden.0.bias"])
    scores = features @ p["encoder.scores.weight"].T + p["encoder.scores.bias"]
    measured = y.numpy() @ p["head.measure.weight"].T + p["head.measure.bias"]
    expected = softplus(measured) @ p["head.weigh.weight"][0] - (y.numpy() * scores).sum(1)
    np.testing.assert_allclose(energy(x, y).detach().numpy(), expected, rtol=1e-12)


def test_a_conditional_spen_adds_the_last_hidden_layer_to_the_measurements():
    energy = spen(6, 4, widths=[5, 3], conditional=True, activation="tanh")
    x, y = torch.randn(3, 6), soft_labels(3)
    p, encoding = arrays(energy), energy.encoder(x)
    np.testing.assert_allclose(encoding["features"].detach(), energy.encoder.hidden(x).detach())
    measured = (
        y.numpy() @ p["head.measure.weight"].T
        + p["head.measure.bias"]
        + encoding["features"].detach().numpy() @ p["head.condition.weight"].T
    )
    local = (y * encoding["scores"]).sum(1).detach().numpy()
    expected = np.tanh(measured) @ p["head.weigh.weight"][0] - local
    np.testing.assert_allclose(energy(x, y).detach().numpy(), expected, rtol=1e-12)


def test_only_a_value_network_has_an_offset():
    assert spen(6, 4).head.weigh.bias is None
    energy = deep_value_network(6, 4)
    x, y = torch.randn(3, 6), soft_labels(3)
    before = energy(x, y)
    with torch.no_grad():
        energy.head.weigh.bias += 2.5
    torch.testing.assert_close(energy(x, y), before + 2.5)


def test_the_classifier_minimises_the_local_term_with_the_entropy():
    energy = spen(6, 4)
    nn.init.zeros_(energy.head.weigh.weight)
    encoding = energy.encoder(torch.randn(3, 6))
    y = energy.initial(encoding).detach().requires_grad_()
    entropy = (torch.special.entr(y) + torch.special.entr(1 - y)).sum()
    (slope,) = torch.autograd.grad(energy.head(encoding, y).sum() - entropy, y)
    torch.testing.assert_close(slope, torch.zeros_like(slope))


def test_a_convex_energy_is_the_recursion_of_the_paper():
    energy = input_convex(6, 4, widths=[5, 3], units=[8, 2], strength=0.7)
    x, y = torch.randn(3, 6), soft_labels(3)
    e = {name: part.detach().numpy() for name, part in energy.encoder(x).items()}
    p, labels = arrays(energy.head), y.numpy()
    z1 = softplus((labels * e["label_gate_0"]) @ p["from_labels.0.weight"].T + e["shift_0"])
    z2 = softplus(
        (z1 * e["unit_gate_0"]) @ softplus(p["from_units.0"]).T
        + (labels * e["label_gate_1"]) @ p["from_labels.1.weight"].T
        + e["shift_1"]
    )
    expected = (z2 * e["unit_gate_1"]) @ softplus(p["from_units.1"])[0]
    expected += 0.35 * ((labels - 0.5) ** 2).sum(1) - (labels * e["scores"]).sum(1)
    np.testing.assert_allclose(energy(x, y).detach().numpy(), expected, rtol=1e-12)
    assert all((e[f"unit_gate_{i}"] > 0).all() for i in range(2))


def test_the_denoising_energy_is_distance_and_convolutions():
    energy = denoising(2, widths=[3], kernel_size=3, fidelity=1.5)
    x, y = torch.randn(2, 2, 6, 5), torch.randn(2, 2, 6, 5)
    first, _, last = energy.head.prior.net
    expected = 1.5 * ((y - x) ** 2).sum((1, 2, 3)).numpy()
    for b in range(2):
        for o in range(3):
            image = sum(
                correlate2d(y[b, c].numpy(), first.weight[o, c].detach().numpy(), mode="same")
                for c in range(2)
            )
            hidden = softplus(image + first.bias[o].item())
            expected[b] += last.weight[0, o].item() * hidden.sum()
    np.testing.assert_allclose(energy(x, y).detach().numpy(), expected, rtol=1e-10)
    assert torch.equal(energy.initial(energy.encoder(x)), x)


# --- promises


@pytest.mark.parametrize("name", multi_label_energies())
def test_the_encoder_and_the_head_together_are_the_energy(name):
    energy = multi_label_energies()[name]
    x, y = torch.randn(3, 6), soft_labels(3)
    encoding = energy.encoder(x)
    torch.testing.assert_close(energy(x, y), energy.head(encoding, y))
    assert all(len(part) == 3 for part in encoding.values())
    initial = energy.initial(encoding)
    assert initial.shape == y.shape
    assert ((initial > 0) & (initial < 1)).all()


@pytest.mark.parametrize("name", multi_label_energies())
def test_energies_of_examples_are_independent(name):
    energy = multi_label_energies()[name]
    x, y = torch.randn(4, 6), soft_labels(4)
    alone = torch.cat([energy(x[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(energy(x, y), alone)


def hessian_in_y(energy, x, y):
    encoding = energy.encoder(x)
    return torch.autograd.functional.hessian(lambda v: energy.head(encoding, v).sum(), y)[0, :, 0]


def test_a_convex_energy_curves_upwards_and_with_its_strength_at_least():
    energy = input_convex(6, 4, widths=[5, 3], units=[8, 2], strength=0.3)
    for _ in range(20):
        x, y = 3 * torch.randn(1, 6), 4 * torch.randn(1, 4)
        assert torch.linalg.eigvalsh(hessian_in_y(energy, x, y)).min() > 0.3 - 1e-10


def test_an_energy_of_local_and_global_term_need_not_curve_upwards():
    energy = spen(6, 4)
    nn.init.constant_(energy.head.weigh.weight, -1.0)
    hessian = hessian_in_y(energy, torch.randn(1, 6), soft_labels(1))
    assert torch.linalg.eigvalsh(hessian).min() < 0


# --- activations


def test_activations_in_y_are_smooth_by_default_and_no_warning_is_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spen(6, 4, encoder_activation="relu")
        denoising()
        multi_label_energies()
    assert isinstance(spen(6, 4).head.activation, nn.Softplus)


@pytest.mark.parametrize("name", sorted(KINKED))
@pytest.mark.parametrize(
    "make", [lambda a: spen(6, 4, activation=a), lambda a: denoising(activation=a)]
)
def test_an_activation_with_a_kink_is_warned_of(name, make):
    with pytest.warns(UserWarning, match=f"activation='{name}' has no second derivative"):
        make(name)


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_the_second_derivative_of_a_smooth_activation_has_no_jump(name):
    z = torch.linspace(-3, 3, 60_001, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(name)(z).sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    assert curvature.abs().max() > 0.05
    assert curvature.diff().abs().max() < 1e-3


def test_an_unknown_activation_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"got 'softpluss'\. Did you mean 'softplus'"):
        spen(6, 4, activation="softpluss")


def test_inverse_softplus_is_the_inverse():
    values = torch.tensor([1e-6, 0.1, 1.0, 30.0, 200.0])
    torch.testing.assert_close(nn.functional.softplus(inverse_softplus(values)), values)


# --- dropout, refusals


def test_dropout_acts_in_the_encoder_while_training_only():
    encoder = MLPEncoder(6, 4, dropout=0.5, input_dropout=0.5)
    x = torch.randn(3, 6)
    assert not torch.equal(encoder(x)["scores"], encoder(x)["scores"])
    encoder.eval()
    assert torch.equal(encoder(x)["scores"], encoder(x)["scores"])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: spen(6, 0), "num_labels=0 is out of range"),
        (lambda: spen(0, 4), "a layer's size=0 is out of range"),
        (lambda: spen(6, 4, num_units=0), "num_units=0 is out of range"),
        (lambda: spen(6, 4, widths=[-1]), "a layer's size=-1 is out of range"),
        (lambda: spen(6, 4, dropout=1.0), "dropout=1 drops everything"),
        (lambda: spen(6, 4, input_dropout=-0.1), "input_dropout=-0.1 is out of range"),
        (lambda: LocalGlobal(4, num_features=0), "num_features=0 is out of range"),
        (lambda: ConvexEncoder(6, 4, widths=[5], units=[2, 3]), "differ in length"),
        (lambda: ConvexHead(4, units=[]), "units is empty"),
        (lambda: ConvexHead(4, strength=-1), "strength=-1 is out of range"),
        (lambda: ConvolutionalPrior(kernel_size=4), "kernel_size=4 is even"),
        (lambda: ConvolutionalPrior(widths=[0]), "a layer's channels=0 is out of range"),
        (lambda: denoising(fidelity=0), "fidelity=0 is out of range"),
        (lambda: perceptron([3, 2], "tanhh"), "Did you mean 'tanh'"),
    ],
)
def test_arguments_out_of_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_an_encoder_without_a_first_guess_is_refused():
    with pytest.raises(TypeError, match=r"Linear has no method initial\(encoding\)"):
        EncodedEnergy(nn.Linear(3, 2), nn.Identity())
