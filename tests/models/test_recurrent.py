"""Products through recurrent layers; the fused kernels torch would take have none."""

import pytest
import torch
from model_checks import (
    check_functional_products,
    check_products,
    classifier,
    relative_error,
    seeded,
)
from problems import flat
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Recurrent(nn.Module):
    """A recurrent layer, packed where lengths are given, and a linear layer at each step."""

    def __init__(self, core: nn.Module, width: int) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(width, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.head(self.core(x)[0])
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.core(packed)[0])[0])


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", LAYERS)
def test_products_through_two_bidirectional_layers_with_dropout(kind):
    torch.manual_seed(0)
    core = LAYERS[kind](3, 4, num_layers=2, bidirectional=True, dropout=0.3, batch_first=True)
    check_products(classifier(Recurrent(core, 8), data(2, 4, 3)))


@pytest.mark.parametrize("kind", LAYERS)
def test_products_through_packed_sequences(kind):
    torch.manual_seed(0)
    core = LAYERS[kind](3, 4, num_layers=2, bidirectional=True, dropout=0.3)
    check_products(classifier(Recurrent(core, 8), data(4, 3, 3), torch.tensor([2, 4, 3])))


@pytest.mark.parametrize("batch_first", [True, False])
def test_products_through_projections(batch_first):
    torch.manual_seed(0)
    core = nn.LSTM(3, 4, num_layers=2, proj_size=2, batch_first=batch_first)
    check_products(classifier(Recurrent(core, 2), data(4, 2, 3)))


def test_products_through_a_rectified_recurrence():
    """At a point with no kink within reach of the differences."""
    torch.manual_seed(0)
    core = nn.RNN(3, 4, nonlinearity="relu", bias=False)
    check_products(classifier(Recurrent(core, 4), data(4, 2, 3)))


class Stepwise(nn.Module):
    """A loop over cells, whose last state alone is used."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_products_through_a_loop_over_cells(cell):
    torch.manual_seed(0)
    check_products(classifier(Stepwise(cell(3, 4)), data(4, 2, 3)))


@pytest.mark.parametrize("engine", ["auto", "dual", "graph"])
@pytest.mark.parametrize("kind", LAYERS)
def test_products_in_float32_where_the_fused_kernels_would_serve(kind, engine):
    torch.manual_seed(0)
    model = classifier(
        Recurrent(LAYERS[kind](3, 4, num_layers=2, batch_first=True), 4), data(2, 4, 3)
    )
    v = model.tangent()
    for curvature in ("hessian", "ggn"):
        estimate = model.hessian(v) if curvature == "hessian" else model.ggn(v)
        model.net.float()
        x64, model.inputs = model.inputs, (model.inputs[0].float(),)
        with seeded(model.closure, model.params, engine=engine) as oracle:
            product = oracle.trace(curvature).product([t.float() for t in v])
        assert flat(product).dtype == torch.float32
        assert relative_error(product, estimate.value) < 1e-4
        model.net.double()
        model.inputs = x64


@pytest.mark.parametrize("kind", LAYERS)
def test_functional_products_through_recurrent_layers(kind):
    torch.manual_seed(0)
    core = LAYERS[kind](3, 4, num_layers=2, bidirectional=True, dropout=0.3, batch_first=True)
    check_functional_products(classifier(Recurrent(core, 8), data(2, 4, 3)))
