"""Work on a GPU as CUDA graphs that are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lowbit.graphs import recording

KEPT_GRAPHS = 8


class Work(NamedTuple):
    """One piece of a prefill: ``kind`` is unpack, gemm, norm, rope, attention, silu or last; ``of`` the matrix.

    ``moved``: bytes that an unpacking reads and writes; ``operations``: of a product, 2 per multiplication.
    """

    kind: str
    of: str
    call: Callable[[], object]
    moved: int = 0
    operations: int = 0


class RecordedRuns:
    """A function of one number, replayed as a CUDA graph: a number's first call runs, its second records.

    The ``most`` graphs that were used last are kept. They share one memory pool: only one runs at a time, and what
    they leave lies outside of it.
    """

    def __init__(self, run: Callable[[int], None], most: int = KEPT_GRAPHS) -> None:
        self._run, self._most = run, most
        self._graphs: OrderedDict[int, torch.cuda.CUDAGraph | None] = OrderedDict()
        self._pool: Any = None

    def __call__(self, number: int) -> None:
        if number not in self._graphs:
            self._graphs[number] = None
            self._run(number)
        else:
            graph = self._graphs[number]
            if graph is None:
                graph = self._graphs[number] = self._record(number)
            graph.replay()
        self._graphs.move_to_end(number)
        if len(self._graphs) > self._most:
            self._graphs.popitem(last=False)

    def _record(self, number: int) -> torch.cuda.CUDAGraph:
        if not self.recorded:  # a pool whose graphs are all gone can't be captured into again
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with recording(graph, pool=self._pool):
            self._run(number)
        return graph

    @property
    def recorded(self) -> list[int]:
        """What would be replayed, the latest last."""
        return [number for number, graph in self._graphs.items() if graph is not None]

    def forget(self) -> None:
        """Run and record everything anew."""
        self._graphs.clear()
