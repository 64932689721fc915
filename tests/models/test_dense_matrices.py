"""Whole matrices of small networks, column by column, against differences of gradients."""

import pytest
import torch
from model_checks import Model, classifier, seeded
from problems import flat
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.GRU(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.MultiheadAttention(2, 1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x, x, x, need_weights=False)[0])


def normalised() -> nn.Module:
    first = weight_norm(nn.Linear(2, 3))
    return nn.Sequential(first, nn.BatchNorm1d(3), nn.GELU(), nn.Dropout(0.2), nn.Linear(3, 2))


NETWORKS = {
    "recurrent": (Recurrent, (3, 2, 2)),
    "attention": (Attention, (3, 2, 2)),
    "normalised": (normalised, (6, 2)),
}


def columns(params: list[Tensor]) -> list[list[Tensor]]:
    """The unit vectors, each as a list of tensors."""
    sizes = [p.numel() for p in params]
    rows = torch.eye(sum(sizes), dtype=torch.float64)
    return [
        [part.view_as(p) for part, p in zip(row.split(sizes), params, strict=True)] for row in rows
    ]


def model(name: str) -> Model:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    return classifier(build(), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_column_is_that_of_the_differences(name, curvature):
    task = model(name)
    units = columns(task.params)
    by_differences = task.hessian if curvature == "hessian" else task.ggn
    expected = torch.stack([flat(by_differences(unit).value) for unit in units])
    for engine in ("dual", "graph"):
        with seeded(task.closure, task.params, engine=engine) as oracle:
            product = oracle.trace(curvature).product
            matrix = torch.stack([flat(product(unit)) for unit in units])
        torch.testing.assert_close(matrix, expected, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-13)
        if curvature == "ggn":
            assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-13
