"""Packed weights in a memory pool of their own, with a GPU's allocator pretended (test_native_cuda.py: a real one)."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from lowbit.kernels.keeping import keep, kept_together, room

GPU = torch.device("cuda", 0)


@pytest.fixture
def inside(monkeypatch):
    """The pools that are in use, outermost first."""
    used = []

    @contextmanager
    def use(pool, device):
        assert device == GPU
        used.append(pool)
        try:
            yield
        finally:
            used.pop()

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use)
    return used


def on_gpu(used):
    """A tensor whose copy is the pools it was made in."""
    return SimpleNamespace(is_cuda=True, device=GPU, clone=lambda: list(used))


def test_all_that_is_kept_lies_in_one_pool_and_each_model_has_its_own(inside):
    with kept_together(GPU):
        first, second = keep(on_gpu(inside)), keep(on_gpu(inside))
    with kept_together(GPU):
        other = keep(on_gpu(inside))
    assert len(first) == 1
    assert first == second != other
    assert inside == []


def test_outside_nothing_is_copied(inside):
    tensor = on_gpu(inside)
    assert keep(tensor) is tensor
    with pytest.raises(ValueError, match="packing"), kept_together(GPU):
        raise ValueError("packing")
    assert keep(tensor) is tensor


def test_a_cpu_has_no_pools():
    tensor = torch.ones(3)
    with kept_together(torch.device("cpu")):
        assert keep(tensor) is tensor


def test_a_stream_is_packed_where_it_is_kept(inside, monkeypatch):
    """Not packed first and copied then: a head would be there twice."""
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *of, device, **how: made.append((device, list(inside))) or empty(*of))
    with kept_together(GPU):
        room((2, 3), torch.uint8, GPU)
    room((2, 3), torch.uint8, GPU)
    room((2, 3), torch.uint8, torch.device("cpu"))
    (first, pools), *outside = made
    assert first == GPU
    assert len(pools) == 1
    assert outside == [(GPU, []), (torch.device("cpu"), [])]


@pytest.mark.parametrize("way", ["room", "keep"])
@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_full_card_gives_up_the_free_blocks_outside_the_pool_first(inside, monkeypatch, way, fails):
    """torch does not do it inside a pool. What still finds no room then is out of memory."""
    told, tries = [], iter([torch.OutOfMemoryError("full")] * fails + ["made"])

    def make(*of, **how):
        told.append(("asked", len(inside)))
        if isinstance(found := next(tries), Exception):
            raise found
        return found

    monkeypatch.setattr(torch, "empty", make)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append(("freed", len(inside))))
    ask = {
        "room": lambda: room((2,), torch.uint8, GPU),
        "keep": lambda: keep(SimpleNamespace(is_cuda=True, device=GPU, clone=make)),
    }[way]
    with kept_together(GPU):
        if fails == 2:
            with pytest.raises(torch.OutOfMemoryError, match="full"):
                ask()
        else:
            assert ask() == "made"
    assert told == [("asked", 1), ("freed", 0), ("asked", 1)][: 1 if fails == 0 else 3]
