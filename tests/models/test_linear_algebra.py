"""Products through factorizations, whose backward formulas reuse what the forward pass computed."""

from collections.abc import Callable

import pytest
import torch
from model_checks import check_functional_products, check_products, classifier
from torch import Tensor, nn


def covariance(x: Tensor) -> Tensor:
    return x.T @ x + torch.eye(4, dtype=x.dtype)


def gaussian(x: Tensor) -> Tensor:
    mean = torch.zeros(4, dtype=x.dtype)
    normal = torch.distributions.MultivariateNormal(mean, covariance(x), validate_args=False)
    return x + normal.log_prob(x)[:, None]


LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "solve": lambda x: torch.linalg.solve(covariance(x), x.T).T,
    "det": lambda x: x * torch.linalg.det(covariance(x)) / 100,
    "logdet": lambda x: x * torch.logdet(covariance(x)),
    "slogdet": lambda x: x * torch.linalg.slogdet(covariance(x))[1],
    "inv": lambda x: x @ torch.linalg.inv(covariance(x)),
    "pinv": lambda x: x @ torch.linalg.pinv(covariance(x)),
    "lu_solve": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(covariance(x)), x.T).T,
    "cholesky": lambda x: x @ torch.linalg.cholesky(covariance(x)),
    "cholesky_solve": lambda x: torch.cholesky_solve(x.T, torch.linalg.cholesky(covariance(x))).T,
    "lstsq": lambda x: torch.linalg.lstsq(covariance(x), x.T).solution.T,
    "qr": lambda x: x @ torch.linalg.qr(covariance(x))[1],
    "eigvalsh": lambda x: x * torch.linalg.eigvalsh(covariance(x)),
    "svdvals": lambda x: x * torch.linalg.svdvals(covariance(x)),
    "matrix_exp": lambda x: x @ torch.linalg.matrix_exp(0.1 * x.T @ x),
    "fft": lambda x: torch.fft.rfft(x).abs().sum(-1, keepdim=True) * x,
    "complex rotation": lambda x: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (2, 2))) * torch.polar(*rotation().unbind())
    ).flatten(-2),
    "gaussian": gaussian,
}


def rotation() -> Tensor:
    return torch.tensor([[1.0, 1.0], [0.3, 0.7]], dtype=torch.float64)


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after, self.function = nn.Linear(4, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))


@pytest.mark.parametrize("name", LAYERS)
def test_products_through_factorizations(name):
    torch.manual_seed(0)
    check_products(classifier(Between(LAYERS[name]), torch.randn(6, 4, dtype=torch.float64)))


@pytest.mark.parametrize("name", ["solve", "slogdet", "cholesky"])
def test_functional_products_through_factorizations(name):
    torch.manual_seed(0)
    model = classifier(Between(LAYERS[name]), torch.randn(6, 4, dtype=torch.float64))
    check_functional_products(model)
