"""The oracle itself, against closed forms."""

import torch
from differences import along, ggn_product, gradient, hessian_product, restored
from model_checks import classifier
from problems import flat
from torch import Tensor, nn


def cubes() -> tuple[nn.Parameter, list[Tensor]]:
    return nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)), [
        torch.tensor([1.0, -3.0], dtype=torch.float64)
    ]


def test_the_derivative_of_a_quintic_is_exact_but_for_rounding():
    w, v = cubes()
    estimate = along(lambda: [w.detach() ** 5, w.detach().sum().reshape(1, 1)], [w], v)
    torch.testing.assert_close(estimate.value[0], 5 * w.detach() ** 4 * v[0], rtol=1e-11, atol=0)
    torch.testing.assert_close(estimate.value[1], v[0].sum().reshape(1, 1), rtol=1e-11, atol=0)
    assert w.tolist() == [1.0, 2.0]


def test_hessian_and_ggn_of_cubes_are_those_of_the_closed_form():
    w, v = cubes()

    def closure() -> None:
        (w**3).square().sum().backward()

    hessian = hessian_product(closure, [w], v)
    torch.testing.assert_close(hessian.value[0], 30 * w.detach() ** 4 * v[0], rtol=1e-10, atol=0)
    ggn = ggn_product(lambda: w**3, lambda z: z.square().sum(), [w], v)
    torch.testing.assert_close(ggn.value[0], 18 * w.detach() ** 4 * v[0], rtol=1e-10, atol=0)
    for estimate in (hessian, ggn):
        true = (30 if estimate is hessian else 18) * w.detach() ** 4 * v[0]
        assert float((estimate.value[0] - true).norm()) < max(estimate.error, 1e-9)
        assert estimate.error < 1e-7
    assert w.grad is None


def test_a_rough_function_has_a_large_error_estimate():
    w, v = cubes()
    estimate = along(lambda: [(900 * w.detach()).sin()], [w], v)
    assert estimate.error > 10


def test_every_evaluation_draws_the_same_numbers_and_leaves_buffers_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model = classifier(net, torch.randn(5, 3, dtype=torch.float64))
    before = {name: (b, b.clone()) for name, b in net.named_buffers()}
    state = torch.get_rng_state()
    grads = [flat(gradient(model.closure, model.params, net)) for _ in range(2)]
    assert torch.equal(*grads)
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in net.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])
    with restored(net):
        drawn = torch.rand(2)
        net(model.inputs[0])
        assert int(net[1].num_batches_tracked) == 1
    assert int(net[1].num_batches_tracked) == 0
    with restored(net):
        assert torch.equal(torch.rand(2), drawn)
