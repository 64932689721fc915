"""Directions, parameters, functions and options that do not fit are named."""

import pytest
import torch
from functional import Tree, combined
from product_problems import linearized_hvp
from torch import Tensor

from hvpopt.products import ggnvp, grad_and_hvp, hvp, jvp, linearize, vjp


def square(p: Tree) -> Tensor:
    return (p["w"] ** 2).sum()


EVERY_PRODUCT = {
    "jvp": jvp,
    "hvp": hvp,
    "grad_and_hvp": grad_and_hvp,
    "linearize": linearized_hvp,
    "ggnvp": lambda f, p, v: ggnvp(f, torch.square, p, v),
}


@pytest.mark.parametrize("name", EVERY_PRODUCT)
def test_a_direction_that_does_not_match_is_named(name):
    product, params = EVERY_PRODUCT[name], {"w": torch.ones(3)}
    with pytest.raises(ValueError, match=r"v\['w'\] has shape \(2,\); expected \(3,\)"):
        product(square, params, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"v\['w'\] has dtype torch.float64; expected"):
        product(square, params, {"w": torch.ones(3, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"v has the leaves \['x'\]|v has the leaves \[\['x'\]\]"):
        product(square, params, {"x": torch.ones(3)})
    with pytest.raises(ValueError, match=r"v\['w'\] is a float; expected a tensor"):
        product(square, params, {"w": 1.0})
    with pytest.raises(ValueError, match=r"v\['w'\] has device meta; expected cpu"):
        product(square, params, {"w": torch.ones(3, device="meta")})


@pytest.mark.parametrize("name", [*EVERY_PRODUCT, "vjp"])
def test_parameters_that_cannot_be_differentiated_are_named(name):
    product = {**EVERY_PRODUCT, "vjp": vjp}[name]
    for bad, message in (
        (torch.ones(3, dtype=torch.int64), r"params\['w'\] is torch.int64; expected real"),
        (torch.ones(3, dtype=torch.complex64), r"params\['w'\] is complex .*view_as_real"),
        (1.5, r"params\['w'\] is a float; expected a tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            product(square, {"w": bad}, {"w": bad})
    with pytest.raises(ValueError, match="params hold no tensor"):
        product(square, {}, {})


@pytest.mark.parametrize("name", [k for k in EVERY_PRODUCT if k not in ("jvp", "ggnvp")])
def test_a_function_that_is_not_a_scalar_is_named(name):
    product, p = EVERY_PRODUCT[name], torch.ones(3)
    for f, error, message in (
        (torch.square, ValueError, r"f returned a tensor of shape \(3,\).*mean\(\) or sum\(\)"),
        (lambda q: q.sum().reshape(1), ValueError, r"shape \(1,\)"),
        (lambda q: 1.0, TypeError, "f returned a float; expected a scalar tensor"),
        (lambda q: (q > 0).sum(), TypeError, "f returned a tensor of dtype torch.int64"),
        (lambda q: q.sum() * 1j, TypeError, "dtype torch.complex64"),
    ):
        with pytest.raises(error, match=message):
            product(f, p, p)


def test_what_does_not_fit_the_values_is_named():
    p = torch.ones(3)
    with pytest.raises(ValueError, match=r"u has shape \(2,\); expected \(3,\) as in the value"):
        vjp(torch.square, p, torch.ones(2))
    with pytest.raises(TypeError, match=r"the value of f is torch\.int64"):
        vjp(lambda q: (q > 0).long(), p, torch.ones(3))
    with pytest.raises(ValueError, match="loss returned a tensor of shape"):
        ggnvp(torch.square, torch.square, p, p)
    with pytest.raises(TypeError, match=r"the model's output\[1\] is torch.int64"):
        ggnvp(lambda q: (q, torch.ones(2, dtype=torch.int64)), lambda z: z[0].sum(), p, p)


def test_malformed_directions_are_named():
    params = {"a": torch.ones(3), "b": torch.ones(2, 2), "c": torch.ones(())}
    vs = combined(lambda p: torch.ones(4, *p.shape), params)

    def f(p: Tree) -> Tensor:
        return (p["a"] ** 2).sum() + (p["b"] ** 2).sum() + p["c"] ** 2

    found = hvp(f, params, vs)
    assert {k: tuple(t.shape) for k, t in found.items()} == {"a": (4, 3), "b": (4, 2, 2), "c": (4,)}
    for product in (
        lambda v: hvp(f, params, v),
        lambda v: jvp(f, params, v),
        lambda v: ggnvp(f, torch.exp, params, v),
        linearize(f, params).hvp,
    ):
        with pytest.raises(
            ValueError, match=r"v\['b'\] holds 5 directions .* v\['a'\] 4; expected"
        ):
            product({**vs, "b": torch.ones(5, 2, 2)})
        with pytest.raises(ValueError, match="holds no direction"):
            product(combined(lambda p: torch.ones(0, *p.shape), params))
        with pytest.raises(ValueError, match=r"v\['b'\] has dtype torch.float64; expected"):
            product({**vs, "b": vs["b"].double()})
        with pytest.raises(
            ValueError,
            match=r"v\['a'\] has shape \(4, 3\); expected \(3,\) as in params, or \(k, 3\) in ev",
        ):
            product({**vs, "b": params["b"]})
        with pytest.raises(ValueError, match=r"v\['c'\] has shape \(4, 1\); .* or \(k,\) in every"):
            product({**params, "c": torch.ones(4, 1)})


def test_options_out_of_range_are_named():
    p = torch.ones(3)
    for product in (
        lambda **o: hvp(torch.sum, p, p, **o),
        lambda **o: jvp(torch.sum, p, p, **o),
        lambda **o: ggnvp(torch.square, torch.sum, p, p, **o),
    ):
        with pytest.raises(ValueError, match=r"mode='sideways' is unknown: choose one of '"):
            product(mode="sideways")
        with pytest.raises(ValueError, match="chunk_size=0; expected at least 1"):
            product(chunk_size=0)
        with pytest.raises(ValueError, match="memory_budget=-5; expected at least 1"):
            product(memory_budget=-5)
        with pytest.raises(ValueError, match="both given; expected one"):
            product(chunk_size=1, memory_budget=100)
    with pytest.raises(TypeError, match=r"the value of f is torch.int64"):
        jvp(lambda q: (q > 0).long(), p, p, mode="double_reverse")
    with pytest.raises(TypeError, match=r"the value of f is torch.int64"):
        jvp(lambda q: (q > 0).long(), p, p, mode="finite_difference")


@pytest.mark.parametrize("limit", [2.5, "2", True])
def test_a_limit_that_is_no_int_is_named(limit):
    p = torch.ones(2)
    with pytest.raises(TypeError, match=rf"chunk_size={limit!r} is a .*; expected an int"):
        hvp(lambda p: p.sum(), p, torch.ones(3, 2), chunk_size=limit)


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (({"a": 0, "b": 0}, 0), "v is a tuple, but params is a list; expected the same containers"),
        ([{"b": 0, "a": 0}, 0], r"v\[0\] has the same keys in another order than params\[0\]"),
    ],
)
def test_containers_that_differ_are_named(v, message):
    params = [{"a": torch.ones(2), "b": torch.ones(2)}, torch.ones(2)]
    v = combined(lambda _: torch.ones(2), v)
    with pytest.raises(ValueError, match=message):
        hvp(lambda p: p[1].sum(), params, v)
