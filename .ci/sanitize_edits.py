"""Edits of the decode kernels' sources for .ci/sanitize.py, by name: what racecheck can follow, and faults to be found.

lowbit/kernels/cuda stays as it is: an edit is made in the text that is compiled. Each keeps its file's number of lines,
so that a report's line is the repository's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lowbit.errors import LowbitError
from lowbit.kernels import nvrtc


class Edit(NamedTuple):
    """``old`` stands exactly once in ``file``.cu, and becomes ``new``."""

    file: str
    old: str
    new: str


def _early(file: str, reading: str, indent: int) -> Edit:
    between = f";\n{' ' * indent}"
    release = f"before_overwriting(){between}__syncwarp(){between}if (lane == 0) barrier_arrive(s.empty + at.slot)"
    return Edit(file, f"{reading}{between}{release};", f"{release}{between}{reading};")


EDITS: dict[str, tuple[Edit, ...]] = {
    # Every lane arrives where the first does for its warp: the tool does not see that __syncwarp() orders their reads.
    "lanes": (
        Edit("product", "barrier_init(s.empty + i + j, 1)", "barrier_init(s.empty + i + j, 32)"),
        Edit("product", "if (lane == 0) barrier_arrive(s.empty", "barrier_arrive(s.empty"),
        Edit("batch", "if (lane == 0) barrier_arrive(s.empty", "barrier_arrive(s.empty"),
    ),
    # A tile's sums are handed over by an mbarrier too: the tool does not follow the acquire-release count, which stays.
    "handover": (
        Edit("batch", "uint64_t *full, *empty, *ready;", "uint64_t *full, *empty, *ready, *handed;"),
        Edit("batch", "s.done = (uint32_t*)p;", "s.done = (uint32_t*)p, s.handed = (uint64_t*)p + (turns + 1) / 2;"),
        Edit(
            "batch",
            "if (t < op.turns) s.done[t] = 0;",
            "if (t < op.turns) s.done[t] = 0, barrier_init(s.handed + t, chunks * 32), barriers_ready();",
        ),
        # ptxas lets the whole warp execute the first thread's barrier_init
        Edit(
            "batch",
            "barrier_init(s.ready, 1), barriers_ready();",
            "barrier_init(s.ready, 1), barriers_ready(); __syncwarp();",
        ),
        Edit("batch", "uint32_t last = 0;", "uint32_t last = 0; barrier_arrive(s.handed + turn);"),
        Edit(
            "batch",
            "if (last) finish_tile<EPILOGUE>(",
            "if (last) barrier_wait(s.handed + turn, turned / op.turns & 1), finish_tile<EPILOGUE>(",
        ),
    ),
}
"""What racecheck is shown of a step; ``handover`` needs room in shared memory (sanitize_worker.press makes it)."""
FAULTS: dict[str, tuple[Edit, ...]] = {
    # A warp releases its stage before it has read it.
    "release": (
        _early("product", "stage_product<K>(s.ring + at.slot * STAGE_BYTES, s, i % CHUNKS, r0, r1)", 6),
        _early(
            "batch",
            "batch_product<KU>(s.ring + at.slot * STAGE_BYTES, s.x + chunk * KU * 2 * BATCH, "
            "groups + chunk * (KU / SUM_COLUMNS) * COLUMNS, r)",
            4,
        ),
    ),
    # A tile's sums are overwritten two tiles later, whether they were read or not.
    "sums": (Edit("batch", "s.sums + turn *", "s.sums + turn % 2 *"),),
}


def edits_of(names: Sequence[str], fault: str = "") -> tuple[Edit, ...]:
    """All edits of these names, a fault's first: the others then change what it moved. Raises LowbitError by name."""
    known = {**FAULTS, **EDITS}
    if unknown := {*names, *([fault] if fault else [])} - set(known):
        raise LowbitError(
            f"no edit of the kernels is called {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    return tuple(edit for name in (fault, *(one for one in EDITS if one in names)) if name for edit in known[name])


def edited(name: str, text: str, edits: Sequence[Edit]) -> str:
    """``text`` of cuda/``name``.cu with its own of the edits. Raises LowbitError where one does not match once."""
    for edit in edits:
        if edit.file == name:
            if (count := text.count(edit.old)) != 1:
                raise LowbitError(
                    f".ci/sanitize_edits.py: expected once in cuda/{name}.cu, found {count} times: {edit.old!r}; "
                    "the kernels were changed, so the edit must be"
                )
            text = text.replace(edit.old, edit.new)
    return text


def reader(edits: Sequence[Edit]) -> Callable[..., str]:
    """In the place of nvrtc.read_sources: edited files, whose lines a compiler counts by file."""

    def read_sources(*names: str) -> str:
        texts = {name: (nvrtc.SOURCES / f"{name}.cu").read_text() for name in names}
        return "\n".join(f'#line 1 "{name}.cu"\n{edited(name, text, edits)}' for name, text in texts.items())

    return read_sources
