"""Work on a GPU as CUDA graphs that are kept, and on two streams at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

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


def run_overlapped(works: Iterable[Work], side: Any, buffers: int) -> None:
    """Run in order on the current stream, but each unpacking on the stream ``side``, beside what comes before it.

    Every unpacking is followed by the product that reads it; the n-th ones use memory n modulo ``buffers``, so an
    unpacking waits for the product that read the same memory last, and for nothing else.
    """
    main = torch.cuda.current_stream()
    side.wait_stream(main)
    read: list[Any] = []
    for work in works:
        if work.kind == "unpack":
            if len(read) >= buffers:
                side.wait_event(read[-buffers])
            with torch.cuda.stream(side):
                work.call()
        elif work.kind == "gemm":
            main.wait_event(side.record_event())
            work.call()
            read.append(main.record_event())
        else:
            work.call()
    main.wait_stream(side)


class RecordedRuns:
    """A function of one number, replayed as a CUDA graph: a number's first call runs, its second records.

    The ``most`` graphs that were used last are kept. They share one memory pool: only one runs at a time, and what
    they leave lies outside of it. ``stream``: what is recorded on it, with its priority; None: torch's own.
    """

    def __init__(self, run: Callable[[int], None], most: int = KEPT_GRAPHS, stream: Any = None) -> None:
        self._run, self._most, self._stream = run, most, stream
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
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._run(number)
        return graph

    @property
    def recorded(self) -> list[int]:
        """What would be replayed, the latest last."""
        return [number for number, graph in self._graphs.items() if graph is not None]

    def forget(self) -> None:
        """Run and record everything anew."""
        self._graphs.clear()
