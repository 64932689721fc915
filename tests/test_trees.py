"""Arithmetic on lists of tensors against NumPy and moments."""

import math

import numpy as np
import pytest
import torch

from hvpopt import trees


def lists(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((2, 3), (), (4,), (0,), (1, 2, 2))
    ]


def flat(xs: list[torch.Tensor]) -> np.ndarray:
    return np.concatenate([x.double().numpy().reshape(-1) for x in xs])


def test_dot_and_norm_are_numpys_on_the_flat_vectors():
    xs, ys = lists(0), lists(1)
    assert float(trees.dot(xs, ys)) == pytest.approx(float(flat(xs) @ flat(ys)), rel=1e-13)
    assert float(trees.norm(xs)) == pytest.approx(float(np.linalg.norm(flat(xs))), rel=1e-13)


def test_dot_takes_tensors_that_are_not_contiguous():
    x = torch.arange(6.0).reshape(2, 3).T
    y = torch.arange(6.0).reshape(3, 2)
    assert float(trees.dot([x], [y])) == float((x * y).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    """A running sum of ones in bfloat16 sticks at 256, one in float16 at 2048."""
    ones = [torch.ones(3000, dtype=dtype), torch.ones(3000, dtype=dtype)]
    total = trees.dot(ones, ones)
    assert total.dtype == torch.float32
    assert float(total) == 6000.0
    large = [torch.full((10,), 300.0, dtype=dtype)]
    assert float(trees.norm(large)) == pytest.approx(300 * math.sqrt(10), rel=1e-2)


def test_one_float64_tensor_in_the_list_makes_the_dot_float64():
    xs = [torch.ones(2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float64)]
    assert trees.dot(xs, xs).dtype == torch.float64
    assert trees.dot(xs[:1], xs[:1]).dtype == torch.float32


def test_lists_of_different_lengths_have_no_dot():
    with pytest.raises(ValueError, match="zip"):
        trees.dot(lists(), lists()[:2])


def test_linear_combinations_are_numpys():
    xs, ys = lists(0), lists(1)
    np.testing.assert_allclose(flat(trees.add(xs, ys, -0.3)), flat(xs) - 0.3 * flat(ys))
    np.testing.assert_allclose(flat(trees.scale(xs, 2.5)), 2.5 * flat(xs))
    changed = trees.clone(xs)
    trees.add_(changed, ys, 0.7)
    np.testing.assert_allclose(flat(changed), flat(xs) + 0.7 * flat(ys))


def test_only_functions_with_an_underscore_change_their_arguments():
    xs, ys = lists(0), lists(1)
    before = flat(xs)
    trees.add(xs, ys)
    trees.scale(xs, 3.0)
    trees.copy_(trees.clone(xs), ys)
    trees.add_(trees.clone(xs), ys)
    np.testing.assert_array_equal(flat(xs), before)


def test_copies_and_zeros_are_detached_and_alike():
    xs = [x.requires_grad_() for x in lists(dtype=torch.float32)]
    for made in (trees.clone(xs), trees.zeros_like(xs)):
        assert not any(x.requires_grad for x in made)
        assert [x.shape for x in made] == [x.shape for x in xs]
        assert all(x.dtype == torch.float32 for x in made)
    assert not flat(trees.zeros_like(xs)).any()


def test_copying_into_parameters_is_not_recorded():
    parameter = torch.nn.Parameter(torch.zeros(3))
    trees.copy_([parameter], [torch.ones(3)])
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    assert parameter.is_leaf
    assert parameter.grad_fn is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_entry_that_is_not_finite_is_found(bad):
    xs = lists()
    assert trees.all_finite(xs)
    xs[-1][0, 1, 1] = bad
    assert not trees.all_finite(xs)


def test_entries_whose_squares_overflow_are_finite():
    xs = lists()
    xs[-1][0, 1, 1] = 1e200 if xs[-1].dtype == torch.float64 else 1e30
    assert trees.all_finite(xs)


def test_rademacher_probes_are_signs_with_the_identity_as_second_moment():
    """20,000 samples: means and correlations within five standard errors, 5/√20000."""
    like = [torch.zeros(2, 2), torch.zeros(3)]
    generator = torch.Generator().manual_seed(0)
    samples = np.stack([flat(trees.rademacher_like(like, generator)) for _ in range(20_000)])
    assert set(np.unique(samples)) == {-1.0, 1.0}
    np.testing.assert_allclose(samples.mean(0), np.zeros(7), atol=5 / math.sqrt(20_000))
    np.testing.assert_allclose(samples.T @ samples / 20_000, np.eye(7), atol=5 / math.sqrt(20_000))


def test_normal_probes_have_the_moments_of_the_normal_distribution():
    (z,) = trees.normal_like([torch.zeros(200_000)], torch.Generator().manual_seed(0))
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert float((z.double() ** power).mean()) == pytest.approx(moment, abs=0.06)


@pytest.mark.parametrize("probes", [trees.rademacher_like, trees.normal_like])
def test_probes_are_like_their_model_and_follow_the_generator(probes):
    like = lists(dtype=torch.bfloat16)
    one, two = (probes(like, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    assert [(x.shape, x.dtype) for x in one] == [(x.shape, x.dtype) for x in like]
    other = probes(like, torch.Generator().manual_seed(4))
    assert not all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
