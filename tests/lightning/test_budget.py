"""When the curvature is measured: the budget's arithmetic, and turns of metrics."""

import itertools
from types import SimpleNamespace

import pytest

from hvpopt.lightning.monitors.budget import Budget
from hvpopt.lightning.monitors.history import History
from hvpopt.lightning.monitors.schedule import DEFAULT_METRICS, Schedule


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def simulate(share, *, cost, num_steps=4000, seconds_a_step=0.01):
    """The steps at which a run measures whose measurements cost what they cost."""
    clock = Clock()
    budget = Budget(share, clock=clock)
    budget.begin()
    measured = []
    for step in range(num_steps):
        clock.now += seconds_a_step
        if budget.allows(["it"]):
            clock.now += cost
            budget.spend("it", cost)
            measured.append(step)
            if share is not None and len(measured) > 1:
                assert budget.spent <= share * budget.elapsed * (1 + 1e-9)
    return measured, budget


@pytest.mark.parametrize("share", [0.02, 0.05, 0.3])
def test_measurements_cost_their_share_of_the_time_and_no_more(share):
    measured, budget = simulate(share, cost=0.05)
    assert budget.spent_share == pytest.approx(share, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(measured)]
    # a gap of g steps takes 0.01 g + 0.05 seconds, of which 0.05 are the share
    expected = (0.05 / share - 0.05) / 0.01
    assert abs(gaps[0] - 2 * expected) <= 1  # the first measurement is paid for afterwards
    assert all(abs(gap - expected) <= 1 for gap in gaps[1:])


def test_the_first_measurement_is_made_at_once_and_without_a_limit_all_are():
    assert simulate(1e-6, cost=10.0)[0] == [0]
    assert len(simulate(None, cost=10.0, num_steps=7)[0]) == 7


def test_a_part_of_unknown_cost_is_taken_for_as_dear_as_the_dearest():
    clock = Clock()
    budget = Budget(0.5, clock=clock)
    budget.begin()
    budget.spend("cheap", 1.0)
    budget.spend("dear", 3.0)
    clock.now += 10.9  # 4 spent; with the dear one 7 of 13.9 seconds
    assert budget.allows(["cheap"])
    assert not budget.allows(["dear"])
    assert not budget.allows(["unknown"])
    assert budget.allows(["unknown"], unknown=2.0)
    clock.now += 0.2
    assert budget.allows(["unknown"])
    assert not budget.allows(["cheap", "unknown"])


def test_a_resumed_budget_goes_on_where_it_stopped():
    clock = Clock()
    budget = Budget(0.1, clock=clock)
    budget.begin()
    budget.spend("it", 1.0)
    clock.now += 14.0
    again = Budget(0.1, clock=clock)
    again.load_state_dict(budget.state_dict())
    clock.now += 1000.0  # between the runs
    again.begin()
    assert again.elapsed == pytest.approx(14.0)
    assert not again.allows(["it"])
    clock.now += 5.0
    assert again.allows(["it"])


@pytest.mark.parametrize("share", [0.0, 1.5, "a lot"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="out of range: expected the share of the training time"):
        Budget(share)


def trainer(step):
    return SimpleNamespace(global_step=step, world_size=1)


def turns(schedule, steps):
    found = {}
    for step in steps:
        if names := schedule.due(trainer(step)):
            found[step] = names
            schedule.spend(step, dict.fromkeys(names, 1.0))
    return found


def test_the_first_and_every_nth_step_are_measured_once_each():
    found = turns(Schedule(3, ["trace"], None), [0, 0, 1, 1, 2, 3, 3, 3, 4, 5, 6])
    assert found == {1: ["trace"], 3: ["trace"], 6: ["trace"]}


def test_a_metric_with_a_number_k_is_taken_every_kth_time():
    found = turns(Schedule(1, {"trace": 1, "slices": 3}, None), range(1, 7))
    assert [step for step, names in found.items() if "slices" in names] == [3, 6]
    assert turns(Schedule(1, {"slices": 3}, None), range(1, 7)) == {3: ["slices"], 6: ["slices"]}


def test_what_fits_and_is_not_of_the_last_step_is_measured_when_training_ends():
    schedule = Schedule(2, {"trace": 1, "spectrum": 1, "slices": 4}, None)
    turns(schedule, [1, 2])
    assert schedule.closing(trainer(2)) == ["slices"]
    assert schedule.closing(trainer(3)) == ["trace", "spectrum", "slices"]
    tight = Schedule(1, ["trace"], 1e-6)
    tight.budget.begin()
    turns(tight, [1])
    assert tight.closing(trainer(2)) == []


def test_a_resumed_schedule_goes_on():
    schedule = Schedule(1, {"trace": 1, "slices": 3}, None)
    turns(schedule, [1, 2])
    again = Schedule(1, {"trace": 1, "slices": 3}, None)
    again.load_state_dict(schedule.state_dict())
    assert turns(again, [2, 3]) == {3: ["trace", "slices"]}


def test_metrics_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="'sharp' is unknown; choose from sharpness, trace"):
        Schedule(1, ["sharp"], None)
    with pytest.raises(ValueError, match="metrics is empty: choose from"):
        Schedule(1, [], None)
    with pytest.raises(ValueError, match=r"metrics\['trace'\]=0 is out of range"):
        Schedule(1, {"trace": 0}, None)
    with pytest.raises(ValueError, match="every_n_steps=0 is out of range"):
        Schedule(0, None, None)
    assert Schedule(1, None, None).metrics == DEFAULT_METRICS
    assert Schedule(1, "trace", None).metrics == {"trace": 1}


def test_a_history_keeps_evenly_spaced_steps_and_is_drawn_ever_more_rarely():
    history, drawn = History(8), []
    for step in range(100):
        history.add(step, {"found": step})
        if history.is_worth_drawing():
            drawn.append(step + 1)
            history.draw()
        gaps = {b - a for a, b in itertools.pairwise(history.steps)}
        assert len(gaps) <= 1
        assert len(history.steps) <= 8
    assert drawn == [1, 4, 16, 64]
    assert history.is_worth_drawing(at_end=True)
    assert [found["found"] for found in history.found] == history.steps
    again = History(8)
    again.load_state_dict(history.state_dict())
    for each in (history, again):
        each.add(100, {"found": 100})
    assert again.steps == history.steps
