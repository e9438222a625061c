"""A result that was timed in another process, with the face that pytest-benchmark's session reads.

pytest-benchmark keeps a list of ``Metadata`` objects, one a test, and makes its table, JSON files and comparison from
it. A result from an xdist worker, a child process or a resumed run is added to that list like this::

    stats = benchmark.stats.as_dict(include_data=True)          # there
    result = ForeignBenchmark.from_stats(stats)                 # here, after a trip through JSON
    config.pluginmanager.get_plugin("pytest-benchmark").benchmarks.append(result)

``ForeignBenchmark.for_item(item, stats, extra_info)`` puts it in the place of a test of this process: the name, group
and parameters are the item's, the timings the other process's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from lowbit.errors import LowbitError


class ForeignBenchmark:
    """Stands in for ``pytest_benchmark.stats.Metadata`` (5.2 and 5.3). Times in seconds.

    ``stats`` has pytest-benchmark's columns as attributes (min, max, mean, stddev, rounds, median, iqr, …, and
    ``data``, the raw rounds; empty where only a summary was kept).
    """

    def __init__(
        self,
        stats: Mapping[str, Any],
        *,
        fullname: str,
        name: str,
        group: str | None = None,
        param: str | None = None,
        params: Mapping[str, Any] | None = None,
        extra_info: dict[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        cprofile: list[Any] | None = None,
        has_error: bool = False,
    ) -> None:
        self.fullname, self.name, self.group = fullname, name, group
        self.param, self.params = param, None if params is None else dict(params)
        self.extra_info = {} if extra_info is None else extra_info
        self.options = dict(options or {})
        self.has_error = has_error
        columns = dict(stats)
        self.iterations: int = columns.pop("iterations", 1)
        columns.setdefault("data", [])
        self.stats = SimpleNamespace(**columns)
        self._cprofile = cprofile

    @classmethod
    def from_stats(cls, stats: Mapping[str, Any], *, has_error: bool = False, **changes: Any) -> ForeignBenchmark:
        """From ``Metadata.as_dict(include_data=True)``, also after JSON; ``changes`` replace its fields.

        Raises LowbitError when the dict is not of that form.
        """
        try:
            fields = {
                key: stats[key] for key in ("fullname", "name", "group", "param", "params", "extra_info", "options")
            }
            return cls(stats["stats"], cprofile=stats.get("cprofile"), has_error=has_error, **{**fields, **changes})
        except (KeyError, TypeError) as error:
            raise LowbitError(
                f"not a pytest-benchmark result ({type(error).__name__}: {error}): {str(stats)[:200]}"
            ) from error

    @classmethod
    def for_item(cls, item: pytest.Item, stats: Mapping[str, Any], extra_info: dict[str, Any]) -> ForeignBenchmark:
        """In the place of this item: its names, group and parameters, the other process's timings."""
        marker = item.get_closest_marker("benchmark")
        callspec = getattr(item, "callspec", None)
        return cls.from_stats(
            stats,
            fullname=item.nodeid,
            name=item.name,
            group=marker.kwargs.get("group") if marker else None,
            param=callspec.id if callspec else None,
            params=callspec.params if callspec else None,
            extra_info=extra_info,
        )

    def __bool__(self) -> bool:
        return hasattr(self.stats, "min")

    def __getitem__(self, key: str) -> Any:
        return getattr(self.stats, key) if hasattr(self.stats, key) else getattr(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if hasattr(self.stats, key) or hasattr(self, key) else default

    def as_dict(
        self, include_data: bool = True, flat: bool = False, stats: bool = True, cprofile: Any = None
    ) -> dict[str, Any]:
        """As ``Metadata.as_dict``: with ``flat`` the columns stand beside the names, as the table reads them."""
        names = ("group", "name", "fullname", "params", "param", "extra_info", "options")
        result: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self._cprofile:
            result["cprofile"] = self._cprofile
        if stats:
            columns = {**vars(self.stats), "iterations": self.iterations}
            if not include_data:
                del columns["data"]
            if flat:
                result.update(columns)
            else:
                result["stats"] = columns
        return result


def as_dict_of(columns: dict[str, Any] | None) -> dict[str, Any] | None:
    """A kept run's columns in the form of pytest-benchmark's ``as_dict``; the item that shows them names the rest."""
    if columns is None:
        return None
    blank = dict.fromkeys(("fullname", "name", "group", "param", "params"))
    return {**blank, "extra_info": {}, "options": {}, "stats": columns}
