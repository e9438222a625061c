"""How many seconds a case takes on a device that has no kept run of it: what plans and announcements go by."""

from __future__ import annotations

from lowbit.auto.ask import DEFAULT_SECONDS as SEARCH_S
from lowbit.formats import Format, rows_of
from lowbit.formats.auto import SCHEME as AUTO

TYPICAL_S = {
    ("cpu", "quality"): 5.0,
    ("cpu", "eval"): 300.0,
    ("cpu", "eager"): 3.0,
    ("cpu", "compiled"): 20.0,
    ("cuda", "quality"): 3.0,
    ("cuda", "eval"): 120.0,
    ("cuda", "eager"): 10.0,
    ("cuda", "compiled"): 35.0,
    ("cuda", "regional"): 15.0,
}
"""Seconds per case before this device has a kept run: a first guess, replaced by the measured ones. Of compile modes,
``compiled`` are those without an entry of their own; ``regional`` compiles one layer of 32; its 15 s are for
libraries not measured in it."""

TYPICAL_OF_LIBRARY_S = {
    ("cuda", "eager", "torchao"): 25.0,
    ("cuda", "eager", "recipe"): 25.0,
    ("cuda", "eager", "gemlite"): 25.0,
    ("cuda", "eager", "bitsandbytes"): 25.0,
    ("cuda", "eager", "hqq"): 25.0,
    ("cuda", "eager", "reference"): 60.0,
    ("cuda", "compiled", "torchao"): 60.0,
    ("cuda", "compiled", "recipe"): 60.0,
    ("cuda", "compiled", "hqq"): 60.0,
    ("cuda", "compiled", "calibrated"): 60.0,
    ("cuda", "compiled", "bitsandbytes"): 45.0,
    ("cuda", "regional", "torch"): 12.0,
    ("cuda", "regional", "torchao"): 15.0,
    ("cuda", "regional", "gemlite"): 20.0,
    ("cuda", "regional", "bitsandbytes"): 8.0,
    ("cuda", "regional", "hqq"): 15.0,
    ("cuda", "regional", "reference"): 13.0,
    ("cuda", "native", "lowbit"): 10.0,
    ("cuda", "native", "recipe"): 10.0,
}
"""The same where a library is far from it. Of Llama-3.1-8B on an H200 with cold caches, torch 2.11, 2026-11-21: torchao
eager 10.6 to 66 s (10 rows, mean 24.8) and reduce-overhead 34 to 87 (4 rows, mean 60), bitsandbytes reduce-overhead 41,
gemlite and LLM.int8 decode 10 to 19 tok/s in eager mode, 3 times 128 tokens (LLM.int8 20 s, hqq's
compiled products 29, GPTQ beside its calibration 19). References and compiled calibrated rows are guessed.

``regional``: decode of b1_c0 of the same model and torch, 2026-11-22, ``wall_s`` of the journals: one process on one
H200, and four runs on two, of which the first compiled (cold) and the later ones found its caches (warm). bf16-torch
cold 8.7 to 15.1, warm 4.2 to 4.7; torchao cold int4 6.2 and 6.6, with HQQ 9.6, dynamic fp8 7.0 and 10.5, int8 16.8 and
24.0, weight-only fp8 23.1 (mean of the rows 13.7), warm 4.5 to 12.6; gemlite 16.3 to 22.7 with Triton's kernels kept;
bitsandbytes NF4 cold 6.3, warm 5.0 to 8.2. Later that day 59 more rows, mostly cold
(docs/runs/h200-rows-2026-11-22.json): torchao 5.9 to 33.0, mean 13.7 of 20, torch's KV caches 6.3 to 14.1, bitsandbytes
5.5 to 11.5, recipes 4.6 to 30.3, mean 14.0; lowbit's ``native`` 6.8 to 11.1, mean 8.3 of 10. And 43 more
(docs/runs/h200-rows-2026-11-22b.json), four processes on four cards, cold: hqq 11.1 to 17.2, mean 14.9 of 12, with its
search; references 10.0 to 17.6, mean 13.0 of 9; torchao's 10.2 to 30.7, mean 19.5 of 11, the first of each process 28
to 31. Any other library's is unmeasured."""

FIRST_S: dict[tuple[str | None, ...], float] = {
    ("cuda", "gemlite"): 60.0,
    ("cuda", "regional", "gemlite"): 80.0,
    ("cuda", "calibrated"): 150.0,
    ("cuda", "hqq"): 30.0,
    ("cuda", "regional", "hqq"): 0.0,
}
"""More for a format's first case in a process, in any mode but those with an entry of their own.

gemlite tunes its kernels: two rows took 83 and 89 s, 24 and 28 of them compiling; with kept caches 26 to 31. Under
``regional`` 11 rows that had never run on the machine took 72.5 to 136.8 s, mean 98.3: Triton compiles every candidate
(297 to 325 s of warmup in four processes of 354 to 391 s). It keeps them on disk (compilers.configure_caches): two rows
whose kernels were there took the 20 s above. All of that with choices by timed launches; by graphs, as since then, two
rows whose kernels were there took 33.4 to 41.4 s as a host's first, and 21.5 to 35.4 beside those or later (``wall_s``
of the five runs of the baseline of a1e4f48). Recipes and other libraries' rows on its kernels are taken to be
like that. GPTQ and AWQ calibrate: 165 to 181 s in all in three rows and 118 in one, of which 155 to 165 and 110
quantize (docs/runs/h200-rows-2026-11-22d.json). hqq searches its zero points; under ``regional`` that is in its 15 s
above.
"""

STARTUP_S = {"cpu": 15.0, "cuda": 40.0}
"""Of every part before its first case: imports, reading or making the weights, the card's ceilings. A guess too."""


def typical_s(device_kind: str, kind: str, mode: str | None, fmt_id: str = "") -> float:
    """Seconds of a case that no kept run has."""
    if kind in ("quality", "eval"):
        return TYPICAL_S[device_kind, kind]
    group, library = "eager" if mode == "eager" else "compiled", fmt_id.rpartition("-")[2]
    known = TYPICAL_S | TYPICAL_OF_LIBRARY_S
    keys = ((device_kind, mode, library), (device_kind, mode), (device_kind, group, library), (device_kind, group))
    return next(known[key] for key in keys if key in known)


def first_s(device_kind: str, fmt: Format, mode: str | None = None) -> float:
    """Seconds that the first case of a format takes more; ``auto`` searches so long on any device."""
    if fmt.scheme == AUTO:
        return SEARCH_S
    libraries = {name for row in rows_of(fmt) for name in (row.backend, *row.packages)}
    return max(_first_of(device_kind, mode, name) for name in libraries)


def _first_of(device_kind: str, mode: str | None, library: str) -> float:
    keys = ((device_kind, mode, library), (device_kind, library))
    return next((FIRST_S[key] for key in keys if key in FIRST_S), 0.0)
