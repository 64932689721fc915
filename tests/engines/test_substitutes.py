"""What stands in for torch's functions computes the same, and has right derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from hvpopt.closure import ClosureOracle
from hvpopt.engines.needs import needed, off_leaf, remember
from hvpopt.engines.substitutes import SUBSTITUTES, substituted
from hvpopt.engines.support import differentiable_kernels


def rand(*shape, seed=0, positive=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x.abs() + 0.1 if positive else x).requires_grad_()


def by_ours(func, *args, **kwargs):
    out = substituted(func, args, kwargs)
    assert out is not None
    return out


LABELS = torch.tensor([0, 2, 1, 1])
SIGNS = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]], dtype=torch.float64)
SEVERAL = torch.tensor([[2, 0, -1, 1], [1, -1, 0, 2], [-1, 0, 1, 2], [3, 1, 2, 0]])
BAG = torch.tensor([0, 3, 1, 1, 4, 2])
WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

CASES = {
    "weight_norm": (torch._weight_norm, (rand(4, 3), rand(4, 1, seed=1), 0), {}),
    "weight_norm of columns": (torch._weight_norm, (rand(4, 3), rand(1, 3, seed=1), 1), {}),
    "weight_norm of all": (torch._weight_norm, (rand(4, 3), rand(1, seed=1)[0], -1), {}),
    "cdist": (torch.cdist, (rand(2, 3, 4), rand(2, 5, 4, seed=1)), {}),
    "cdist p=1": (torch.cdist, (rand(3, 4), rand(5, 4, seed=1)), {"p": 1.0}),
    "cdist p=3": (torch.cdist, (rand(3, 4), rand(5, 4, seed=1)), {"p": 3.0}),
    "huber": (F.huber_loss, (rand(4, 3), rand(4, 3, seed=1)), {"delta": 0.7}),
    "huber weighted": (
        F.huber_loss,
        (rand(4, 3), rand(4, 3, seed=1)),
        {"weight": rand(4, 3, seed=2, positive=True).detach()},
    ),
    "huber sum": (F.huber_loss, (rand(4, 3), rand(4, 3, seed=1)), {"reduction": "sum"}),
    "soft margin": (F.soft_margin_loss, (rand(2, 3), SIGNS), {}),
    "soft margin none": (F.soft_margin_loss, (rand(2, 3), SIGNS), {"reduction": "none"}),
    "multi margin": (F.multi_margin_loss, (rand(4, 3), LABELS), {}),
    "multi margin squared": (
        F.multi_margin_loss,
        (rand(4, 3), LABELS),
        {"p": 2, "margin": 0.6, "weight": WEIGHT, "reduction": "sum"},
    ),
    "multi margin unbatched": (F.multi_margin_loss, (rand(3), LABELS[1]), {}),
    "multilabel margin": (F.multilabel_margin_loss, (rand(4, 4), SEVERAL), {}),
    "multilabel margin unbatched": (
        F.multilabel_margin_loss,
        (rand(4), SEVERAL[0]),
        {"reduction": "sum"},
    ),
    **{
        f"embedding_bag {mode}": (F.embedding_bag, (BAG.view(2, 3), rand(5, 3)), {"mode": mode})
        for mode in ("sum", "mean", "max")
    },
    "embedding_bag offsets": (
        F.embedding_bag,
        (BAG, rand(5, 3), torch.tensor([0, 2, 2])),
        {"mode": "mean", "padding_idx": 1},
    ),
    "embedding_bag last offset": (
        F.embedding_bag,
        (BAG, rand(5, 3), torch.tensor([0, 2, 6])),
        {"mode": "sum", "include_last_offset": True, "per_sample_weights": rand(6, seed=3)},
    ),
    "max_unpool1d": (
        F.max_unpool1d,
        (rand(2, 3, 2), torch.tensor([0, 3]).expand(2, 3, 2)),
        {"kernel_size": 2},
    ),
    "max_unpool2d": (
        F.max_unpool2d,
        (rand(1, 2, 2, 2), torch.tensor([[0, 3], [9, 14]]).expand(1, 2, 2, 2)),
        {"kernel_size": 2},
    ),
    "batch_norm": (F.batch_norm, (rand(4, 3, 5), None, None), {"training": True}),
    "batch_norm affine": (
        F.batch_norm,
        (rand(4, 3, 2, 2), None, None, rand(3, seed=1), rand(3, seed=2)),
        {"training": True},
    ),
    "batch_norm scaled": (
        F.batch_norm,
        (rand(7, 3), None, None, rand(3, seed=1)),
        {"training": True, "eps": 0.1},
    ),
    "conv1d": (
        F.conv1d,
        (rand(2, 4, 7), rand(6, 2, 3, seed=1), rand(6, seed=2), 2, 1),
        {"groups": 2},
    ),
    "conv2d": (
        F.conv2d,
        (rand(2, 2, 5, 6), rand(3, 2, 3, 3, seed=1)),
        {"stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
    ),
    "conv2d same": (
        F.conv2d,
        (rand(1, 2, 5, 4), rand(3, 2, 3, 1, seed=1), rand(3, seed=2)),
        {"padding": "same"},
    ),
    "conv2d valid": (F.conv2d, (rand(1, 2, 4, 4), rand(1, 2, 2, 2, seed=1)), {"padding": "valid"}),
    "conv3d": (F.conv3d, (rand(1, 1, 3, 3, 4), rand(2, 1, 2, 2, 2, seed=1)), {}),
    "conv_transpose1d": (
        F.conv_transpose1d,
        (rand(2, 4, 3), rand(4, 2, 3, seed=1), rand(4, seed=2)),
        {"stride": 2, "output_padding": 1, "groups": 2},
    ),
    "conv_transpose2d": (
        F.conv_transpose2d,
        (rand(1, 2, 3, 3), rand(2, 1, 3, 2, seed=1)),
        {"padding": 1, "dilation": 2},
    ),
    "conv_transpose3d": (
        F.conv_transpose3d,
        (rand(1, 1, 2, 2, 2), rand(1, 1, 2, 2, 2, seed=1)),
        {},
    ),
}
if hasattr(F, "linear_cross_entropy"):
    CASES["linear_cross_entropy"] = (
        F.linear_cross_entropy,
        (rand(4, 5), rand(3, 5, seed=1), LABELS),
        {"linear_bias": rand(3, seed=2), "ignore_index": 1},
    )
    CASES["linear_cross_entropy with positions"] = (
        F.linear_cross_entropy,
        (rand(2, 5), rand(3, 4, 5, seed=1), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])),
        {"label_smoothing": 0.1, "reduction": "sum"},
    )


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


def test_the_value_and_gradient_are_torchs_own(case):
    func, args, kwargs = case
    leaves = [
        x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor) and x.requires_grad
    ]
    theirs, ours = func(*args, **kwargs), by_ours(func, *args, **kwargs)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.linspace(0.5, 1.5, theirs.numel(), dtype=torch.float64).view(theirs.shape)
    expected = torch.autograd.grad(theirs, leaves, cotangent)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, cotangent), expected)


@pytest.mark.filterwarnings("ignore:.*scatter_reduce.*:UserWarning")
def test_derivatives_of_both_modes_and_both_orders_are_those_of_differences(case):
    func, args, kwargs = case
    named = dict(enumerate(args)) | kwargs
    places = [k for k, x in named.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    leaves = [named[k].detach().clone().requires_grad_() for k in places]

    def f(*values):
        full = {**named, **dict(zip(places, values, strict=True))}
        positional = [full[i] for i in range(len(args))]
        rest = {k: full[k] for k in kwargs}
        out = substituted(func, tuple(positional), rest)
        return func(*positional, **rest) if out is None else out  # without gradients, by torch

    assert gradcheck(f, leaves, check_forward_ad=True)
    assert gradgradcheck(f, leaves, check_fwd_over_rev=True)


def test_what_has_no_meaning_here_is_left_to_torch():
    x, w = rand(2, 3), rand(5, 3)
    assert substituted(F.soft_margin_loss, (x, SIGNS), {"size_average": True}) is None
    assert substituted(F.embedding_bag, (BAG.view(2, 3), w), {"sparse": True}) is None
    assert substituted(torch.sin, (x,), {}) is None
    assert substituted(F.batch_norm, (rand(4, 3), None, None), {"training": False}) is None
    assert substituted(F.conv1d, (rand(2, 4, 7), rand(6, 4, 2)), {"padding": "same"}) is None
    with torch.no_grad():
        assert substituted(F.conv1d, (rand(2, 4, 7), rand(6, 4, 2)), {}) is None


def test_the_third_derivative_of_batch_norm_is_that_of_its_definition():
    """Torch's own takes the statistics for constants there."""
    x, w = rand(4, 3, 2), rand(3, seed=1)

    def definition(x):
        variance, mean = torch.var_mean(x, [0, 2], unbiased=False, keepdim=True)
        return (x - mean) * (variance + 1e-5).rsqrt() * w.view(1, -1, 1)

    def third(f):
        (first,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * first.cos()).sum(), x, create_graph=True)
        return torch.autograd.grad((second**2).sum(), x)[0]

    ours = third(lambda x: by_ours(F.batch_norm, x, None, None, w, None, True))
    torch.testing.assert_close(ours, third(definition), rtol=1e-9, atol=1e-9)


