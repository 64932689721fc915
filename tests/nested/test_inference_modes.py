"""Inference mode, dropout, batch norms, divergence, and optimizers that differentiate twice."""

import lightning
import pytest
import torch
from nested.smooth_energy import SmoothEnergy, gradients, problem, relative_error
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hvpopt
from hvpopt.nested import (
    Backtracking,
    DivergenceError,
    GradientDescent,
    InferenceStatus,
    Logits,
    NewtonDescent,
    minimize_energy,
)

DESCENT = GradientDescent(0.2, 10)
START = torch.zeros(6, 5, dtype=torch.float64)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.smooth, self.dropout = SmoothEnergy(), nn.Dropout(0.5)

    def forward(self, x, y):
        return self.smooth(x, self.dropout(y)) + (y * y).sum(1)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.smooth, self.norm = SmoothEnergy(), nn.BatchNorm1d(5, dtype=torch.float64)

    def forward(self, x, y):
        return self.smooth(x, self.norm(y))


def test_inference_mode_gives_the_values_of_training():
    energy, x, _ = problem()
    expected = minimize_energy(energy, x, START, method=DESCENT).y.detach()
    with torch.inference_mode():
        made_inside = x.detach() * 1
        for method in (DESCENT, NewtonDescent(6)):
            found = minimize_energy(energy, made_inside, START * 1, method=method)
            assert not found.y.requires_grad
        found = minimize_energy(energy, made_inside, START * 1, method=DESCENT)
    assert torch.allclose(found.y, expected, rtol=1e-14)


def test_buffers_made_under_inference_mode_are_no_obstacle():
    with torch.inference_mode():
        energy = Normed().eval()
        x = torch.randn(6, 4, dtype=torch.float64)
        found = minimize_energy(energy, x, START, method=DESCENT)
    assert torch.isfinite(found.energies).all()


