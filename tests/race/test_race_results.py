"""What is made of the runs: figures, orders, curves and tables."""

import math

import pytest
from bowl import CPU, Bowl, BowlProblem, entry, finished
from hvpopt.experiments.race.contestants import Contestant
from hvpopt.experiments.race.plots import curve, picture
from hvpopt.experiments.race.problem import Target
from hvpopt.experiments.race.report import markdown, rows, text
from hvpopt.experiments.race.results import Result, at_time, first_time, ranked, times_the_best
from hvpopt.experiments.race.turns import Run


def test_figures_are_medians_over_the_seeds():
    result = finished("a", [(0, 9.0), (1, 1.0)], [(0, 9.0), (1, 3.0)], [(0, 9.0), (1, math.nan)])
    assert result.finals("loss") == [1, 3, math.inf]
    assert result.median("loss") == 3
    assert result.seconds_to(Target("loss", 2.0)) == math.inf
    assert result.seconds_to(Target("loss", 5.0)) == 1
    records = result.runs[0].records
    assert first_time(records, Target("metric", 10.0)) == 1
    assert at_time(records, 0.5).loss == 9
    assert at_time(records, -0.5) is None


def test_the_order_is_by_the_time_to_the_target_and_else_by_the_loss():
    results = [
        Result(Contestant.of("absent", entry()), absent="x"),
        finished("slow", [(0, 9.0), (5, 1.0)]),
        finished("low", [(0, 9.0), (6, 0.5)]),
        finished("bad", [(0, 9.0), (1, math.inf)]),
    ]

    def names(target):
        return [result.contestant.name for result in ranked(results, target)]

    assert names(None) == ["low", "slow", "bad", "absent"]
    assert names(Target("loss", 1.0)) == ["slow", "low", "bad", "absent"]
    assert times_the_best(results, None) == {"slow": 2, "low": 1, "bad": math.inf}
    assert times_the_best(results, Target("loss", 1.0))["low"] == pytest.approx(1.2)
    assert times_the_best(results, Target("loss", 0.1))["slow"] == 2


def test_who_saw_a_part_of_a_stream_is_behind_who_saw_it_all():
    part, whole = finished("part", [(0, 9.0), (1, 0.1)]), finished("whole", [(0, 9.0), (1, 0.5)])
    part.runs[0]._problem.has_end = True
    assert [r.contestant.name for r in ranked([part, whole], None)] == ["whole", "part"]
    assert times_the_best([part, whole], None)["whole"] == 1


def test_a_curve_shows_what_was_known_at_each_time():
    result = finished("a", [(0, 8.0), (1, 4.0), (2, 2.0)], [(0, 8.0), (1.5, 6.0)])
    times, medians, least, most = curve(result, "loss", 2.0)
    values = dict(zip(times, zip(medians, least, most, strict=True), strict=True))
    assert values[0.0] == (8, 8, 8)
    assert values[1.0] == (6, 4, 8)
    assert values[1.5] == (5, 4, 6)
    assert values[2.0] == (4, 2, 6)
    nothing = finished("b", [(0, math.nan)])
    assert curve(nothing, "loss", 2.0) == ([], [], [], [])


def test_a_picture_of_an_interrupted_race_leaves_runs_without_records_out():
    result = finished("a", [(0, 2.0), (1, 1.0)])
    result.runs[1] = Run("a", BowlProblem(), iter(()), seed=0, device=CPU)
    drawn = picture(Bowl(), [result], 1.0)
    for axes, last in zip(drawn.axes, (1.0, 10.0), strict=True):
        (line,) = axes.lines
        assert line.get_ydata()[-1] == last


def test_the_table_names_figures_and_failures():
    fine, failed = finished("fine", [(0, 9.0), (2, 0.25)]), finished("failed", [(0, 9.0)])
    assert not failed.has_run  # no step
    failed.runs[0].note, failed.runs[0].has_failed = "ValueError: no", True
    table = rows(Bowl(), [failed, fine])
    assert table[0][:3] == ["contestant", "tuned to", "training loss"]
    assert table[1][0] == "fine"
    assert table[1][2:6] == ["0.25", "0.25 – 0.25", "2.5", "1"]
    assert table[2][-1] == "ValueError: no"
    assert text(table).splitlines()[1].startswith("fine ")
    assert markdown(table).splitlines()[1].startswith("| --- | --- |")
