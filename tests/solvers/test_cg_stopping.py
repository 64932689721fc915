"""Where conjugate gradients stop: the rules, by hand and in a run."""

import math

import pytest
from matrices import Counted, spd, vector

from hvpopt.solvers import FirstOf, Progress, RelativeProgress, ResidualNorm, Status, Worthwhile, cg


def test_martens_rule_keeps_the_factor_k():
    """With k = 10 and m ≈ −1, a gain of 4e-3 over ten steps is below 5e-4 · 10 = 5e-3."""
    rule = RelativeProgress()
    values = [-1.0 + 0.004 * (12 - i) / 10 for i in range(13)]
    assert rule(Progress(12, 1.0, 1.0, values)) is Status.SMALL_PROGRESS
    values = [-1.0 + 0.006 * (12 - i) / 10 for i in range(13)]
    assert rule(Progress(12, 1.0, 1.0, values)) is None


def test_martens_rule_waits_for_more_than_k_steps_and_a_negative_model():
    rule = RelativeProgress()
    assert rule(Progress(10, 1.0, 1.0, [-1.0] * 11)) is None
    assert rule(Progress(11, 1.0, 1.0, [-1.0] * 12)) is Status.SMALL_PROGRESS
    assert rule(Progress(11, 1.0, 1.0, [1.0] * 12)) is None


def test_martens_window_grows_with_the_steps():
    """After 200 steps k = 20: the gain since step 180 counts, not the one since step 190."""
    values = [-1.0] * 201
    values[180] = -1.0 + 0.02  # 0.02 ≥ 5e-4 · 20
    assert RelativeProgress()(Progress(200, 1.0, 1.0, values)) is None
    assert RelativeProgress(fraction=0.05)(Progress(200, 1.0, 1.0, values)) is not None


def test_the_default_rule_stops_where_martens_does():
    a, b = spd(200, condition=1e4), vector(200)
    solution = cg(Counted(a), [b])
    values, step = solution.model_values, solution.num_steps
    assert solution.status is Status.SMALL_PROGRESS

    def gained(i: int) -> float:
        k = max(10, math.ceil(0.1 * i))
        return (values[i] - values[i - k]) / values[i] / k

    assert gained(step) < 5e-4
    assert all(gained(i) >= 5e-4 for i in range(11, step))


def test_the_residual_rule_stops_at_its_tolerance():
    a, b = spd(50), vector(50)
    solution = cg(Counted(a), [b], stop=ResidualNorm(rtol=1e-3))
    assert solution.status is Status.CONVERGED
    assert solution.residual_norm <= 1e-3 * float(b.norm())
    before = cg(Counted(a), [b], stop=ResidualNorm(rtol=1e-3), max_steps=solution.num_steps - 1)
    assert before.status is Status.STEP_LIMIT
    assert before.residual_norm > 1e-3 * float(b.norm())


def test_the_first_of_two_rules_wins():
    progress = Progress(11, 0.5, 1.0, [-1.0] * 12)
    rules = (ResidualNorm(rtol=0.1), RelativeProgress())
    assert FirstOf(rules)(progress) is Status.SMALL_PROGRESS
    assert FirstOf((ResidualNorm(rtol=0.9), *rules))(progress) is Status.CONVERGED
    assert FirstOf(())(progress) is None


def test_steps_that_gain_less_than_the_average_are_not_worthwhile():
    """With the rest of a step as dear as one of CG, the rule stops where the rate of gain peaks."""
    values = (0.0, -8.0, -12.0, -13.0, -13.5)
    stops = [Worthwhile()(Progress(i, 1.0, 1.0, values[: i + 1])) for i in range(5)]
    assert [stop is not None for stop in stops] == [False, False, False, True, True]
    rates = [-m / (i + 1) for i, m in enumerate(values)]
    assert max(rates) == rates[2]  # and the next step shows it
    dear = Worthwhile(overhead=20.0)
    assert [dear(Progress(i, 1.0, 1.0, values[: i + 1])) for i in (3, 4)] == [
        None,
        Status.SMALL_PROGRESS,
    ]
    with pytest.raises(ValueError, match=r"Worthwhile needs overhead ≥ 0, got -1"):
        Worthwhile(overhead=-1)


def test_bad_stopping_rules_are_answered_by_name():
    with pytest.raises(ValueError, match="rtol > 0"):
        RelativeProgress(rtol=0.0)
    with pytest.raises(ValueError, match="min_steps ≥ 1"):
        RelativeProgress(min_steps=0)
    with pytest.raises(ValueError, match="fraction ≥ 0"):
        RelativeProgress(fraction=-0.1)
    with pytest.raises(ValueError, match="tolerances ≥ 0"):
        ResidualNorm(rtol=-1.0)


def test_every_status_is_a_sentence_and_says_whether_it_converged():
    assert all(len(status.value.split()) > 5 for status in Status)
    assert {status for status in Status if status.converged} == {
        Status.CONVERGED,
        Status.SMALL_PROGRESS,
    }
