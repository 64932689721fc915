"""Losses that generate the outputs they learn from: deep value, ranking, contrast."""

import itertools

import pytest
import torch
from toy_energies import Slope, descent, gradient, rows, toy

from hvpopt.nested import Box
from hvpopt.nested.losses import Contrastive, DeepValue, Ranking, soft_f1
from hvpopt.nested.losses.base import generator_of

# --- deep value


def cross_entropy(value, quality):
    return -(quality * value.log() + (1 - quality) * (1 - value).log())


def test_a_value_network_regresses_the_quality_of_inferred_outputs():
    energy, (x, target) = toy(Slope()), rows()
    minimizer = descent(0.5, 3, start=0.0, domain=Box())
    value = DeepValue(adversarial=0.0)(energy, x, target, minimizer)
    s = energy.encoder(x)["scores"]
    y = (1.5 * s.detach()).clamp(0, 1)  # three steps of a half along the constant slope
    torch.testing.assert_close(value.inference.y, y)
    expected = cross_entropy(torch.sigmoid((y * s).sum(1) - 0.3), soft_f1(y, target)).mean()
    torch.testing.assert_close(value.loss, expected)
    torch.testing.assert_close(gradient(value.loss, energy), gradient(expected, energy))


def test_samples_of_a_minimisation_are_its_last_iterate_and_others_before_it():
    energy, (x, target) = toy(Slope(), scale=0.1), rows()
    minimizer = descent(0.5, 3, start=0.0, domain=Box())
    loss = DeepValue(adversarial=0.0, num_samples=4)(energy, x, target, minimizer).loss
    s = energy.encoder(x)["scores"]
    ys = [(0.5 * t * s.detach()).clamp(0, 1) for t in range(4)]
    terms = [cross_entropy(torch.sigmoid((y * s).sum(1) - 0.3), soft_f1(y, target)) for y in ys]
    torch.testing.assert_close(loss, torch.stack(terms).mean())


@pytest.mark.parametrize("from_truth", [0.0, 1.0])
def test_adversarial_outputs_go_up_the_loss(from_truth):
    energy, (x, target) = toy(Slope()), rows()
    loss = DeepValue(adversarial=1.0, from_truth=from_truth, step_size=0.3)
    value = loss(energy, x, target, descent(start=0.4, domain=Box()))
    s = energy.encoder(x)["scores"].detach()
    start = target if from_truth else torch.full_like(target, 0.4)

    def losses(y):
        return cross_entropy(torch.sigmoid((y * s).sum(1) - 0.3), soft_f1(y, target))

    y = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(losses(y).sum(), y)
    expected = losses((start + 0.3 * slope).clamp(0, 1)).mean()
    torch.testing.assert_close(value.loss.detach(), expected)
    assert expected > losses(start).mean()
    assert value.inference is None


def test_random_choices_depend_on_the_seed_and_the_step_alone():
    energy, (x, target) = toy(Slope()), rows()
    before = torch.get_rng_state()

    def losses(seed):
        loss = DeepValue(seed=seed, step_size=0.2)
        minimizer = descent(0.1, 3, domain=Box())
        return [loss(energy, x, target, minimizer, step=i).loss.item() for i in range(12)]

    assert losses(0) == losses(0)
    assert len(set(losses(0))) > 3  # some adversarial, with different rows from the truth
    assert losses(0) != losses(1)
    assert torch.equal(torch.get_rng_state(), before)


# --- comparisons


def candidates(loss, energy, x, target, minimizer, step):
    """As the loss draws them: the right output, inference's, corrupted ones."""
    generator = generator_of(loss.seed, step)
    encoding = energy.encoder(x)
    ys = [target, minimizer(energy.head, encoding, energy.initial(encoding)).y.detach()]
    for _ in range(loss.num_corrupted):
        flip = torch.rand(target.shape, generator=generator) < loss.flip
        ys.append(torch.where(flip, 1 - target, target))
    return [[(y[i], energy(x[i : i + 1], y[i : i + 1])[0]) for y in ys] for i in range(len(x))]


def test_ranking_compares_every_pair_of_different_quality():
    energy, (x, target) = toy(Slope()), rows()
    loss, minimizer = Ranking(margin=2.0, num_corrupted=3, flip=0.4, seed=5), descent(domain=Box())
    value = loss(energy, x, target, minimizer, step=7)
    terms = []
    for i, row in enumerate(candidates(loss, energy, x, target, minimizer, 7)):
        for (a, energy_a), (b, energy_b) in itertools.permutations(row, 2):
            quality_a, quality_b = (soft_f1(y[None], target[i : i + 1])[0] for y in (a, b))
            if quality_a > quality_b:
                terms.append((2 * (quality_a - quality_b) + energy_a - energy_b).clamp_min(0))
    expected = torch.stack(terms).mean()
    assert expected > 0
    torch.testing.assert_close(value.loss, expected)
    torch.testing.assert_close(gradient(value.loss, energy), gradient(expected, energy))


def test_contrast_is_the_softmax_of_the_right_output_among_different_ones():
    energy, (x, target) = toy(Slope()), rows()
    loss, minimizer = Contrastive(temperature=0.5, flip=0.15, seed=5), descent(domain=Box())
    value = loss(energy, x, target, minimizer, step=7)
    terms, copies = [], 0
    for i, (right, *others) in enumerate(candidates(loss, energy, x, target, minimizer, 7)):
        different = [energy_b for b, energy_b in others if not torch.equal(b, target[i])]
        copies += len(others) - len(different)
        logits = -torch.stack([right[1], *different]) / 0.5
        terms.append(-logits.log_softmax(0)[0])
    assert copies > 0
    torch.testing.assert_close(value.loss, torch.stack(terms).mean())
