"""Products by differences of gradients, and their estimated errors."""

import pytest
import torch
import torch.nn.functional as F
from functional import combined, joined, normal, normal_like
from product_problems import exact_hvp, problem
from torch import Tensor

from hvpopt.products import hvp, hvp_finite_difference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["mlp", "silu", "attention", "lstm"])
def test_the_estimated_error_of_a_difference_is_of_the_true_ones_size(name, dtype):
    f, params, x = problem(name)
    v = normal_like(params)
    exact = exact_hvp(name, v)
    params, v, x = (combined(lambda t: t.to(dtype), tree) for tree in (params, v, x))
    found = hvp_finite_difference(f, params, v, x)
    true = float((joined(found.value).double() - exact).norm() / exact.norm())
    assert true <= 2 * found.error
    assert found.error <= 100 * max(true, torch.finfo(dtype).eps ** (2 / 3))
    assert found.error < (1e-6 if dtype == torch.float64 else 1e-2)
    extrapolated = hvp_finite_difference(f, params, v, x, extrapolate=True)
    better = float((joined(extrapolated.value).double() - exact).norm() / exact.norm())
    assert better < true
    assert better <= 2 * extrapolated.error
    assert extrapolated.error < (1e-8 if dtype == torch.float64 else 1e-2)
    torch.testing.assert_close(
        joined(hvp(f, params, v, x, mode="finite_difference")), joined(found.value)
    )


def test_differences_of_a_quadratic_are_its_matrix_and_of_a_line_zero():
    a = normal(6, 6)
    found = hvp_finite_difference(lambda p: 0.5 * p @ (a + a.T) @ p, normal(6), a[0])
    torch.testing.assert_close(found.value, (a + a.T) @ a[0], rtol=1e-9, atol=1e-9)
    assert found.error < 1e-9
    assert hvp_finite_difference(lambda p: p.sum(), a[0], a[1]).value.tolist() == [0.0] * 6
    zero = hvp_finite_difference(lambda p: (p**3).sum(), a[0], torch.zeros(6).double())
    assert zero.value.tolist() == [0.0] * 6
    assert zero.error == 0.0


def test_differences_see_one_dropout_mask_and_leave_one_runs_random_state():
    p, v = normal(50), normal(50, seed=1)

    def f(q: Tensor) -> Tensor:
        return (F.dropout(q, 0.5) ** 3).sum()

    def slope(q: Tensor) -> Tensor:
        return torch.func.grad(lambda r: F.silu(r).sum())(q)

    torch.manual_seed(4)
    mask = F.dropout(torch.ones(50, dtype=torch.float64), 0.5)
    after = torch.get_rng_state()
    cubic = 6 * mask**3 * p * v
    vs = torch.stack([v] * 2)
    for product, expected in (
        (lambda: hvp_finite_difference(f, p, v).value, cubic),
        (lambda: hvp(f, p, v, mode="finite_difference"), cubic),
        (lambda: hvp(f, p, vs, mode="finite_difference")[1], cubic),
        (lambda: hvp(f, p, vs, mode="forward_over_reverse", chunk_size=1)[1], cubic),
        (lambda: hvp(f, p, vs, mode="forward_over_reverse", chunk_size=2)[1], cubic),
        (
            lambda: hvp(lambda q: f(q) + F.silu(q).sum(), p, v, mode="forward_over_reverse"),
            cubic + torch.func.jvp(slope, (p,), (v,))[1],
        ),
    ):
        torch.manual_seed(4)
        torch.testing.assert_close(product(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(torch.get_rng_state(), after)


def test_a_difference_is_two_runs_of_the_function_and_four_with_its_error():
    calls = []

    def f(p: Tensor) -> Tensor:
        calls.append(1)
        return (p**3).sum()

    hvp(f, normal(2), normal(2), mode="finite_difference")
    assert len(calls) == 2
    calls.clear()
    hvp_finite_difference(f, normal(2), normal(2))
    assert len(calls) == 4


def test_differences_refuse_transforms():
    p = normal(3)
    with pytest.raises(ValueError, match=r"inside a torch.func transform.*choose another mode"):
        torch.vmap(lambda v: hvp(lambda q: (q**2).sum(), p, v, mode="finite_difference"))(
            p.expand(2, 3)
        )
