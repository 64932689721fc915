"""GPT-2 and BERT of the transformers library, from small configs, by their own returned loss."""

import itertools
import socket
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from model_checks import EVERY, Model, names_of_engines, relative_error, seeded
from problems import flat
from torch import Tensor, nn

import hvpopt
from hvpopt.engines.choice import EngineChoice

transformers = pytest.importorskip("transformers", minversion="4.50")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

KERNELS = ("sdpa", "eager")
BATCH, LENGTH, WORDS = 2, 5, 11
IGNORED = -100


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection was tried: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Language(Model):
    """A model of the library whose closure uses the loss that it returns."""

    labels: Tensor

    def closure(self) -> Tensor:
        self.net.zero_grad()
        loss = self.net(*self.inputs, **self.options, labels=self.labels).loss
        loss.backward()
        return loss


def build(
    kind: str,
    attention: str,
    loss: Callable[[Tensor, Tensor], Tensor],
    labels: Tensor,
    **options: int,
) -> Language:
    """The model in float64 and training mode, on tokens of which none is the padding's."""
    family = "GPT2" if kind.startswith("GPT2") else "Bert"
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=WORDS,
        attn_implementation=attention,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    net = getattr(transformers, kind)(config).double().train()
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, 4:] = 0
    model = Language(
        net,
        (tokens(),),
        lambda z: loss(z, labels),
        {"attention_mask": mask},
        pick=lambda output: output.logits,
    )
    model.labels = labels
    return model


def tokens() -> Tensor:
    return torch.randint(1, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def gpt2(attention: str) -> Language:
    """Predicts the next token, but for those that are padding."""
    labels = tokens()
    labels[0, 3:] = IGNORED

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    return build(
        "GPT2LMHeadModel", attention, loss, labels, n_positions=8, n_embd=8, n_layer=2, n_head=2
    )


BERT = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 8,
}


def bert_words(attention: str) -> Language:
    """Fills in every other token."""
    labels = tokens()
    labels[:, ::2] = IGNORED

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), labels.flatten())

    return build("BertForMaskedLM", attention, loss, labels, **BERT)


def bert_sentences(attention: str) -> Language:
    labels = torch.tensor([0, 2])
    return build(
        "BertForSequenceClassification", attention, F.cross_entropy, labels, num_labels=3, **BERT
    )


def bert_scores(attention: str) -> Language:
    """One number a sentence, under mean squared error."""
    labels = torch.tensor([0.3, -1.0], dtype=torch.float64)

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(z.squeeze(), labels)

    return build("BertForSequenceClassification", attention, loss, labels, num_labels=1, **BERT)


MODELS = {m.__name__: m for m in (gpt2, bert_words, bert_sentences, bert_scores)}
# GPT-2's loss is computed in float32, whatever the logits
RTOL = {"gpt2": 1e-6, "bert_words": 1e-8, "bert_sentences": 1e-8, "bert_scores": 1e-8}


def exact(model: Model, curvature: str, v: list[Tensor]) -> Tensor:
    """By differences of the model under a loss of our own in float64."""
    own = Model(model.net, model.inputs, model.loss, model.options, model.pick)
    return (own.hessian(v) if curvature == "hessian" else own.ggn(v)).value


def check(model: Model, rtol: float, engines: tuple[str, ...] = EVERY) -> None:
    v = model.tangent()
    for curvature in ("hessian", "ggn"):
        expected = exact(model, curvature, v)
        for engine in engines:
            choice = EngineChoice(engine)
            with seeded(model.closure, model.params, engine=choice) as oracle:
                point = oracle.trace(curvature)
                product = point.product(v)
            assert relative_error(product, expected) < rtol, (engine, curvature)
            assert not point.has_remainder  # the split was found
            with seeded(model.closure, model.params, engine=choice) as oracle:
                product = oracle.trace_along(v, curvature)[2]
            assert relative_error(product, expected) < rtol, (engine, curvature)
            assert "finite_difference" not in names_of_engines(choice)
    assert all(p.grad is None for p in model.net.parameters())


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("name", MODELS)
def test_products_of_the_loss_that_the_model_returns(name, attention):
    check(MODELS[name](attention), RTOL[name])


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("name", ["gpt2", "bert_words"])
def test_products_under_gradient_checkpointing(name, attention):
    model = MODELS[name](attention)
    model.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check(model, RTOL[name], ("auto", "graph"))


def test_reentrant_gradient_checkpointing_is_refused_with_its_remedy():
    model = gpt2("sdpa")
    model.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with seeded(model.closure, model.params) as oracle:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            oracle.trace()


def test_the_padding_row_of_berts_tied_embedding_keeps_products_symmetric():
    """Its lookup has no gradient, and is a constant for products too."""
    model = bert_words("sdpa")
    model.inputs = (tokens() % 3,)  # zeros, the padding, among them
    assert (model.inputs[0] == 0).any()
    u, v = model.tangent(1), model.tangent(2)
    products = {}
    for engine in EVERY:
        with seeded(model.closure, model.params, engine=engine) as oracle:
            point = oracle.trace()
            products[engine] = point.product(v)
            left, right = flat(u) @ flat(products[engine]), flat(v) @ flat(point.product(u))
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)
    assert relative_error(products["dual"], products["graph"]) < 1e-8


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("name", MODELS)
def test_newton_cg_trains_in_float32_by_the_returned_loss(name, attention):
    """A smoke test of the descent; that the curvature is the GGN's is checked by the report."""
    model = MODELS[name](attention)
    model.net.float().eval()
    if name == "bert_scores":
        model.labels = model.labels.float()
    optimizer = hvpopt.NewtonCG(model.net.parameters(), max_cg_steps=10)

    def closure() -> Tensor:  # as Lightning's: training_step, zero_grad, backward
        loss = model.net(*model.inputs, **model.options, labels=model.labels).loss
        optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(25)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert optimizer.num_products > 0


def test_newton_cg_trains_through_dropout_and_checkpointing():
    """Smoke: one mask a step, which every evaluation of the step sees."""
    model = gpt2("sdpa")
    model.net.float()
    model.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = hvpopt.NewtonCG(model.net.parameters(), max_cg_steps=10)
    torch.manual_seed(0)
    losses = [float(optimizer.step(model.closure)) for _ in range(6)]
    assert min(losses[3:]) < 0.9 * losses[0]
    assert model.net.training


@pytest.mark.parametrize("attention", KERNELS)
def test_products_under_bf16_autocast(attention):
    model = gpt2(attention)
    v = model.tangent()
    model.net.eval()
    expected = {c: exact(model, c, v) for c in ("hessian", "ggn")}
    model.net.float()

    def closure() -> Tensor:
        model.net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.net(*model.inputs, **model.options, labels=model.labels).loss
        loss.backward()
        return loss

    for engine in EVERY:
        for curvature, value in expected.items():
            with seeded(closure, model.params, engine=engine) as oracle:
                product = oracle.trace(curvature).product([t.float() for t in v])
            assert flat(product).dtype == torch.float32
            assert relative_error(product, value) < 0.1, (engine, curvature)


def test_the_library_is_no_dependency_of_hvpopt():
    assert not [
        name for name in sys.modules if name.startswith("hvpopt") and "transformers" in name
    ]
    assert isinstance(gpt2("sdpa").net, nn.Module)
