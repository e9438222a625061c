"""What the plugin keeps in pytest's stashes: on the config the run's state, on an item its case and its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lowbit.cases import Case
from lowbit.record import Record

if TYPE_CHECKING:
    from lowbit.pytest_plugin.session import BenchSession

SESSION: pytest.StashKey[BenchSession | None] = pytest.StashKey()
"""On the config: this run's BenchSession, None when no benches were asked for."""

CASE: pytest.StashKey[Case] = pytest.StashKey()
"""On an item: the case that it measures."""

RECORD: pytest.StashKey[Record] = pytest.StashKey()
"""On an item, after its call: the case's record, whatever its outcome."""

STATS: pytest.StashKey[dict[str, Any] | None] = pytest.StashKey()
"""On an item, after its call: pytest-benchmark's ``Metadata.as_dict(include_data=True)``; None without timings."""

UNLOADABLE = "unloadable"
"""Of a failed record's info: its model can't be loaded, so that no other case of the run can be measured either."""
