"""A pytest plugin that runs cases in a random order, to show that no case depends on those before it.

    PYTHONPATH=.ci PYTEST_ADDOPTS="-p shuffled" LOWBIT_ORDER_SEED=1 pytest benches

The formats are shuffled, and each one's cases within it: they stay together, so that a format is still built once. A
seed and a selection give one order, in every process. With ``-n`` formats are given out in that order; a kept run's
journal has its cases in the order in which they ended. Nothing of it enters the run's environment: runs in several
orders are runs of one environment, and may become a baseline together.
"""

from __future__ import annotations

import os
import random
from itertools import chain

import pytest

VARIABLE = "LOWBIT_ORDER_SEED"


def seed() -> int:
    text = os.environ.get(VARIABLE, "")
    if not text.isdecimal():
        raise pytest.UsageError(f"{VARIABLE}: expected a whole number of 0 or more, got {text!r}; give {VARIABLE}=1")
    return int(text)


def format_of(item: pytest.Item) -> str | None:
    """The format that a bench measures; None for every other test."""
    return item.callspec.params.get("format") if hasattr(item, "callspec") else None


def shuffle(items: list[pytest.Item], number: int) -> None:
    """Benches among their own places, in place; every other item stays where it is."""
    places = [place for place, item in enumerate(items) if format_of(item) is not None]
    formats: dict[str | None, list[pytest.Item]] = {}
    for place in places:
        formats.setdefault(format_of(items[place]), []).append(items[place])
    drawn, groups = random.Random(number), list(formats.values())
    drawn.shuffle(groups)
    for group in groups:
        drawn.shuffle(group)
    for place, item in zip(places, chain(*groups), strict=True):
        items[place] = item


def pytest_configure(config: pytest.Config) -> None:
    seed()
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist begins with the formats that have most cases


def pytest_report_header() -> str:
    return f"shuffled: the order of {VARIABLE}={seed()}"


@pytest.hookimpl(trylast=True)  # of what -k and -m left
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    shuffle(items, seed())
