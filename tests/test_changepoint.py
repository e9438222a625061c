"""Change points: what is named, when, how large; what is not; and odd series."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowbit import changepoint_simulation as simulation
from lowbit.changepoint import MIN_NIGHTS, find_changes, noise, outliers

TRIES = 60


def steady(sigma=0.004, nights=200, seed=0):
    return 100 * (1 + sigma * np.random.default_rng(seed).standard_normal(nights))


@pytest.mark.parametrize(
    ("make", "nights", "share"),
    [(simulation.with_step, 5, 0.99), (simulation.with_drift, 10, 0.95)],
    ids=["the step within 5 nights", "the drift within 10"],
)
def test_noise_of_0_4_percent_hides_neither(make, nights, share):
    def found(rng):
        return simulation.finds(find_changes(make(simulation.history(rng, 0.004), nights)), 200 - nights)

    assert simulation.share(TRIES, 11, found) >= share


def test_a_change_of_the_other_sign_or_another_night_is_not_the_one_that_happened():
    better = find_changes(simulation.with_step(steady(), 20, size=0.02))
    assert [change.index for change in better] == [180]
    assert not simulation.finds(better, 180)
    worse = find_changes(simulation.with_step(steady(), 20))
    assert simulation.finds(worse, 180)
    assert not simulation.finds(worse, 174)


@pytest.mark.parametrize("index", [100, 199], ids=["middle", "last night"])
def test_one_outlier_is_not_named(index):
    def named(rng):
        return bool(find_changes(simulation.with_outlier(simulation.history(rng, 0.004), index)))

    assert simulation.share(TRIES, 12, named) < 0.05


def test_at_most_one_false_change_in_20_unchanged_histories():
    assert 20 * simulation.false_changes(TRIES, 0.004) <= 1
    assert 20 * simulation.false_changes(TRIES, 0.01) <= 1


def test_a_step_is_described():
    values = steady()
    values[120:] *= 0.98
    (change,) = find_changes(values)
    assert change.kind == "step"
    assert abs(change.index - 120) <= 1
    assert change.earliest <= 120 <= change.latest
    assert change.end == 200
    assert change.slope == 0
    assert change.before == pytest.approx(100, abs=0.1)
    assert change.size_relative == pytest.approx(-0.02, abs=0.002)
    assert 0.999 < change.confidence <= 1


def test_a_drift_is_one_change_and_not_a_staircase():
    (change,) = find_changes(simulation.with_drift(steady(), 40))
    assert change.kind == "drift"
    assert abs(change.index - 160) <= 5
    assert change.slope == pytest.approx(-0.2, abs=0.02)
    assert change.size_relative == pytest.approx(-0.08, abs=0.006)


def test_a_drift_from_the_first_night_on_is_named():
    (change,) = find_changes(simulation.with_drift(steady(), 200))
    assert (change.kind, change.index) == ("drift", 0)
    assert change.size_relative == pytest.approx(-0.4, abs=0.01)


def test_there_and_back_are_two_changes():
    values = steady()
    values[80:92] *= 0.95
    down, up = find_changes(values)
    assert (down.index, down.end, up.index) == (80, 92, 92)
    assert down.size_relative == pytest.approx(-0.05, abs=0.003)
    assert up.size == pytest.approx(-down.size, abs=0.4)


def test_the_end_of_a_drift_is_no_change_of_its_own_unless_it_jumps():
    values = simulation.with_drift(steady(), 120)
    values[120:] = steady(seed=7)[120:] * 0.92
    (drift,) = find_changes(values)
    assert (drift.kind, abs(drift.index - 80) <= 3, abs(drift.end - 120) <= 8) == ("drift", True, True)
    values[120:] /= 0.92
    assert [change.kind for change in find_changes(values)] == ["drift", "step"]


def test_a_small_step_in_the_middle_of_many_nights_is_no_drift_from_the_first():
    values = steady()
    values[100:] *= 1.006
    (change,) = find_changes(values)
    assert (change.kind, abs(change.index - 100) <= 10) == ("step", True)


def test_a_slow_drift_is_no_staircase():
    (change,) = find_changes(simulation.with_drift(steady(), 100, slope=-0.0002))
    assert (change.kind, abs(change.index - 100) <= 20) == ("drift", True)


def test_missing_nights_are_counted_but_not_judged():
    values = steady()
    values[120:] *= 0.98
    values[np.random.default_rng(1).random(200) < 0.3] = math.nan
    values[150] = math.inf
    values[119:121] = 100, 98
    (change,) = find_changes(values)
    assert abs(change.index - 120) <= 1


@pytest.mark.parametrize("nights", [0, 1, MIN_NIGHTS - 1])
def test_very_short_histories_are_not_judged(nights):
    assert find_changes([100.0] * (nights // 2) + [50.0] * (nights - nights // 2)) == []


def test_a_short_history_with_a_clear_step_is_judged():
    values = steady(nights=16)
    values[8:] *= 0.95
    assert [change.index for change in find_changes(values)] == [8]


def test_no_value_at_all():
    assert find_changes([math.nan] * 50) == []


@pytest.mark.parametrize("level", [0.0, 100.0, 1e-9, -3.0])
def test_a_constant_series_has_no_change(level):
    assert find_changes([level] * 50) == []
    assert find_changes([level] * 49 + [level + 1]) == []


def test_a_constant_series_that_steps_is_named_above_the_floor_alone():
    values = [100.0] * 50 + [101.0] * 5
    (change,) = find_changes(values)
    assert (change.index, change.before, change.after) == (50, pytest.approx(100), pytest.approx(101))
    assert find_changes(values, floor=1.5) == []


def test_rounding_of_the_last_digit_is_no_change():
    value = 6.2403
    assert find_changes([value] * 50 + [np.nextafter(value, 7)] * 50) == []


def test_whole_mib_that_flicker_are_no_change():
    flicker = 16_000 + 2.0 * (np.random.default_rng(2).random(200) < 0.2)
    assert noise(flicker) > 0.3
    assert find_changes(flicker) == []


def test_outliers_are_named_as_such():
    values = simulation.with_outlier(simulation.with_outlier(steady(0.001), 60), 199)
    assert outliers(values) == [60, 199]


def test_two_odd_nights_are_no_change_and_three_are():
    values = steady()
    values[-2:] *= 0.9
    assert find_changes(values) == []
    values[-3] *= 0.9
    assert [change.index for change in find_changes(values)] == [197]


def test_scale_and_offset_do_not_matter():
    values = simulation.with_step(steady(), 30)
    expected = [change.index for change in find_changes(values)]
    for scaled in (values * 1e-6, values * 1e9, values - 100, -values):
        assert [change.index for change in find_changes(scaled)] == expected


def test_where_the_level_before_is_0_the_relative_size_is_unknown():
    (change,) = find_changes([0.0] * 30 + [5.0] * 30)
    assert change.size == pytest.approx(5)
    assert change.size_relative is None


def test_500_series_take_seconds():
    assert simulation.seconds(50) < 0.5  # 0.06 on an idle core; docs/trend.md has the figure for 500
