from __future__ import annotations

import pytest

from lowbit import spent
from lowbit.spent import Spent


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(spent.time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_purposes_nest_without_counting_twice(clock):
    times = Spent()
    with times.on("quality") as outer:
        clock(1.0)
        with times.on("load") as inner:
            clock(5.0)
        clock(2.0)
    assert (times.quality, times.load, times.total()) == (3.0, 5.0, 8.0)
    assert (outer(), inner()) == (3.0, 5.0)


def test_time_counts_even_when_it_ends_in_an_error(clock):
    times = Spent()

    def compile_something():
        with times.on("compile"):
            clock(4.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        compile_something()
    assert times.compile == 4.0


def test_host_peak():
    assert 10 < spent.host_peak_mib() < 1e6
