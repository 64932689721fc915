"""What is measured at a checkpoint, against closed forms and dense matrices."""

import math

import pytest
import torch
import torch.nn.functional as F
from spectrum_modules import Noisy, Points, Regression

from hvpopt.lightning.spectrum import Label, Settings, measure

FEW = {"slice_points": 0, "plane_points": 0, "num_probes": 2, "density_steps": 2}
LABEL = Label(name="here", checkpoint="file.ckpt", optimizer="SGD", epoch=3, step=7)


def settings(**options):
    given = {"rtol": 1e-10, "accelerator": "cpu", "progress": False, "num_top": 3}
    return Settings(**{**given, **options})


def measured(module=None, data=None, **options):
    data = data or Points()
    module = module or Regression()
    return measure(module, data.train_dataloader(), LABEL, settings(**options), datamodule=data)


@pytest.fixture(scope="module")
def report():
    return measured(num_probes=400, slice_points=5, plane_points=3)


def dense():
    """Hessian, loss, gradient and point of the regression, by hand."""
    module, (x, y) = Regression(), Points().points
    w = torch.cat([module.first.weight, module.second.weight], dim=1).detach().squeeze(0)
    residual = x @ w - y
    return 2 * x.T @ x / len(x), residual.square().mean(), 2 * x.T @ residual / len(x), w


def test_loss_and_gradient_are_those_of_all_data_whatever_the_batches(report):
    _, loss, gradient, _ = dense()
    assert report.loss == pytest.approx(loss.item(), rel=1e-12)
    assert report.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-12)


def test_the_extreme_eigenvalues_are_the_dense_matrixs(report):
    hessian, _, gradient, _ = dense()
    values, vectors = torch.linalg.eigh(hessian)
    expected = values.flip(0)[:3].tolist()
    assert [e.value for e in report.top] == pytest.approx(expected, rel=1e-9)
    assert [e.value for e in report.bottom] == pytest.approx(values[:2].tolist(), rel=1e-9)
    for i, e in enumerate(report.top):
        cosine = (vectors[:, 4 - i] @ gradient / gradient.norm()).abs().item()
        assert e.cosine == pytest.approx(cosine, abs=1e-6)
        assert e.residual_bound < 1e-8
    assert report.largest_stable_lr == pytest.approx(2 / values[-1].item(), rel=1e-9)


def test_traces_lie_within_their_errors_of_the_dense_matrixs(report):
    hessian = dense()[0]
    blocks = {"first": hessian[:3, :3], "second": hessian[3:, 3:]}
    for found, matrix in [
        (report.trace, hessian),
        *((layer.trace, blocks[layer.name]) for layer in report.layers),
    ]:
        assert abs(found.value - matrix.trace().item()) < 4 * found.standard_error + 1e-12
        off_diagonal = matrix - matrix.diag().diag()
        spread = math.sqrt(2 * off_diagonal.square().sum().item() / 400)
        if matrix is not hessian:  # whose products with other blocks add noise
            spread = found.standard_error
        assert found.standard_error == pytest.approx(spread, rel=0.25)
    assert [(x.name, x.num_params) for x in report.layers] == [("first", 3), ("second", 2)]
    total = sum(layer.trace.value for layer in report.layers)
    assert report.trace.value == pytest.approx(total, rel=1e-12)


def test_the_density_has_the_matrixs_mean_and_no_mass_below_zero(report):
    hessian = dense()[0]
    density = report.density
    assert sum(density.mass) == pytest.approx(1.0)
    middles = [(a + b) / 2 for a, b in zip(density.edges[:-1], density.edges[1:], strict=True)]
    mean = sum(m * x for m, x in zip(density.mass, middles, strict=True))
    assert mean == pytest.approx(hessian.trace().item() / 5, rel=0.5)
    width = density.grid[1] - density.grid[0]
    assert width * sum(density.values) == pytest.approx(1.0, rel=1e-3)
    assert report.negative_share.value == 0.0


def test_slices_and_plane_of_a_quadratic_are_quadratic(report):
    assert [s.label for s in report.slices] == [
        "top eigenvector 1",
        "top eigenvector 2",
        "bottom eigenvector",
    ]
    for s in report.slices:
        assert len(s.distances) == 5
        assert s.slope >= 0
        for distance, loss in zip(s.distances, s.losses, strict=True):
            expected = report.loss + s.slope * distance + s.eigenvalue * distance**2 / 2
            assert loss == pytest.approx(expected, rel=1e-9)
    first, second = report.slices[:2]
    plane = report.plane
    for i, a in enumerate(plane.across):
        for j, b in enumerate(plane.up):
            expected = report.loss + first.slope * a + second.slope * b
            expected += (first.eigenvalue * a**2 + second.eigenvalue * b**2) / 2
            assert plane.losses[i][j] == pytest.approx(expected, rel=1e-9)


def test_the_cost_is_counted(report):
    # 5 products exhaust the space, 400 probes, 2 Lanczos runs of 5 steps
    assert report.num_products == 5 + 400 + 2 * 5
    assert report.num_evaluations == 3 * 5 + 3 * 3
    assert report.seconds > 0


