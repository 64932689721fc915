import copy
import math

import pytest
import torch
from problems import closure_of, flat, problem
from torch import nn

import hvpopt
from hvpopt.optim.report import Outcome

A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
B = torch.tensor([1.0, -1.0], dtype=torch.float64)


def quadratic():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    return w, lambda: 0.5 * w @ A @ w - B @ w


def hand_trace(num_steps, lr, mu, lam, rho=0.5, bounds=(1e-3, 1e3), decay=0.0):
    """Schraudolph's rule on the quadratic, in scalars."""
    w, v, gain = [1.0, 2.0], [0.0, 0.0], [1.0, 1.0]
    for _ in range(num_steps):
        g = [2 * w[0] + 0.5 * w[1] - 1 + decay * w[0], 0.5 * w[0] + w[1] + 1 + decay * w[1]]
        cv = [2 * v[0] + 0.5 * v[1] + decay * v[0], 0.5 * v[0] + v[1] + decay * v[1]]
        gain = [
            min(max(p * max(rho, 1 + mu * vi * gi), bounds[0]), bounds[1])
            for p, vi, gi in zip(gain, v, g, strict=True)
        ]
        w = [wi - lr * p * gi for wi, p, gi in zip(w, gain, g, strict=True)]
        v = [
            lam * vi + lr * p * (gi - lam * ci)
            for vi, p, gi, ci in zip(v, gain, g, cv, strict=True)
        ]
    return w, v, gain


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("engine", ["auto", "dual", "graph", "finite_difference"])
def test_the_papers_rule_follows_a_hand_computed_trace(engine, decay):
    w, loss = quadratic()
    optimizer = hvpopt.SMD(
        [w], lr=0.2, mu=0.4, lam=0.9, weight_decay=decay, curvature="hessian",
        normalization=None, overshoot_guard=False, engine=engine,
    )  # fmt: skip
    for num_steps in range(1, 8):
        optimizer.step(closure_of(optimizer, loss))
        expected_w, expected_v, expected_gain = hand_trace(num_steps, 0.2, 0.4, 0.9, decay=decay)
        tolerance = {"rtol": 1e-6, "atol": 1e-8} if engine.startswith("finite") else {}
        for got, want in (
            (w.detach(), expected_w),
            (optimizer.state[w]["trace"], expected_v),
            (optimizer.state[w]["gain"], expected_gain),
        ):
            torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), **tolerance)


def test_the_gain_falls_by_rho_at_most_and_stays_in_its_bounds():
    w, loss = quadratic()
    optimizer = hvpopt.SMD(
        [w], lr=0.2, mu=50.0, lam=0.9, curvature="hessian", normalization=None,
        overshoot_guard=False, gain_bounds=(0.25, 4.0),
    )  # fmt: skip
    for _ in range(6):
        optimizer.step(closure_of(optimizer, loss))
    _, _, gain = hand_trace(6, 0.2, 50.0, 0.9, bounds=(0.25, 4.0))
    torch.testing.assert_close(optimizer.state[w]["gain"], torch.tensor(gain, dtype=torch.float64))
    assert optimizer.last_report.fraction_at_bounds > 0


def test_with_lambda_one_v_goes_to_newtons_step():
    """The fixed point of v ← v + p⊙(g − C v) at fixed weights is C⁻¹ g."""
    w, loss = quadratic()
    optimizer = hvpopt.SMD([w], lr=0.3, mu=0.0, lam=1.0, curvature="hessian", overshoot_guard=False)
    start = w.detach().clone()
    for _ in range(300):
        optimizer.step(closure_of(optimizer, loss))
        with torch.no_grad():
            w.copy_(start)
    torch.testing.assert_close(optimizer.state[w]["trace"], torch.linalg.solve(A, A @ start - B))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
