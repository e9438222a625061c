"""How benches are spread over xdist's workers: a format is never split, so that each worker builds it once.

xdist's own ``--dist loadgroup`` does not do: pytest 9.2 ignores it in silence (xdist issue 1386) and 9.1 renames the
tests; and it puts a test that killed its worker back into the queue, where it kills the next one, or hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from xdist.scheduler import LoadScopeScheduling

from lowbit.formats import FORMATS

KEPT_WAITING = 1
"""Tests that wait in a worker before it gets its next format: xdist starts one only when it knows the one after it."""


def scope_of(nodeid: str, formats: Iterable[str] = FORMATS) -> str:
    """The id of the format that a test measures, from its parameters; the test's file where there is none.

    ``benches/test_decode.py::test_decode[a16w4_g128-torchao-eager-b1_c0]`` → ``a16w4_g128-torchao``.
    """
    path, _, name = nodeid.partition("::")
    parameters = f"-{name.partition('[')[2].removesuffix(']')}-"
    found = [format_id for format_id in formats if f"-{format_id}-" in parameters]
    return max(found, key=len) if found else path


class FormatScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist is untyped to us
    """xdist's loadscope with the format as its scope, and with crashes that cost one test.

    ``measures`` is asked when all workers have collected: False sends them home with nothing done.
    """

    def __init__(self, config: Any, log: Any, measures: Callable[[], bool] = lambda: True) -> None:
        super().__init__(config, log)
        self._measures = measures

    def schedule(self) -> None:
        if not self._measures():
            self.collection: list[str] = next(iter(self.registered_collections.values()))
            for node in self.nodes:
                node.shutdown()
            return
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)

    def _reschedule(self, node: Any) -> None:
        """Give the node formats until it can start on one; stock gives one only, and a short one leaves it waiting."""
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) <= KEPT_WAITING:
            if not self.workqueue:
                node.shutdown()
            else:
                self._assign_work_unit(node)

    def remove_node(self, node: Any) -> str | None:
        """Take a dead worker's unfinished tests back, but not the one that it died of. Returns that one, if any."""
        workload = self.assigned_work[node]
        crashed = next((nodeid for tests in workload.values() for nodeid, done in tests.items() if not done), None)
        if crashed is not None:
            workload[self._split_scope(crashed)][crashed] = True
        for scope in [scope for scope, tests in workload.items() if all(tests.values())]:
            del workload[scope]  # stock hands it out again, empty, and its new worker waits for ever
        super().remove_node(node)
        return crashed
