"""What cannot be differentiated, and options out of range, are named."""

import pytest
import torch
from functional import normal
from jacobian_cases import every_way
from torch import Tensor

from hvpopt.jacobians import hessian, hessian_blocks, jacobian, jacobian_blocks, which_mode


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.arange(3), TypeError, r"args\[0\] is torch.int64; expected real floating point"),
        (torch.ones(3, dtype=torch.cfloat), TypeError, r"args\[0\] is complex"),
        ({"w": 1.5}, TypeError, r"args\[0\]\['w'\] is a float; expected a tensor"),
        ([], ValueError, r"args\[0\] hold no tensor"),
    ],
)
def test_what_is_differentiated_must_be_real_tensors(x, error, message):
    for function in (jacobian, hessian, jacobian_blocks, which_mode):
        with pytest.raises(error, match=message):
            function(lambda x: x, x)


@every_way
@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda x: x > 0, TypeError, "the value of f is torch.bool; expected real floating"),
        (lambda x: x.to(torch.cfloat), TypeError, "the value of f is complex"),
        (lambda x: (x, 3), TypeError, r"the value of f\[1\] is a int; expected a tensor"),
        (lambda x: [], ValueError, "the value of f hold no tensor"),
    ],
)
def test_the_value_must_be_real_tensors(f, error, message, mode):
    with pytest.raises(error, match=message):
        jacobian(f, normal(3), mode=mode)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "jackrev"}, ValueError, "mode='jackrev' is unknown: choose one of 'auto', "),
        ({"chunk_size": 0}, ValueError, "chunk_size=0; expected a positive int, or None"),
        ({"chunk_size": -2}, ValueError, "chunk_size=-2; expected a positive int"),
        ({"chunk_size": 1.5}, ValueError, "chunk_size=1.5; expected a positive int"),
        ({"memory_budget": 0}, ValueError, "memory_budget=0; expected a positive int"),
        ({"argnums": 1}, ValueError, r"argnums=1, but f was given 1 argument"),
        ({"argnums": (0, -1)}, ValueError, r"argnums=\(0, -1\) name an argument twice"),
        ({"argnums": "x"}, TypeError, "argnums='x'; expected an int or a tuple of ints"),
        ({"argnums": [0]}, TypeError, r"argnums=\[0\]; expected an int or a tuple of ints"),
        ({"argnums": ()}, TypeError, r"argnums=\(\); expected an int or a tuple of ints"),
        ({"argnums": True}, TypeError, "argnums=True; expected an int or a tuple of ints"),
    ],
)
def test_options_out_of_range_are_named(options, error, message):
    for function in (jacobian, hessian, jacobian_blocks, hessian_blocks):
        with pytest.raises(error, match=message):
            function(torch.sum, normal(3), **options)


def test_which_mode_is_of_a_jacobian_or_a_hessian():
    with pytest.raises(ValueError, match="of='gradient'; expected 'jacobian' or 'hessian'"):
        which_mode(torch.sum, normal(3), of="gradient")


def test_transforms_around_are_refused():
    def penalty(x: Tensor) -> Tensor:
        return jacobian(torch.sin, x).square().sum()

    for transformed in (torch.func.grad(penalty), torch.vmap(penalty)):
        with pytest.raises(RuntimeError, match="cannot run inside vmap, grad or another transform"):
            transformed(normal(3, 2))