def test_without_meta_learning_it_is_sgd_bit_for_bit(options):
    ours, theirs = problem("mlp", torch.float32), problem("mlp", torch.float32)
    smd = hvpopt.SMD(
        ours.params, 0.1, mu=0.0, overshoot_guard=False, engine="finite_difference",
        curvature="hessian", **options,
    )  # fmt: skip
    sgd = torch.optim.SGD(theirs.params, 0.1, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (smd, sgd)]
    for _ in range(5):
        smd.step(closure_of(smd, lambda: ours.loss(ours.net(ours.x))))
        sgd.step(closure_of(sgd, lambda: theirs.loss(theirs.net(theirs.x))))
        for schedule in schedules:
            schedule.step()
    assert all(map(torch.equal, ours.params, theirs.params))


def test_normalised_gains_do_not_depend_on_the_scale_of_the_loss():
    gains = []
    for scale in (1.0, 100.0):
        w, loss = quadratic()
        optimizer = hvpopt.SMD(
            [w], lr=0.2 / scale, mu=0.1, curvature="hessian", overshoot_guard=False
        )
        for _ in range(10):
            optimizer.step(closure_of(optimizer, lambda: scale * loss()))  # noqa: B023
        gains.append(optimizer.state[w]["gain"])
    torch.testing.assert_close(*gains)
    assert not torch.equal(gains[0], torch.ones_like(gains[0]))


def test_the_guard_cuts_a_step_to_the_minimum_along_it():
    w, loss = quadratic()
    optimizer = hvpopt.SMD([w], lr=10.0, curvature="hessian")
    g = A @ w.detach() - B
    q = float(10.0 * (g @ A @ g) / (g @ g))
    start = w.detach().clone()
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.last_report.overshoot == pytest.approx(q)
    torch.testing.assert_close(w.detach(), start - 10.0 / q * g)  # Cauchy's point
    assert optimizer.last_report.num_products == 2


def test_without_the_guard_a_step_is_one_run_and_one_product():
    task = problem("tied")
    optimizer = hvpopt.SMD(task.params, lr=0.01, overshoot_guard=False)
    closure = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    optimizer.step(closure)  # probes the engine
    runs = []
    optimizer.step(lambda: (runs.append(1), closure())[1])
    assert len(runs) == optimizer.last_report.num_closure_runs == 1
    assert optimizer.last_report.num_products == 1


@pytest.mark.parametrize("gain", ["tensor", "group"])
def test_gains_are_shared_as_asked(gain):
    task = problem("mlp")
    groups = [{"params": task.params[:2]}, {"params": task.params[2:], "lr": 0.05}]
    optimizer = hvpopt.SMD(groups, gain=gain, overshoot_guard=False, engine="graph")
    closure = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    optimizer.step(closure)
    traces = [optimizer.state[p]["trace"].clone() for p in task.params]
    optimizer.step(closure)
    grads = [p.grad for p in task.params]
    signals = [(v * g).sum() for v, g in zip(traces, grads, strict=True)]
    if gain == "group":
        signals = [sum(signals[:2])] * 2 + [sum(signals[2:])] * (len(signals) - 2)
    for p, signal in zip(task.params, signals, strict=True):
        # the second signal is the first that counts: u = signal / |signal|
        expected = 1 + 0.05 * torch.sign(signal)
        torch.testing.assert_close(optimizer.state[p]["gain"], expected)


def test_smoke_it_learns_with_a_scheduler_and_groups():
    task = problem("batchnorm", torch.float32)
    optimizer = hvpopt.SMD(
        [{"params": task.params[:2], "lr": 0.02}, {"params": task.params[2:]}], lr=0.1
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
    losses = []
    for _ in range(30):
        loss = optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x))))
        losses.append(float(loss.detach()))
        scheduler.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_moves_nothing(where, guard):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = hvpopt.SMD([w], curvature="hessian", overshoot_guard=guard, engine="graph")
    optimizer.step(closure_of(optimizer, lambda: (w**2).sum()))
    before, state = w.detach().clone(), copy.deepcopy(optimizer.state_dict())

    def loss():
        if where == "loss":
            return (w**2).sum() * math.inf
        return (w - w.detach()).abs().sqrt().sum()

    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.last_report.outcome is getattr(Outcome, f"NONFINITE_{where.upper()}")
    assert torch.equal(w, before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["dual", "graph"])