class Structured(lightning.LightningModule):
    def __init__(self, adjoint):
        super().__init__()
        self.features = nn.Linear(4, 4, dtype=torch.float64)
        self.energy, self.adjoint, self.seen = SmoothEnergy(), adjoint, []

    def forward(self, x):
        start = torch.full((len(x), 5), 0.5, dtype=torch.float64)
        return minimize_energy(
            self.energy, torch.tanh(self.features(x)), start, method=DESCENT, domain=Logits(),
            adjoint=self.adjoint,
        ).y  # fmt: skip

    def training_step(self, batch, batch_idx):
        return ((self(batch[0]) - batch[1]) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append(float(((self(batch[0]) - batch[1]) ** 2).mean()))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("adjoint", ["back_optimization", "unrolled", "implicit", "forward"])
@pytest.mark.filterwarnings("ignore:adjoint='implicit' differentiates:UserWarning")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_lightning_validates_tests_and_predicts_under_inference_mode(adjoint, tmp_path):
    _, x, target = problem()
    loader = DataLoader(TensorDataset(x.detach(), target), batch_size=6)
    module = Structured(adjoint)
    trainer = lightning.Trainer(max_epochs=1, logger=False, enable_progress_bar=False,
                                enable_checkpointing=False, enable_model_summary=False,
                                default_root_dir=tmp_path, accelerator="cpu")  # fmt: skip
    trainer.validate(module, loader, verbose=False)
    trainer.test(module, loader, verbose=False)
    (predicted,) = trainer.predict(module, loader)
    expected = module(x).detach()
    assert torch.allclose(predicted, expected, rtol=1e-13)
    error = float(((expected - target) ** 2).mean())
    assert module.seen == pytest.approx([error, error])


def test_dropout_is_one_mask_for_all_steps_and_the_generator_moves_as_by_one_evaluation():
    torch.manual_seed(0)
    energy = Noisy()
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.manual_seed(7)
    mask = energy.dropout(torch.ones(6, 5, dtype=torch.float64))
    after_one = torch.get_rng_state()
    fixed = lambda x, y: energy.smooth(x, y * mask) + (y * y).sum(1)  # noqa: E731
    expected = minimize_energy(fixed, x, START, method=DESCENT, adjoint="unrolled")
    expected.y.square().sum().backward()
    theta = gradients(energy)
    for adjoint in ("unrolled", "back_optimization", "checkpointed", "truncated"):
        torch.manual_seed(7)
        found = minimize_energy(energy, x, START, method=DESCENT, adjoint=adjoint)
        assert torch.equal(torch.get_rng_state(), after_one)
        assert torch.allclose(found.y, expected.y, rtol=1e-13)
        torch.manual_seed(99)
        before = torch.get_rng_state()
        found.y.square().sum().backward()
        assert torch.equal(torch.get_rng_state(), before)
        got = gradients(energy)
        if adjoint != "truncated":
            assert relative_error(got, theta) < 1e-12


def test_with_dropout_an_example_that_goes_on_keeps_its_own_mask():
    torch.manual_seed(0)
    energy = Noisy()
    x = torch.arange(1.0, 7.0)[:, None] * torch.randn(6, 4, dtype=torch.float64)
    method = GradientDescent(0.1, 60, gtol=1e-2)
    torch.manual_seed(7)
    mask = energy.dropout(torch.ones(6, 5, dtype=torch.float64))
    torch.manual_seed(7)
    found = minimize_energy(energy, x, START, method=method)
    fixed = lambda x, y: energy.smooth(x[0], y * x[1]) + (y * y).sum(1)  # noqa: E731
    expected = minimize_energy(fixed, (x, mask), START, method=method)
    assert len(set(found.steps.tolist())) > 1
    assert torch.equal(found.steps, expected.steps)
    assert torch.allclose(found.y, expected.y, rtol=1e-12)


def test_batch_norms_use_and_keep_their_running_statistics():
    torch.manual_seed(0)
    energy = Normed()
    energy.norm.running_mean += 0.3
    x = torch.randn(6, 4, dtype=torch.float64)
    before = {k: v.clone() for k, v in energy.state_dict().items()}
    found = minimize_energy(energy, x, START, method=DESCENT)
    found.y.sum().backward()
    assert energy.norm.training
    assert all(torch.equal(v, before[k]) for k, v in energy.state_dict().items())
    energy.eval()
    assert torch.equal(minimize_energy(energy, x, START, method=DESCENT).y, found.y)


def test_a_diverging_example_keeps_its_last_finite_iterate_and_the_others_go_on():
    # E = x y⁴ / 4 by steps of 1 from y0 = 1 stays for x = ½ and explodes for x = 5
    x = torch.tensor([[0.5], [5.0], [0.4]], requires_grad=True)
    quartic = lambda x, y: (x * y**4).sum(1) / 4  # noqa: E731
    for adjoint in ("back_optimization", "unrolled", "checkpointed", "forward"):
        found = minimize_energy(quartic, x, torch.ones(3, 1), method=GradientDescent(1.0, 20),
                                adjoint=adjoint)  # fmt: skip
        assert [s.name for s in found.statuses] == ["STEP_LIMIT", "DIVERGED", "STEP_LIMIT"]
        assert found.count(InferenceStatus.DIVERGED) == 1
        assert found.steps[1] < 6
        assert torch.isfinite(found.y).all()
        assert torch.isfinite(found.energies).all()
        found.y[::2].sum().backward()
        good = x.grad[::2].clone()
        x.grad = None
        alone = minimize_energy(quartic, x[::2], torch.ones(2, 1), method=GradientDescent(1.0, 20),
                                adjoint="unrolled")  # fmt: skip
        alone.y.sum().backward()
        assert torch.allclose(good, x.grad[::2])
        assert torch.allclose(found.y[::2], alone.y)
        x.grad = None


def test_a_line_search_saves_an_example_that_would_diverge():
    method = GradientDescent(1.0, 40, line_search=Backtracking())
    found = minimize_energy(lambda x, y: (x * y**4).sum(1), torch.tensor([[500.0]]),
                            torch.ones(1, 1), method=method)  # fmt: skip
    assert found.count(InferenceStatus.DIVERGED) == 0
    assert found.y.abs() < 0.1


def test_more_divergence_than_allowed_is_an_error_by_name():
    x = torch.tensor([[0.5], [5.0], [6.0]])
    with pytest.raises(DivergenceError, match=r"for 2 of 3 examples \(example 1 after . steps\), "
                       r"more than max_diverged=0.5 allows: shorten step_size"):  # fmt: skip
        minimize_energy(lambda x, y: (x * y**4).sum(1) / 4, x, torch.ones(3, 1),
                        method=GradientDescent(1.0, 20))  # fmt: skip
    found = minimize_energy(lambda x, y: (x * y**4).sum(1) / 4, x, torch.ones(3, 1),
                            method=GradientDescent(1.0, 20), max_diverged=1.0)  # fmt: skip
    assert found.fraction(InferenceStatus.DIVERGED) == pytest.approx(2 / 3)


def training_closure(optimizer, energy, x, target, adjoint):
    def closure():
        optimizer.zero_grad()
        y = minimize_energy(energy, x, START, method=DESCENT, adjoint=adjoint).y
        loss = nn.functional.mse_loss(y, target)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("engine", ["graph", "dual"])
def test_hvpopts_optimizers_differentiate_the_unrolled_inference_twice(curvature, engine):
    energy, x, target = problem()
    closure = training_closure(torch.optim.SGD(energy.parameters(), lr=0.1), energy, x.detach(),
                               target, "unrolled")  # fmt: skip
    params = list(energy.parameters())
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    with hvpopt.ClosureOracle(closure, params, engine=engine) as oracle:
        product = oracle.trace(curvature).product(v)
    if curvature == "hessian":
        h, slopes = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(params, v, strict=True):
                    p += sign * h * d
            closure()
            slopes.append(gradients(energy))
            with torch.no_grad():
                for p, d in zip(params, v, strict=True):
                    p -= sign * h * d
        expected = [(a - b) / (2 * h) for a, b in zip(*slopes, strict=True)]
        assert relative_error(product, expected) < 1e-6
    assert sum(float((p * d).sum()) for p, d in zip(product, v, strict=True)) > 0


@pytest.mark.parametrize("adjoint", ["back_optimization", "implicit", "checkpointed"])
@pytest.mark.filterwarnings("ignore:adjoint='implicit' differentiates:UserWarning")
def test_others_are_differentiated_by_differences_which_is_logged(adjoint, caplog):
    energy, x, target = problem()
    optimizer = hvpopt.NewtonCG(energy.parameters(), curvature="hessian")
    closure = training_closure(optimizer, energy, x.detach(), target, adjoint)
    with caplog.at_level("INFO", logger="hvpopt"):
        first = float(optimizer.step(closure))
        assert float(optimizer.step(closure)) < first
    assert any("finite_difference" in r.message and "adjoint=" in r.message for r in caplog.records)
