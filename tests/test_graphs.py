"""Recording CUDA graphs while no garbage is collected."""

from __future__ import annotations

import gc
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.graphs import recording


@pytest.fixture
def asked(monkeypatch):
    """What torch.cuda.graph was asked for."""
    kept = []

    @contextmanager
    def graph(*args, **how):
        kept.append((args, how))
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    return kept


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_inside_and_the_collector_is_left_as_it_was(asked, collects):
    was = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with recording("graph", pool=7):
            assert not gc.isenabled()
        assert gc.isenabled() is collects
        with pytest.raises(ValueError, match="a kernel's"), recording("graph"):
            raise ValueError("a kernel's")
        assert gc.isenabled() is collects
    finally:
        (gc.enable if was else gc.disable)()
    assert asked == [(("graph",), {"pool": 7}), (("graph",), {})]


def test_every_graph_of_lowbit_is_recorded_like_this():
    folder = Path(lowbit.__file__).parent
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if re.search(r"cuda\.graph\(|make_graphed_callables|capture_begin", path.read_text())
    }
    assert found == {"graphs.py"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_dropped_graph_does_not_break_off_the_next_recording():
    x = torch.zeros(8, device="cuda")
    thresholds = gc.get_threshold()
    try:
        gc.set_threshold(20)
        for _ in range(3):
            dropped = {"graph": torch.cuda.CUDAGraph()}
            dropped["itself"] = dropped
            with recording(dropped["graph"]):
                x.add_(1)
            del dropped
            with recording(torch.cuda.CUDAGraph()):
                x.add_(1)
                assert len([[n] for n in range(1000)]) == 1000  # what starts a collection
    finally:
        gc.set_threshold(*thresholds)
