"""The public dual-number context against double backward and closed forms."""

import pytest
import torch
import torch.nn.functional as F
from cubes import Cube
from problems import PROBLEMS, flat, problem
from torch import Tensor, nn
from torch.autograd import forward_ad

from hvpopt.dual import dual


def assert_plain(params: list[Tensor]) -> None:
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        for p in params:
            assert forward_ad.unpack_dual(p).tangent is None
            assert p.grad is None or forward_ad.unpack_dual(p.grad).tangent is None


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_backward_gives_the_dense_hessians_product_and_plain_gradients(name):
    case = problem(name)
    v, params = case.tangent(), case.params
    expected = case.dense_hessian() @ flat(v)
    values = [p.detach().clone() for p in params]
    torch.manual_seed(0)
    case.loss(case.net(case.x)).backward()
    grads = [p.grad.clone() for p in params]
    case = problem(name)
    params = case.params
    torch.manual_seed(0)
    with dual(case.net.parameters(), v) as d:
        loss = case.loss(case.net(case.x))
        loss.backward()
    assert_plain(params)
    torch.testing.assert_close(flat(d.hvp), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat([p.grad for p in params]), flat(grads))
    torch.testing.assert_close(d.jvp, flat(grads) @ flat(v))
    torch.testing.assert_close(d.loss, loss.detach())
    for p, value, hv in zip(params, values, d.hvp, strict=True):
        assert torch.equal(p, value)
        assert not hv.requires_grad


def test_the_world_advances_as_by_one_ordinary_step():
    case, other = problem("batchnorm"), problem("batchnorm")
    with dual(case.params, case.tangent()):
        case.loss(case.net(case.x)).backward()
    other.loss(other.net(other.x)).backward()
    for mine, plain in zip(case.net.buffers(), other.net.buffers(), strict=True):
        assert torch.equal(mine, plain)
    with forward_ad.dual_level():
        assert all(forward_ad.unpack_dual(b).tangent is None for b in case.net.buffers())


def test_several_backward_calls_add_up_and_gradients_accumulate():
    w, v = nn.Parameter(torch.tensor([1.0, 2.0])), torch.tensor([1.0, -1.0])
    w.grad = torch.ones(2)
    with dual([w], [v]) as d:
        (w**3).sum().backward()
        (F.silu(w).sum() * 0 + (w**4).sum()).backward()
    torch.testing.assert_close(d.hvp[0], (6 * w + 12 * w**2).detach() * v)
    torch.testing.assert_close(w.grad, (1 + 3 * w**2 + 4 * w**3).detach())
    torch.testing.assert_close(d.jvp, ((3 * w**2 + 4 * w**3) * v).sum().detach())
    torch.testing.assert_close(d.loss, (w**3 + w**4).sum().detach())


def test_a_step_with_clipping_inside_the_block():
    case, other = problem("mlp"), problem("mlp")
    v, optimizers = case.tangent(), []
    expected = case.dense_hessian() @ flat(v)
    for c in (case, other):
        optimizers.append(torch.optim.SGD(c.params, lr=0.1))
    with dual(case.params, v) as d:
        case.loss(case.net(case.x)).backward()
        nn.utils.clip_grad_norm_(case.params, 0.01)
        optimizers[0].step()
    other.loss(other.net(other.x)).backward()
    nn.utils.clip_grad_norm_(other.params, 0.01)
    optimizers[1].step()
    torch.testing.assert_close(flat(d.hvp), expected)
    torch.testing.assert_close(flat(case.params), flat(other.params))
    assert_plain(case.params)


def test_parameters_that_the_loss_does_not_use_have_zero_products():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    with dual([used, unused], [torch.ones(2), torch.ones(3)]) as d:
        (used**2).sum().backward()
    assert [x.tolist() for x in d.hvp] == [[2.0, 2.0], [0.0, 0.0, 0.0]]
    assert unused.grad is None


def test_half_precision_parameters_and_a_scaled_loss():
    w, v = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16)), torch.ones(2).bfloat16()
    with dual([w], [v]) as d:
        (8 * (w**3).sum()).backward()
    assert d.hvp[0].dtype == torch.bfloat16
    assert d.hvp[0].tolist() == [48.0, 96.0]


def test_an_exception_inside_leaves_parameters_as_they_were():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))

    def loss() -> Tensor:
        (w**3).sum()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), dual([w], [torch.ones(2)]):
        loss().backward()
    assert w.tolist() == [1.0, 2.0]
    assert w.grad is None
    assert_plain([w])
    (w**2).sum().backward()
    assert w.grad.tolist() == [2.0, 4.0]


def test_results_without_a_backward_are_an_error():
    w = nn.Parameter(torch.ones(2))
    with dual([w], [torch.ones(2)]) as d:
        torch.autograd.grad((w**2).sum(), w)
    for read in (lambda: d.hvp, lambda: d.jvp, lambda: d.loss):
        with pytest.raises(RuntimeError, match=r"loss.backward\(\) was not called inside"):
            read()


def test_levels_do_not_nest():
    w = nn.Parameter(torch.ones(2))
    with dual([w], [torch.ones(2)]) as outer:
        with pytest.raises(RuntimeError, match="inside another level of forward mode"):
            with dual([w], [torch.ones(2)]):
                pass
        (w**2).sum().backward()
    assert outer.hvp[0].tolist() == [2.0, 2.0]
    with dual([w], [torch.ones(2)]) as again:
        (w**3).sum().backward()
    assert again.hvp[0].tolist() == [6.0, 6.0]


def test_directions_and_parameters_that_do_not_fit_are_named():
    w = nn.Parameter(torch.ones(2))
    for v, message in (
        ([], "v has 0 tensors for 1 parameters; expected one each"),
        ([torch.ones(3)], r"v\[0\] has shape torch.Size\(\[3\]\); expected the parameter's"),
        ([torch.ones(2).double()], r"v\[0\] has dtype torch.float64; expected"),
        ([torch.ones(2, device="meta")], r"v\[0\] has device meta; expected"),
    ):
        with pytest.raises(ValueError, match=message):
            dual([w], v)
    with pytest.raises(ValueError, match=r"params\[0\] is not a leaf that requires a gradient"):
        dual([torch.ones(2)], [torch.ones(2)])
    with pytest.raises(ValueError, match=r"params\[0\] is not a leaf"):
        dual([2 * w], [torch.ones(2)])
    with pytest.raises(ValueError, match="params hold no tensor"):
        dual([], [])


def test_what_forward_mode_gets_wrong_or_lacks_is_an_error_with_the_remedy():
    w = nn.Parameter(torch.ones(2))
    with (
        pytest.raises(RuntimeError, match="must implement the jvp function"),
        dual([w], [torch.ones(2)]),
    ):
        Cube.apply(w).sum().backward()
    with (
        pytest.raises(RuntimeError, match=r"thorough=True helps.*hvpopt.products.hvp"),
        dual([w], [torch.ones(2)], thorough=False),
    ):
        F.silu(w).sum().backward()
    assert w.tolist() == [1.0, 1.0]
    assert_plain([w])


@pytest.mark.parametrize("thorough", [None, True])
def test_silu_is_recognised(thorough):
    w = nn.Parameter(torch.linspace(-2, 2, 5, dtype=torch.float64))
    with dual([w], [torch.ones(5).double()], thorough=thorough) as d:
        F.silu(w).sum().backward()
    expected = torch.autograd.functional.hessian(lambda p: F.silu(p).sum(), w.detach())
    torch.testing.assert_close(d.hvp[0], expected.sum(1))
