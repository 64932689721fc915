"""Figures about learning-rate gains, of more gains than are sorted."""

import pytest
import torch

from hvpopt.optim.gains import GainRule, figures


def test_quantiles_of_many_gains_are_near_those_of_all():
    """Sorted gains, of which one in seven is sampled."""
    generator = torch.Generator().manual_seed(0)
    logs = torch.randn(30_000, generator=generator).sort().values
    rule = GainRule(normalization=None, rho=0.5, bounds=(1e-6, 1e6), beta=0.9)
    v = [torch.ones(2)]
    found = figures(rule, [logs.exp().clamp(*rule.bounds)], [logs < -2], (v, v), (v, v))
    quantiles = torch.quantile(logs, torch.tensor([0.05, 0.5, 0.95])).tolist()
    for name, expected in zip(("low", "median", "high"), quantiles, strict=True):
        assert found[f"log_gain_{name}"] == pytest.approx(expected, abs=2e-3)
    assert found["log_gain_mean"] == pytest.approx(float(logs.mean()), abs=2e-3)
    assert found["fraction_floored"] == pytest.approx(float((logs < -2).double().mean()))
