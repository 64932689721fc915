import pytest
import torch
from problems import closure_of, problem
from torch import nn

from hvpopt.optim.adahessian import AdaHessian, block_average
from hvpopt.optim.probes import rademacher, seed_of_step

A = torch.tensor([[2.0, 0.5], [0.5, -1.0]], dtype=torch.float64)
B = torch.tensor([1.0, -1.0], dtype=torch.float64)


def quadratic():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    return w, lambda: 0.5 * w @ A @ w - B @ w


@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("engine", ["auto", "dual", "graph"])
def test_it_follows_a_hand_computed_trace(engine, power, update_every):
    w, loss = quadratic()
    lr, beta1, beta2, eps, decay = 0.1, 0.8, 0.7, 0.01, 0.2
    optimizer = AdaHessian(
        [w], lr, (beta1, beta2), power, eps, decay, update_every=update_every, seed=9,
        engine=engine,
    )  # fmt: skip
    p, m, v, num_estimates = [1.0, 2.0], [0.0, 0.0], [0.0, 0.0], 0
    for step in range(7):
        g = [2 * p[0] + 0.5 * p[1] - 1, 0.5 * p[0] - p[1] + 1]
        if step % update_every == 0:
            z = rademacher([w], seed_of_step(9, step))[0].tolist()
            d = [2 + 0.5 * z[0] * z[1], 0.5 * z[0] * z[1] - 1]
            v = [beta2 * v[i] + (1 - beta2) * d[i] ** 2 for i in range(2)]
            num_estimates += 1
        m = [beta1 * m[i] + (1 - beta1) * g[i] for i in range(2)]
        for i in range(2):
            size = (v[i] / (1 - beta2**num_estimates)) ** (power / 2)
            p[i] -= lr * (m[i] / (1 - beta1 ** (step + 1)) / (size + eps) + decay * p[i])
        optimizer.step(closure_of(optimizer, loss))
        for got, want in (
            (w.detach(), p),
            (optimizer.state[w]["momentum"], m),
            (optimizer.state[w]["square"], v),
        ):
            torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
        assert optimizer.last_report.num_products == (step % update_every == 0)


def test_blocks_are_rows_of_matrices_and_kernels_of_convolutions():
    torch.manual_seed(0)
    for shape in ((3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 2, 2)):
        d = torch.randn(shape)
        expected = torch.empty(shape)
        for index in range(d.numel()):
            place = torch.unravel_index(torch.tensor(index), shape)
            block = {1: d[place], 2: d[place[0]]}.get(len(shape), d[tuple(place[:2])])
            expected[place] = block.abs().mean()
        torch.testing.assert_close(block_average(d), expected)


def test_a_network_is_averaged_over_blocks_unless_told_otherwise():
    for averages in (True, False):
        task = problem("groupnorm")
        optimizer = AdaHessian(task.params, block_averaging=averages)
        optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x))))  # noqa: B023
        kernel, row = (optimizer.state[task.params[i]]["square"] for i in (0, 4))
        assert kernel.dim() == 4
        assert row.dim() == 2
        assert (len(kernel[0, 0].unique()) == 1) == averages
        assert (len(row[0].unique()) == 1) == averages
        assert len(row[:, 0].unique()) > 1


def test_with_power_zero_it_is_adam_without_its_denominator():
    task, other = problem("mlp"), problem("mlp")
    optimizer = AdaHessian(task.params, 0.1, hessian_power=0.0, eps=0.0)
    momentum = [torch.zeros_like(p) for p in other.params]
    for step in range(1, 4):
        optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x))))
        other.closure()()
        with torch.no_grad():
            for p, m in zip(other.params, momentum, strict=True):
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                p.sub_(0.1 * m / (1 - 0.9**step))
    for p, q in zip(task.params, other.params, strict=True):
        torch.testing.assert_close(p, q)


def test_the_report_gives_quantiles_of_the_running_curvature():
    w = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = AdaHessian([w])
    a = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0], dtype=torch.float64)
    optimizer.step(closure_of(optimizer, lambda: 0.5 * (a * w**2).sum()))
    report = optimizer.last_report
    assert report.curvature_median == pytest.approx(3.0)
    assert report.curvature_low == pytest.approx(1.2)
    assert report.curvature_high == pytest.approx(4.8)


def test_smoke_it_learns():
    task = problem("batchnorm", torch.float32)
    optimizer = AdaHessian(task.params)
    closure = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    losses = [float(optimizer.step(closure)) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hessian_power": 1.5}, r"hessian_power=1\.5 is out of range: expected a number between"),
        ({"block_averaging": 3}, r"block_averaging=3: expected True or False"),
        ({"betas": (0.9, 0.99, 0.1)}, r"betas=\(0\.9, 0\.99, 0\.1\): expected two numbers"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaHessian([nn.Parameter(torch.ones(2))], **options)
