"""Networks with operations that torch cannot differentiate twice, and their products."""

import torch
from problems import closure_for
from torch import Tensor, nn

from hvpopt.closure import ClosureOracle

SERVES = r"\(engine='auto' finds which serves\)"


class Call(nn.Module):
    """Calls a function, as a module with a name does."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Head(nn.Module):
    """A CTC loss of four frames of three classes, for two examples."""

    def __init__(self) -> None:
        super().__init__()
        self.ctc = nn.CTCLoss()

    def forward(self, z: Tensor) -> Tensor:
        lengths = torch.tensor([4, 4]), torch.tensor([2, 1])
        return self.ctc(z.reshape(4, 2, 3).log_softmax(-1), torch.tensor([1, 2, 1]), *lengths)


class Recognizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(5, 3), Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def task(net: nn.Module, call=None):
    """A closure of ``net`` on eight inputs of five features, and the parameters."""
    torch.manual_seed(0)
    net.double()
    x = torch.randn(8, 5, dtype=torch.float64)
    params = list(net.parameters())

    def loss() -> Tensor:
        return (net(x) if call is None else call(net, x)).square().mean()

    return closure_for(loss, params), params


def directions(params):
    return [torch.ones_like(p) for p in params]


def product(closure, params, engine, curvature="hessian"):
    v = directions(params)
    with ClosureOracle(closure, params, engine=engine) as oracle:
        if engine == "dual":
            return oracle.trace_along(v, curvature)[2]
        return oracle.trace(curvature).product(v)
