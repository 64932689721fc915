"""Energies of outputs of which something is known, against closed forms."""

import pytest
import torch

from hvpopt.nested import (
    Box,
    GradientDescent,
    HeavyBall,
    Logits,
    MirrorDescent,
    Unconstrained,
    minimize_energy,
)
from hvpopt.nested.energies import spen
from hvpopt.nested.energies.known import KnownEntries, KnownMeasurements


@pytest.fixture(autouse=True)
def _doubles():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


class Quadratic(torch.nn.Module):
    """½ (y − m)ᵀ H (y − m), with eigenvalues of H between 0.5 and 2."""

    def __init__(self, size):
        super().__init__()
        basis, _ = torch.linalg.qr(torch.randn(size, size))
        self.H = (basis * torch.linspace(0.5, 2, size)) @ basis.T
        self.m = torch.nn.Parameter(0.3 + 0.4 * torch.rand(size))

    def forward(self, encoding, y):
        d = y.flatten(1) - self.m
        return 0.5 * ((d @ self.H) * d).sum(1)


def conditioned(energy, A, b):
    """The minimisers of a quadratic with A y = b, by Lagrange multipliers."""
    inverse = torch.linalg.inv(energy.H)
    gain = inverse @ A.T @ torch.linalg.inv(A @ inverse @ A.T)
    return energy.m + (b - energy.m @ A.T) @ gain.T