def test_the_label_is_kept(report):
    assert (report.name, report.checkpoint, report.step) == ("here", "file.ckpt", 7)
    assert (report.optimizer, report.epoch, report.module) == ("SGD", 3, "Regression")
    assert report.data == "train data, 5 batches"
    assert (report.num_params, report.mode, report.curvature) == (5, "eval", "hessian")


def test_one_batch_is_the_loaders_first():
    module = Regression()
    torch.manual_seed(7)
    x, _ = next(iter(Points().train_dataloader()))
    torch.manual_seed(7)
    report = measured(module, num_batches=1, slice_points=0, plane_points=0)
    values = torch.linalg.eigvalsh(2 * x.T @ x / 5)
    assert [e.value for e in report.top] == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-9)
    assert report.data == "train data, one batch"
    assert report.slices == ()
    assert report.plane is None
    assert report.num_evaluations == 0


def test_ggn_and_fisher_of_cross_entropy_are_one_and_have_no_bottom():
    module, data = Noisy(), Points()
    reports = [
        measured(module, data, curvature=name, max_steps=60, **FEW) for name in ("ggn", "fisher")
    ]
    ggn, fisher = ([e.value for e in r.top] for r in reports)
    assert ggn == pytest.approx(fisher, rel=1e-8)
    assert reports[0].bottom == reports[1].bottom == ()

    module.eval()
    names = [name for name, _ in module.named_parameters()]
    x = data.points[0]

    def logits(*params):
        named = {name.removeprefix("net."): p for name, p in zip(names, params, strict=True)}
        return torch.func.functional_call(module.net, named, (x,))

    parameters = tuple(p.detach() for p in module.parameters())
    jacobian = torch.cat(
        [j.reshape(69, -1) for j in torch.autograd.functional.jacobian(logits, parameters)], dim=1
    )
    p = logits(*parameters).softmax(1)
    inner = torch.block_diag(*(q.diag() - q[:, None] * q[None] for q in p)) / 23
    values = torch.linalg.eigvalsh(jacobian.T @ inner @ jacobian)
    assert ggn == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-8)


def test_the_mode_decides_over_batch_norm_and_dropout():
    module, data = Noisy(), Points()
    module.eval()
    x, y = data.points
    expected = F.cross_entropy(module.net(x), (y > 0).long()).item()
    module.train()
    assert measured(module, data, **FEW).loss == pytest.approx(expected, rel=1e-12)
    assert module.training
    training = measured(module, data, mode="train", **FEW)
    assert training.loss != pytest.approx(expected, rel=1e-3)
    assert training.mode == "train"


def test_measuring_leaves_no_trace():
    module, data = Noisy(), Points()
    module.net[0].weight.grad = grad = torch.ones_like(module.net[0].weight)
    held = [x.clone() for x in (*module.parameters(), *module.buffers())]
    random_state = torch.get_rng_state()
    measured(module, data, mode="train", slice_points=3, plane_points=3, num_batches=2)
    after = [*module.parameters(), *module.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(after, held, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert module.net[0].weight.grad is grad
    assert module.net[2].training
    assert module._trainer is None


def test_the_same_seed_gives_the_same_report():
    options = {"num_probes": 3, "density_steps": 3, "slice_points": 0, "plane_points": 0}
    one, two, other = (measured(seed=seed, **options) for seed in (1, 1, 2))
    assert one.trace == two.trace
    assert one.trace != other.trace


def test_progress_is_shown_on_demand(capsys):
    options = {"num_probes": 2, "density_steps": 2, "slice_points": 3, "plane_points": 2}
    measured(progress=True, **options)
    shown = capsys.readouterr().err
    for phase in ("eigenvalues", "traces", "density", "slices", "plane"):
        assert f"here: {phase}" in shown


# --- bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"curvature": "hesian"}, "curvature='hesian' is unknown: .* 'ggn', 'fisher'"),
        ({"mode": "test"}, "mode='test' is unknown: choose one of 'eval', 'train'"),
        ({"split": "training"}, "split='training' is unknown: .* 'train', 'val', 'test'"),
        ({"num_top": 0}, "num_top=0 is out of range"),
        ({"num_batches": 0}, "num_batches=0 is out of range"),
        ({"num_probes": 1.5}, "num_probes=1.5 is out of range"),
        ({"plane_points": -1}, "plane_points=-1 is out of range"),
        ({"rtol": 0.0}, "rtol=0.0 is out of range"),
        ({"max_steps": 3, "num_top": 4}, "max_steps=3 products cannot give 4 eigenvalues"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        Settings(**options)


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match="Regression has no parameter that requires a gradient"):
        measured(Regression().requires_grad_(False))


def test_manual_optimization_is_refused():
    module = Regression()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"Under manual optimization Regression.training_step"):
        measured(module)


def test_data_without_a_batch_are_refused():
    with pytest.raises(ValueError, match="The data holds no batch"):
        measure(Regression(), [], LABEL, settings())