def test_an_exception_leaves_parameters_and_state(engine):
    task = problem("dropout")
    optimizer = hvpopt.SMD(task.params, overshoot_guard=False, engine=engine)
    plain = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    optimizer.step(plain)
    before = flat(task.params).clone()
    state = copy.deepcopy(optimizer.state_dict())

    def closure():
        plain()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(flat(task.params), before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert torch.autograd.forward_ad.unpack_dual(task.params[0]).tangent is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0 is out of range"),
        ({"mu": -1.0}, r"mu=-1\.0"),
        ({"lam": 1.1}, r"lam=1\.1 is out of range: expected a number between 0"),
        ({"rho": 2.0}, r"rho=2\.0"),
        ({"beta": 1.0}, r"beta=1\.0"),
        ({"gain_bounds": (2.0, 3.0)}, r"expected 0 < low <= 1 <= high"),
        ({"gain_bounds": 3.0}, r"gain_bounds=3\.0: expected two numbers"),
        ({"gain_bounds": ("a", "b")}, r"gain_bounds='a' is out of range"),
        ({"overshoot_guard": "no"}, r"overshoot_guard='no': expected True or False"),
        ({"gain": "layer"}, r"gain='layer' is unknown"),
        ({"normalization": "max"}, r"normalization='max' is unknown"),
        ({"curvature": "x"}, r"curvature='x' is unknown"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hvpopt.SMD([nn.Parameter(torch.ones(2))], **options)


def test_the_guard_counts_the_weight_decay_and_keeps_the_gains_in_their_bounds():
    w, loss = quadratic()
    optimizer = hvpopt.SMD(
        [w], lr=10.0, weight_decay=0.5, curvature="hessian", gain_bounds=(0.9, 2.0)
    )
    start = w.detach().clone()
    g = A @ start - B + 0.5 * start
    q = float(10.0 * (g @ (A + 0.5 * torch.eye(2)) @ g) / (g @ g))
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.last_report.overshoot == pytest.approx(q)
    torch.testing.assert_close(w.detach(), start - 10.0 / q * g)
    torch.testing.assert_close(optimizer.state[w]["gain"], torch.full_like(start, 0.9))


def test_the_report_measures_v_against_gradient_and_curvature():
    w, loss = quadratic()
    optimizer = hvpopt.SMD([w], lr=0.1, curvature="hessian", overshoot_guard=False)
    g = A @ w.detach() - B
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.last_report.trace_alignment == pytest.approx(1.0)  # v = p⊙g
    assert optimizer.last_report.trace_norm == pytest.approx(float(0.1 * g.norm()))
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.last_report.trace_curvature == pytest.approx(float(g @ A @ g / (g @ g)))


def test_a_late_parameter_starts_its_own_statistics():
    torch.manual_seed(0)
    early, late = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    late.requires_grad_(False)
    optimizer = hvpopt.SMD([early, late], curvature="hessian", overshoot_guard=False)
    for _ in range(50):
        optimizer.step(closure_of(optimizer, lambda: (early**2).sum()))
    late.requires_grad_(True)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, lambda: (early**2).sum() + (late**2).sum()))
    # the second signal is the first that counts: u = 1
    torch.testing.assert_close(optimizer.state[late]["gain"], torch.full_like(late, 1.05))


@pytest.mark.parametrize("gain", ["parameter", "tensor", "group"])
def test_parameters_of_mixed_dtype_train(gain):
    single = nn.Parameter(torch.ones(2))
    double = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = hvpopt.SMD([single, double], curvature="hessian", gain=gain)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, lambda: (single.double() ** 2 + double**2).sum()))
    torch.testing.assert_close(single.double().detach(), double.detach(), rtol=1e-5, atol=1e-6)