def test_running_statistics_advance_as_torchs_own():
    x, ours, theirs = rand(6, 3, 4).detach(), nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    with differentiable_kernels():
        ours(x)
    theirs(x)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolutions_under_autocast_are_torchs_own(dtype):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2))
    x = rand(2, 2, 5, 5).detach().float()
    with torch.autocast("cpu", dtype):
        expected = net(x)
        with differentiable_kernels():
            ours = net(x)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected)
    grads = [
        torch.autograd.grad(y.float().square().sum(), net.parameters()) for y in (ours, expected)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=0.05, atol=0.05)


def test_only_the_gradients_that_a_pass_asks_for_are_computed():
    asked = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(x, w):
            return x * w

        @staticmethod
        def setup_context(ctx, inputs, output):
            remember(ctx, inputs)
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            asked.append(needed(ctx))
            x, w = ctx.saved_tensors
            return g * w, g * x

    x, w = rand(3), rand(3, seed=1)
    y = Product.apply(off_leaf(x), off_leaf(w)).sum()
    for inputs in ([x], [w], [x, w]):
        torch.autograd.grad(y, inputs, retain_graph=True)
    y.backward()
    assert asked == [[True, False], [False, True], [True, True], [True, True]]


def test_a_checkpointed_layer_runs_again_with_the_same_functions():
    """A function mode rests while torch.autograd.grad, itself a torch function, is handled."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Tanh()).double()
    x, params = rand(4, 1, 5).detach(), list(net.parameters())
    v = [torch.ones_like(p) for p in params]

    def product(checkpointed, engine):
        def closure():
            net.zero_grad()
            z = checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
            loss = z.square().mean()
            loss.backward()
            return loss

        with ClosureOracle(closure, params, engine=engine, leave_no_trace=True) as oracle:
            return oracle.trace().product(v)

    for engine in ("graph", "dual"):
        torch.testing.assert_close(product(True, engine), product(False, engine))


def test_every_substitute_is_tested():
    tested = {func for func, _, _ in CASES.values()} | {F.max_unpool3d}
    assert set(SUBSTITUTES) <= tested
