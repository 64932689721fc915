"""Reverse over forward mode, and where torch would make it wrong."""

import pytest
import torch
from functional import normal
from torch import Tensor, nn
from torch.func import functional_call

from hvpopt.products import hvp


def test_reverse_over_forward_refuses_what_it_would_get_wrong():
    p = normal(3, 3)
    for function in (torch.linalg.det, Tensor.det, torch.logdet):
        with pytest.raises(RuntimeError, match=r"Reverse over forward mode is wrong through .*det"):
            hvp(function, p @ p.T, p, mode="reverse_over_forward")
    with pytest.raises(RuntimeError, match=r"through torch's layer_norm.*mode='forward_over"):
        hvp(lambda q: torch.layer_norm(q, (3,)).sum(), p, p, mode="reverse_over_forward")


def test_reverse_over_forward_updates_running_statistics_once():
    x = normal(5, 4, 6)

    def f(p: Tensor, norm: nn.Module, buffers: dict[str, Tensor]) -> Tensor:
        buffers.update({k: b.clone() for k, b in norm.named_buffers()})
        return functional_call(norm, buffers, (x * p.detach() + 0 * p,)).sin().sum()

    for norm in (nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)):
        norm, results = norm.double(), []
        for mode in ("reverse_over_reverse", "reverse_over_forward"):
            buffers: dict[str, Tensor] = {}
            hvp(f, normal(6), normal(6, seed=1), norm, buffers, mode=mode)
            results.append(buffers)
        assert results[0]["running_mean"].any()
        for key in results[0]:
            torch.testing.assert_close(results[1][key], results[0][key])


_aten = torch.ops.aten
UNSEEN = {
    "NativeLayerNorm": lambda x: _aten.layer_norm(x, [4]),
    "NativeBatchNorm": lambda x: _aten.batch_norm(x, *[None] * 4, True, 0.1, 1e-5, False),
    "LinalgDet": lambda x: _aten.linalg_det(x.T @ x),
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", UNSEEN)
def test_reverse_over_forward_refuses_wrong_formulas_that_it_cannot_replace(name, recorded):
    x, p, v = normal(5, 4), normal(4, seed=1).requires_grad_(recorded), normal(4, seed=2)
    with pytest.raises(RuntimeError, match=rf"wrong through {name}\w+, .* from TorchScript"):
        hvp(lambda p: UNSEEN[name](x * p).pow(3).sum(), p, v, mode="reverse_over_forward")


def test_batch_norm_in_eval_mode_is_right_wherever_it_is_called_from():
    x, p, v = normal(5, 4), normal(4, seed=1), normal(4, seed=2)
    mean, var = torch.zeros_like(p), torch.ones_like(p)

    def f(p: Tensor) -> Tensor:
        y = _aten.batch_norm(x * p, None, None, mean, var, False, 0.1, 0.0, False)
        return y.pow(3).sum()

    expected = 6 * (x**3).sum(0) * p * v
    torch.testing.assert_close(hvp(f, p, v, mode="reverse_over_forward"), expected)
