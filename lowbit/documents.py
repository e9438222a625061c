"""The JSON files of lowbit: pytest-benchmark's own document, with lowbit's part beside it; read and written safely."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError

SCHEMA = 1
"""Of the ``lowbit`` part. A file of a newer one is refused: an older lowbit can't know what it means."""

ANEW = "restore it from git, or delete it and make it anew (a baseline: pytest benches --update-baselines)"

PYTEST_BENCHMARK_VERSION = "5.3.1"  # the writer whose keys ``benchmark`` and ``document`` follow

STATS = (
    *("min", "max", "mean", "stddev", "rounds", "median", "iqr", "q1", "q3", "iqr_outliers", "stddev_outliers"),
    *("outliers", "ld15iqr", "hd15iqr", "ops", "total", "iterations"),
)


def now() -> str:
    """UTC, ISO 8601, as pytest-benchmark writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def benchmark(
    case: str, kind: str, params: Mapping[str, Any], stats: Mapping[str, Any], lowbit: Mapping[str, Any]
) -> dict[str, Any]:
    """One entry of ``benchmarks``. ``case`` is the node id; ``lowbit`` becomes ``extra_info["lowbit"]``."""
    name = case.rpartition("::")[2]
    return {
        "group": kind if params.get("workload") is None else f"{kind} {params['workload']}",
        "name": name,
        "fullname": case,
        "params": dict(params),
        "param": name.partition("[")[2].removesuffix("]") or None,
        "extra_info": {"lowbit": dict(lowbit)},
        "options": {},
        "stats": dict(stats),
    }


def document(
    benchmarks: Iterable[Mapping[str, Any]], lowbit: Mapping[str, Any], environment: Mapping[str, str], commit: str
) -> dict[str, Any]:
    """The whole file, with the keys that pytest-benchmark writes and ``lowbit`` as one more."""
    return {
        "machine_info": dict(environment),
        "commit_info": {"id": commit, "project": "lowbit"},
        "benchmarks": list(benchmarks),
        "datetime": now(),
        "version": PYTEST_BENCHMARK_VERSION,
        "lowbit": {"schema": SCHEMA, **lowbit},
    }


def encode(data: Mapping[str, Any]) -> str:
    """Pretty at the top, one line per benchmark: a changed case is one changed line of the diff."""
    lines = []
    for key, value in data.items():
        if key == "benchmarks":
            rows = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in value)
            text = f"[\n  {rows}\n ]" if value else "[]"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(path: Path, what: str) -> dict[str, Any]:
    """The document at ``path``, its ``lowbit`` part checked. Raises LowbitError for anything else than a ``what``."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        where = "kept runs are in .lowbit/runs, baselines in benches/baselines"
        raise LowbitError(f"{path}: no such {what}; {where}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LowbitError(f"{path}: can't read this {what} ({error})") from error
    if not text.strip():
        raise LowbitError(f"{path}: expected a {what}, got an empty file; {ANEW}")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise LowbitError(
            f"{path}: expected a {what}, got broken JSON ({error}); it was cut short or edited: {ANEW}"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
        raise LowbitError(f"{path}: expected a {what}, got JSON that is no pytest-benchmark document; {ANEW}")
    part = data.get("lowbit")
    if not isinstance(part, dict):
        raise LowbitError(f"{path}: expected a {what}, got a plain pytest-benchmark file without lowbit's part; {ANEW}")
    check_schema(path, part.get("schema"))
    return data


def check_schema(path: Path, schema: object) -> None:
    """Raise LowbitError unless this version of lowbit can read that schema."""
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        advice = "upgrade lowbit to read it" if newer else ANEW
        raise LowbitError(f"{path}: expected lowbit schema {SCHEMA}, got {schema!r}; {advice}")


def unwritable(path: Path, error: OSError, consequence: str) -> LowbitError:
    """What to tell a user whose disk refused a write."""
    return LowbitError(
        f"can't write {path}: {error.strerror or error}; {consequence}. Free space or make the folder writable, "
        "or choose another one (--baselines-dir for baselines)"
    )


def write(path: Path, data: Mapping[str, Any], consequence: str) -> None:
    """Write all or nothing: a temporary file beside it, fsync, rename. Raises LowbitError, leaving the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(encode(data))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # Ctrl-C too: no temporary file stays behind
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error, consequence) from error


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
