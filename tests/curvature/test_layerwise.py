"""Estimates by layer against the blocks of dense matrices; curvature operators of networks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from problems import problem
from spectra import in_parts, joined, seeded, with_eigenvalues
from torch import nn

from hvpopt.curvature import (
    diagonal,
    effective_dimension,
    frobenius_norm,
    layerwise,
    layerwise_trace,
    named_blocks,
    spectral_density,
    top_eigenpairs,
    trace,
)
from hvpopt.operators import FisherOperator, GGNOperator, HessianOperator

MATRIX = with_eigenvalues([10 * 0.8**i for i in range(30)])


def test_the_traces_of_all_tensors_come_from_the_same_products():
    calls = []
    operator = in_parts(MATRIX, num_calls=calls)
    found = layerwise_trace(operator, num_probes=2000, generator=seeded())
    assert list(found) == ["0", "1", "2"]
    assert sum(calls) == 2000
    for name, part in zip(found, (slice(4), slice(4, 5), slice(5, None)), strict=True):
        block = MATRIX[part, part]
        estimate = found[name]
        assert abs(estimate.value - float(block.trace())) < 3.5 * estimate.standard_error
        rest = MATRIX[part].norm() ** 2 - block.norm() ** 2
        own = block.norm() ** 2 - (block.diagonal() ** 2).sum()
        variance = float(2 * own + rest) / 2000
        assert estimate.standard_error == pytest.approx(variance**0.5, rel=0.1)
        assert estimate.num_products == 2000


def test_blocks_of_several_tensors_have_the_sum():
    each = layerwise_trace(in_parts(MATRIX), num_probes=7, generator=seeded())
    both = layerwise_trace(in_parts(MATRIX), blocks={"a": [0, 2]}, num_probes=7, generator=seeded())
    assert list(both) == ["a"]
    assert both["a"].value == pytest.approx(each["0"].value + each["2"].value)
    whole = trace(in_parts(MATRIX), num_probes=7, generator=seeded())
    assert sum(x.value for x in each.values()) == pytest.approx(whole.value)


def test_any_estimate_of_each_block_is_that_of_the_dense_block():
    tops = layerwise(
        partial(top_eigenpairs, rtol=1e-9, generator=seeded()),
        in_parts(MATRIX),
        blocks={"end": [1, 2]},
    )
    expected = torch.linalg.eigvalsh(MATRIX[4:, 4:])[-1]
    assert tops["end"].values[0] == pytest.approx(float(expected))
    norms = layerwise(partial(frobenius_norm, num_probes=300), in_parts(MATRIX))
    assert list(norms) == ["0", "1", "2"]
    assert norms["1"].value == pytest.approx(float(MATRIX[4, 4]))


def test_modules_name_their_parameters_and_the_first_owner_has_the_shared_ones():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.body = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
            self.tied = nn.Linear(2, 3)
            self.tied.weight = self.body[0].weight

    net = Net()
    blocks = named_blocks(net)
    assert list(blocks) == ["Net", "body.0", "body.2", "tied"]
    assert [len(x) for x in blocks.values()] == [1, 2, 2, 1]
    assert blocks["tied"][0] is net.tied.bias
    net.body[0].requires_grad_(False)
    assert list(named_blocks(net)) == ["Net", "body.2", "tied"]
    assert list(named_blocks(net, [net.scale])) == ["Net"]
    with pytest.raises(ValueError, match="Tanh holds none of the parameters"):
        named_blocks(nn.Tanh())


def test_bad_blocks_are_answered_by_name():
    for call in (partial(layerwise, top_eigenpairs), layerwise_trace):
        with pytest.raises(ValueError, match="blocks is empty"):
            call(in_parts(MATRIX), blocks={})
        with pytest.raises(ValueError):  # noqa: PT011 - the operator's own message
            call(in_parts(MATRIX), blocks={"none": [7]})
    with pytest.raises(ValueError, match="layerwise_trace needs num_probes ≥ 1, got 0"):
        layerwise_trace(in_parts(MATRIX), num_probes=0)


@pytest.fixture(scope="module")
def network():
    return problem("mlp")


def operators(network):
    def loss(batch):
        return F.cross_entropy(network.net(batch[0]), batch[1])

    labels = torch.arange(6) % 3
    parts = [(network.x[:4], labels[:4]), (network.x[4:], labels[4:])]
    for data in ([(network.x, labels)], parts):
        yield HessianOperator(loss, network.params, data), network.dense_hessian()
        yield GGNOperator(loss, network.params, data), network.dense_ggn()
        yield FisherOperator(loss, network.params, data), network.dense_ggn()


def test_hessian_ggn_and_fisher_over_one_batch_and_several_are_the_dense_matrix(network):
    for operator, dense in operators(network):
        top = top_eigenpairs(operator, k=2, rtol=1e-9, generator=seeded())
        assert top.values == pytest.approx(torch.linalg.eigvalsh(dense)[[-1, -2]].tolist())
        n = len(dense)
        exact = trace(operator, method="xtrace", num_probes=n + 1, generator=seeded())
        assert exact.value == pytest.approx(float(dense.trace()))
        found = diagonal(operator, method="xdiag", num_probes=2 * n, generator=seeded())
        torch.testing.assert_close(joined(found.value), dense.diagonal())
        operator.close()


def test_layers_of_a_network_are_blocks_of_the_dense_hessian(network):
    operator, dense = next(operators(network))
    blocks = named_blocks(network.net)
    assert list(blocks) == ["0", "2", "4"]
    sizes = [sum(p.numel() for p in block) for block in blocks.values()]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    tops = layerwise(partial(top_eigenpairs, rtol=1e-9), operator, blocks=blocks)
    traces = layerwise_trace(operator, blocks=blocks, num_probes=400, generator=seeded())
    for name, size, end in zip(blocks, sizes, ends, strict=True):
        block = dense[end - size : end, end - size : end]
        assert tops[name].values[0] == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]))
        error = traces[name].standard_error
        assert abs(traces[name].value - float(block.trace())) < 4 * error
    operator.close()


def test_the_density_of_a_network_has_the_moments_of_its_hessian(network):
    operator, dense = next(operators(network))
    density = spectral_density(operator, num_probes=200, num_steps=20, generator=seeded())
    for degree in (1, 2):
        found = density.expectation(lambda x, degree=degree: x**degree)
        expected = float(torch.linalg.matrix_power(dense, degree).trace()) / len(dense)
        assert abs(found.value - expected) < 4 * found.standard_error
    operator.close()
    ggn = list(operators(network))[1]
    values = torch.linalg.eigvalsh(ggn[1]).clamp(min=0)
    found = effective_dimension(ggn[0], damping=0.01, num_probes=200, generator=seeded())
    assert abs(found.value - float((values / (values + 0.01)).sum())) < 4 * found.standard_error
