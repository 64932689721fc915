"""Each example's own Jacobian, for the price of one example's rows or columns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functional import normal, params_of
from hvpopt.experiments.benchmarks.timing import peak_bytes
from jacobian_cases import NETWORKS, SIX, close, every_way, network
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvpopt.jacobians import jacobian


def examples_jacobians(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One example at a time, by torch.autograd.functional."""
    with sdpa_kernel(SDPBackend.MATH):
        each = [torch.autograd.functional.jacobian(lambda e: f(e[None])[0], e) for e in x]
    return torch.stack(each)


@every_way
@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_has_each_examples_own_jacobian(name, mode):
    net, x = network(name)
    found = jacobian(net.eval(), x, mode=mode, batched=True)
    close(found, examples_jacobians(net, x))


@pytest.mark.parametrize("mode", SIX)
def test_a_batch_takes_one_examples_number_of_rows_or_columns(mode):
    """Counted in derivatives of sin that are computed, over the whole batch of 50."""
    num_examples, n, m = 50, 3, 2
    w = normal(m, n)
    x = normal(num_examples, n)
    worked = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(y: Tensor) -> Tensor:
            return y.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            worked.append(grad.shape)
            return grad * ctx.saved_tensors[0].cos()

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            worked.append(tangent.shape)
            return tangent * ctx.saved_tensors[0].cos()

        @staticmethod
        def vmap(info: Any, in_dims: Any, y: Tensor) -> tuple[Tensor, int]:
            return y.movedim(in_dims[0], 0).sin(), 0

    def f(x: Tensor) -> Tensor:
        return Counted.apply(x @ w.T)

    if mode in ("vjp_vmap", "jacrev", "jacfwd"):
        f_vmapped = lambda x: (x @ w.T).sin()  # noqa: E731
        found = jacobian(f_vmapped, x, mode=mode, batched=True)
        peak = peak_bytes(
            lambda: jacobian(f_vmapped, x, mode=mode, batched=True), torch.device("cpu")
        )
        assert peak < 8 * 20 * num_examples * (m * n + m + n)  # the square has 8·2500·6 bytes
    else:
        found = jacobian(f, x, mode=mode, batched=True)
        lines = m if mode == "vjp_loop" else n
        assert len(worked) == lines + 1  # and one for the check
    close(found, (x @ w.T).cos()[:, :, None] * w)


def test_a_batch_of_trees_has_trees_of_jacobians():
    x = {"a": normal(4, 2), "b": normal(4, 3, 2, seed=1)}

    def f(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return x["a"].sin(), (x["b"] @ x["a"][:, :, None])[..., 0].sum(1)

    for mode in SIX:
        first, second = jacobian(f, x, mode=mode, batched=True)
        close(first["a"], torch.diag_embed(x["a"].cos()))
        assert not first["b"].any()
        close(second["a"], x["b"].sum(1))
        close(second["b"], x["a"][:, None].expand(4, 3, 2))
        assert second["b"].shape == (4, 3, 2)


@every_way
def test_examples_that_depend_on_each_other_are_refused(mode):
    net, x = network("batch norm")
    coupled = "f's value for one example depends on other examples .*BatchNorm in training mode"
    params, buffers = params_of(net), dict(net.named_buffers())

    def train(x: Tensor) -> Tensor:
        copies = {name: b.clone() for name, b in buffers.items()}
        return functional_call(net, (params, copies), (x,))

    with pytest.raises(ValueError, match=coupled):
        jacobian(train, x, mode=mode, batched=True)
    with pytest.raises(ValueError, match=coupled):
        jacobian(lambda x: x.cumsum(0), normal(2, 3), mode=mode, batched=True)
    with pytest.raises(ValueError, match=coupled):  # one pair of many
        jacobian(lambda x: x + (x[4] * torch.eye(9)[:, :1]), normal(9, 3), mode=mode, batched=True)


def test_batched_takes_and_gives_examples():
    with pytest.raises(ValueError, match=r"the input has a tensor of shape \(\)"):
        jacobian(torch.sin, normal(), batched=True)
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected the same first dimension"):
        jacobian(lambda x: x[0], [normal(4), normal(2, 3)], batched=True)
    with pytest.raises(ValueError, match=r"f's value has .* shape \(3,\); expected \(4, \.\.\.\)"):
        jacobian(lambda x: x.sum(0), normal(4, 3), batched=True)


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(16, 8)


@pytest.mark.parametrize("mode", ["vjp_loop", "jacfwd"])
def test_independent_examples_pass_in_low_precision(mode):
    net, x = perceptron()
    exact = jacobian(net, x, mode=mode, batched=True)
    net, x = net.bfloat16(), x.bfloat16()
    found = jacobian(net, x, mode=mode, batched=True)
    assert (found - exact).norm() < 0.05 * exact.norm()
    with pytest.raises(ValueError, match="lower precision"):
        jacobian(lambda x: net(x - x.mean(0)), x[:2], mode=mode, batched=True)


@pytest.mark.parametrize("mode", ["vjp_loop", "jacfwd"])
def test_independent_examples_pass_under_autocast(mode):
    net, x = perceptron()
    exact = jacobian(net, x, mode=mode, batched=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = jacobian(net, x, mode=mode, batched=True)
    assert (found - exact).norm() < 0.05 * exact.norm()