METHODS = [GradientDescent(0.4, 300), HeavyBall(0.4, 200, momentum=0.5)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_known_entries_condition_a_quadratic_as_the_closed_form_says(method):
    energy, values = Quadratic(6), torch.rand(3, 2, 3)
    known = torch.rand(3, 2, 3) < 0.5
    encoding = {"known": known, "values": values}
    head = KnownEntries(energy)
    y0 = head.complete(encoding, torch.full_like(values, 0.5))
    found = minimize_energy(head, encoding, y0, method=method)
    for y, k, v in zip(found.y.flatten(1), known.flatten(1), values.flatten(1), strict=True):
        A = torch.eye(6)[k]
        torch.testing.assert_close(y, conditioned(energy, A, A @ v), rtol=0, atol=1e-10)


def measured_minimum(energy, A, b, weight):
    """The minimiser of a quadratic with the term for A y = b, by its linear equations."""
    inverse = torch.linalg.pinv(A)
    P = inverse @ A
    right = energy.m @ energy.H + weight * b @ inverse.T
    return torch.linalg.solve(energy.H + weight * P, right.T).T


def test_measurements_condition_a_quadratic_as_the_closed_form_says():
    energy, A, b = Quadratic(6), torch.randn(2, 6), torch.randn(4, 2)
    head, encoding = KnownMeasurements(energy, A, weight=3.0), {"measured": b}
    found = minimize_energy(head, encoding, torch.zeros(4, 6), method=METHODS[0])
    expected = measured_minimum(energy, A, b, 3.0)
    torch.testing.assert_close(found.y, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("weight", [1e2, 1e4])
def test_a_heavy_weight_approaches_the_exact_condition_as_its_bound_says(weight):
    energy, A, b = Quadratic(6), torch.randn(2, 6), torch.randn(4, 2)
    head = KnownMeasurements(energy, A, weight=weight)
    y = measured_minimum(energy, A, b, weight).detach()
    slope = ((y - energy.m) @ energy.H).detach()
    excess = head.excess({"measured": b}, y)
    assert bool((excess.norm(dim=1) <= slope.norm(dim=1) / weight * (1 + 1e-9)).all())
    distance = (y - conditioned(energy, A, b)).detach().norm(dim=1)
    assert bool((distance < 50 / weight).all())
    torch.testing.assert_close((y - excess) @ A.T, b)


def test_gradients_by_parameters_are_those_of_the_closed_form():
    energy, A = Quadratic(6), torch.randn(2, 6)
    b, weights = torch.randn(4, 2), torch.randn(4, 6)
    head, encoding = KnownMeasurements(energy, A, weight=2.0), {"measured": b}
    found = minimize_energy(head, encoding, torch.zeros(4, 6), method=METHODS[0])
    (found.y * weights).sum().backward()
    loss = (measured_minimum(energy, A, b, 2.0) * weights).sum()
    (expected,) = torch.autograd.grad(loss, energy.m)
    torch.testing.assert_close(energy.m.grad, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("domain", [Box(), Unconstrained()], ids=["box", "space"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_known_entries_stay_as_given_to_the_bit(method, domain, dtype):
    head = KnownEntries(Quadratic(6).to(dtype))
    head.head.H = head.head.H.to(dtype)
    values = torch.rand(5, 6).to(dtype)
    values[0, 0], values[1, 1] = 0.0, 1.0
    known = torch.rand(5, 6) < 0.5
    known[0, 0] = known[1, 1] = True
    encoding = {"known": known, "values": values}
    y0 = head.complete(encoding, torch.full_like(values, 0.5))
    found = minimize_energy(head, encoding, y0, method=method, domain=domain)
    assert torch.equal(found.y[known], values[known])
    assert bool((found.y[~known] != 0.5).all())


@pytest.mark.parametrize(
    ("method", "domain"),
    [(MirrorDescent(0.3, 20), Box(entropy=1.0)), (GradientDescent(0.3, 20), Logits())],
)
def test_after_an_inference_on_logits_completion_puts_known_entries_back(method, domain):
    head = KnownEntries(Quadratic(6))
    values, known = torch.rand(5, 6), torch.rand(5, 6) < 0.5
    encoding = {"known": known, "values": values}
    found = minimize_energy(head, encoding, torch.full((5, 6), 0.5), method=method, domain=domain)
    y = head.complete(encoding, found.y)
    assert torch.equal(y[known], values[known])
    assert torch.equal(y[~known], found.y[~known])


def test_known_labels_move_the_others_of_a_trained_energy_as_enumeration_says():
    # a global term that punishes a block's sum away from one: knowing one label decides the other
    energy = spen(3, 2, widths=[], num_units=2, activation="softplus")
    with torch.no_grad():
        energy.head.measure.weight.copy_(torch.tensor([[9.0, 9.0], [-9.0, -9.0]]))
        energy.head.measure.bias.copy_(torch.tensor([-9.0, 9.0]))
        energy.head.weigh.weight.fill_(1.0)
    x = torch.randn(4, 3)
    encoding = energy.encoder(x) | {
        "known": torch.tensor([[True, False]]).expand(4, 2),
        "values": torch.tensor([[1.0, 0.0], [0.0, 0.0]]).repeat(2, 1),
    }
    head = KnownEntries(energy.head)
    y0 = head.complete(encoding, torch.full((4, 2), 0.5))
    found = minimize_energy(head, encoding, y0, method=GradientDescent(0.02, 400), domain=Box())
    assert (found.y[:, 1] > 0.5).tolist() == [False, True, False, True]
    corners = torch.tensor([0.0, 1.0])
    by_corner = torch.stack(
        [head(encoding, torch.stack([encoding["values"][:, 0], c.expand(4)], 1)) for c in corners]
    )
    assert corners[by_corner.argmin(0)].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_the_term_is_half_the_squared_distance_to_what_has_the_measurements():
    A = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]])  # the second row says nothing new
    head = KnownMeasurements(lambda encoding, y: y.sum(1), A, weight=4.0)
    encoding, y = {"measured": torch.tensor([[3.0, 6.0]])}, torch.tensor([[0.0, 1.0, 7.0]])
    torch.testing.assert_close(y - head.excess(encoding, y), torch.tensor([[1.0, 2.0, 7.0]]))
    torch.testing.assert_close(head(encoding, y), torch.tensor([8.0 + 4.0 / 2 * 2.0]))


def test_measurements_of_images_keep_their_shape():
    head = KnownMeasurements(Quadratic(6), torch.ones(1, 6))
    y = torch.rand(2, 1, 2, 3)
    excess = head.excess({"measured": torch.zeros(2, 1)}, y)
    torch.testing.assert_close(excess, y.mean((1, 2, 3), keepdim=True).expand_as(y))


def test_values_that_are_not_known_are_not_used():
    head = KnownEntries(Quadratic(3))
    known = torch.tensor([[True, False, False]])
    y = torch.rand(1, 3)
    one = head({"known": known, "values": torch.tensor([[0.2, 0.0, 0.0]])}, y)
    other = head({"known": known, "values": torch.tensor([[0.2, torch.nan, 9.0]])}, y)
    assert torch.equal(one, other)


def test_other_types_and_shapes_are_named():
    head, y = KnownEntries(Quadratic(3)), torch.rand(2, 3)
    with pytest.raises(TypeError, match=r"encoding\['known'\] is torch.float64; expected"):
        head({"known": torch.ones(2, 3), "values": y}, y)
    with pytest.raises(ValueError, match=r"encoding\['values'\] has shape \(3,\) for outputs"):
        head({"known": torch.ones(2, 3, dtype=torch.bool), "values": y[0]}, y)
    with pytest.raises(ValueError, match=r"matrix has shape \(3,\) and torch.float64; expected"):
        KnownMeasurements(Quadratic(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"weight=0.0 is out of range"):
        KnownMeasurements(Quadratic(3), torch.ones(1, 3), weight=0.0)
    measured = KnownMeasurements(Quadratic(3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"takes 3 entries to 1 measurements;.*\(2, 2\) and y"):
        measured({"measured": torch.ones(2, 2)}, y)
    with pytest.raises(ValueError, match=r"\(2, 1\) and y \(2, 4\)"):
        measured({"measured": torch.ones(2, 1)}, torch.rand(2, 4))
