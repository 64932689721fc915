"""Every mode of a Hessian product: the same product, one run, the same errors."""

import pytest
import torch
import torch.nn.functional as F
from cubes import Once
from functional import Tree, combined, inner, joined, normal, normal_like
from hvpopt.experiments.benchmarks.timing import peak_bytes
from product_problems import EXACT, MODES, NETWORKS, exact_hvp, problem
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hvpopt.products import grad_and_hvp, hvp, hvp_finite_difference, jvp, linearize


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_exact_mode_gives_the_dense_hessian(name, mode):
    f, params, x = problem(name)
    v = normal_like(params)
    loss, grad, hv = grad_and_hvp(f, params, v, x, mode=mode)
    assert list(hv) == list(params)
    torch.testing.assert_close(joined(hv), exact_hvp(name, v), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, f(params, x))
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    f(leaves, x).backward()
    torch.testing.assert_close(joined(grad), joined(combined(lambda p: p.grad, leaves)))
    assert not loss.requires_grad
    assert not any(t.requires_grad for t in (*grad.values(), *hv.values()))
    torch.testing.assert_close(joined(hvp(f, params, v, x, mode=mode)), joined(hv))


@pytest.mark.parametrize("mode", EXACT)
def test_what_is_once_differentiable_is_an_error_but_for_differences(mode):
    p, v = normal(4), normal(4, seed=1)
    for product in (lambda f: hvp(f, p, v, mode=mode), lambda f: linearize(f, p).hvp(v)):
        with pytest.raises(RuntimeError, match=r"once_differentiable|override the setup_context"):
            product(lambda q: Once.apply(q).sum())
    for product in (
        lambda: hvp(lambda q: Once.apply(q).sum(), p, v),
        lambda: jvp(Once.apply, p, v, mode="double_reverse"),
    ):
        with pytest.raises(RuntimeError, match=r"marked once_differentiable: write it"):
            product()
    found = hvp_finite_difference(lambda q: Once.apply(q).sum(), p, v)
    torch.testing.assert_close(found.value, 6 * p * v)


@pytest.mark.parametrize("mode", MODES)
def test_modes_agree_on_errors_and_leave_parameters_alone(mode):
    p = torch.ones(3)
    with pytest.raises(ValueError, match=r"f returned a tensor of shape \(3,\)"):
        hvp(torch.square, p, p, mode=mode)

    def failing(q: Tensor) -> Tensor:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        hvp(failing, p, p, mode=mode)
    constant = hvp(lambda q: torch.tensor(3.0), p, p, mode=mode)
    assert constant.tolist() == [0.0, 0.0, 0.0]
    assert p.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("mode", EXACT)
def test_one_product_of_each_mode_is_one_run_of_the_function(mode):
    calls = []

    def f(p: Tensor) -> Tensor:
        calls.append(1)
        return (p**3).sum()

    grad_and_hvp(f, normal(2), normal(2), mode=mode)
    assert len(calls) == 1


def test_forward_over_reverse_takes_less_memory_than_jvp_of_torch_func_grad():
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)])
    x = torch.randn(256, 64)
    params = {k: p.detach() for k, p in net.named_parameters()}
    v = normal_like(params)

    def f(p: Tree) -> Tensor:
        return functional_call(net, p, (x,)).square().mean()

    cpu = torch.device("cpu")
    lean = peak_bytes(lambda: hvp(f, params, v, mode="forward_over_reverse"), cpu)
    composing = peak_bytes(lambda: torch.func.jvp(torch.func.grad(f), (params,), (v,)), cpu)
    gradient = peak_bytes(lambda: torch.func.grad(f)(params), cpu)
    assert lean < 0.7 * composing
    assert lean < 2.5 * gradient


def test_products_are_symmetric_in_every_mode():
    f, params, x = problem("attention")
    u, v = normal_like(params, seed=1), normal_like(params, seed=2)
    for mode in EXACT[1:]:
        hu, hv = (hvp(f, params, t, x, mode=mode) for t in (u, v))
        assert inner(u, hv) == pytest.approx(inner(v, hu), rel=1e-10)


def test_checkpointed_layers_run_again_with_the_same_kernels():
    x, p, vs = normal(5, 4), normal(4, seed=1), normal(3, 4, seed=2)

    def layer(x: Tensor) -> Tensor:
        y = F.batch_norm(x, None, None, training=True)
        return F.huber_loss(y**2, torch.zeros_like(y))

    def f(p: Tensor) -> Tensor:
        return checkpoint(layer, x * p, use_reentrant=False)

    expected = hvp(lambda p: layer(x * p), p, vs)
    torch.testing.assert_close(hvp(f, p, vs), expected)
    torch.testing.assert_close(hvp(f, p, vs[0]), expected[0])
    torch.testing.assert_close(torch.vmap(linearize(f, p).hvp)(vs), expected)
