"""Places of a tile's sums in a block of cuda/batch.cu: no order of its warps overwrites sums that are still to be read.

A model of batch_kernel's loop, tried in every order: a warp takes every ``warps``-th stage; it waits until the producer
could fetch it, releases it, stores its sums, counts itself; whoever counts last reads the tile's sums.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from lowbit.kernels.batch import turns_kept

RELEASE, STORE, COUNT, READ = range(4)
"""What a warp does next at its stage."""


class Block(NamedTuple):
    """A thread block's loop; ``turns``: tiles whose sums have places."""

    warps: int
    ring: int
    chunks: int
    turns: int
    tiles: int

    def overwritten(self):
        """Whether there is an order in which a tile's sums are stored over those of one that is not read yet."""
        start = tuple((warp, RELEASE) for warp in range(self.warps))
        seen, todo = {start}, [start]
        while todo:
            state = todo.pop()
            for warp, (stage, does) in enumerate(state):
                if stage >= self.tiles * self.chunks or (does == RELEASE and not self._fetched(state, stage)):
                    continue
                tile = stage // self.chunks
                if does == STORE and any(
                    not self._read(state, old) for old in range(tile % self.turns, tile, self.turns)
                ):
                    return True
                after = (*state[:warp], self._next(state, warp), *state[warp + 1 :])
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
        return False

    def _past(self, state, stage, does):
        """Whether the stage's warp has done this with it."""
        return state[stage % self.warps] > (stage, does)

    def _fetched(self, state, stage):
        """The producer waits for the stages' places one after another."""
        return all(self._past(state, old, RELEASE) for old in range(stage - self.ring + 1))

    def _stages(self, tile):
        return range(tile * self.chunks, (tile + 1) * self.chunks)

    def _read(self, state, tile):
        return all(
            self._past(state, stage, COUNT) and state[stage % self.warps] != (stage, READ)
            for stage in self._stages(tile)
        )

    def _next(self, state, warp):
        stage, does = state[warp]
        others = [one for one in self._stages(stage // self.chunks) if one != stage]
        last = does == COUNT and all(self._past(state, one, COUNT) for one in others)
        return (stage, does + 1) if does < COUNT or last else (stage + self.warps, RELEASE)


CASES = [
    (2, 2, 1),
    (2, 2, 3),
    (2, 4, 1),
    (2, 4, 2),
    (2, 4, 4),
    (2, 6, 5),
    (3, 3, 1),
    (3, 3, 2),
    (3, 3, 4),
    (3, 6, 2),
    (3, 6, 7),
]
"""(warps, stages in the ring, stages of a tile)."""


@pytest.mark.parametrize(("warps", "ring", "chunks"), CASES)
def test_no_order_overwrites_sums_that_are_still_to_be_read(warps, ring, chunks):
    turns = turns_kept(ring, warps, chunks)
    assert not Block(warps, ring, chunks, turns, tiles=turns + 2).overwritten()


@pytest.mark.parametrize(("warps", "ring", "chunks"), CASES)
def test_one_place_less_would_not_do(warps, ring, chunks):
    turns = turns_kept(ring, warps, chunks) - 1
    assert Block(warps, ring, chunks, turns, tiles=turns + 2).overwritten()
