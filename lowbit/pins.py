"""Pins: which version of what an environment has, by ``pip freeze`` or a constraints file; what lies between two."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import LowbitError

PIN = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)(\[[^\]]*\])?\s*(?P<how>===?|@|[<>~!]=?)\s*(?P<what>\S.*)$")
RELEASE = re.compile(r"^v?(\d+(?:\.\d+)*)(?:\.post\d+)?(?:\+[\w.]+)?$")

ABSENT = ("", "none", "not installed")
"""What a run's environment says of what is not there."""


@dataclass(frozen=True)
class Change:
    """One package, or the driver, in two environments; a version is empty where it is not there."""

    name: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.name} {self.old or 'none'} -> {self.new or 'none'}"


def normalize(name: str) -> str:
    """As PEP 503 compares names: ``PyTorch_Triton`` is ``pytorch-triton``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read(path: Path) -> dict[str, str]:
    """Name → version of a ``pip freeze`` or constraints file; ``git+https://…@commit`` for what is not from an index.

    Options, comments, environment markers and hashes are no pins. Raises LowbitError for a file without any.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text"
        raise LowbitError(f"{path}: can't read these pins ({why})") from error
    found: dict[str, str] = {}
    for raw in text.replace("\\\n", " ").splitlines():
        line = re.split(r"\s+#|\s+--hash|\s*;\s", raw.strip())[0].strip()
        if editable := re.fullmatch(r"-e\s+(?P<what>\S+)#egg=(?P<name>[\w.-]+)", raw.strip()):
            found[normalize(editable["name"])] = editable["what"]
        elif pin := PIN.match(line):
            exact = pin["how"] in ("==", "===", "@")
            found[normalize(pin["name"])] = pin["what"].strip() if exact else f"{pin['how']}{pin['what'].strip()}"
    if not found:
        raise LowbitError(
            f"{path}: expected pins (name==version, as `pip freeze` prints them) or a lowbit run, got none"
        )
    return found


def changes(old: Mapping[str, str], new: Mapping[str, str], *, common: bool = False) -> list[Change]:
    """What is not the same in both, by name; ``common``: of what both name alone."""
    names = old.keys() & new.keys() if common else old.keys() | new.keys()
    pairs = [Change(name, _version(old, name), _version(new, name)) for name in sorted(names)]
    return [change for change in pairs if change.old != change.new]


def _version(pins: Mapping[str, str], name: str) -> str:
    version = pins.get(name, "")
    return "" if version in ABSENT else version


def between(old: str, new: str) -> list[str]:
    """The versions that lie between, by their numbers alone: 2.11.0, 2.13.0 → [2.12.0]; not all need exist.

    In steps of the first part that differs; [] where either is no plain version.
    """
    ends = sorted(parsed for parsed in (_release(old), _release(new)) if parsed)
    if len(ends) < 2 or ends[0] == ends[1]:
        return []
    low, high = ends
    place = next(i for i in range(3) if low[i] != high[i])
    found = [(*low[:place], part, *[0] * (2 - place)) for part in range(low[place] + 1, high[place] + 1)]
    inner = [".".join(map(str, version)) for version in found if low < version < high]
    return inner if _release(old) == low else inner[::-1]


def _release(version: str) -> tuple[int, ...] | None:
    """The first three numbers; None for development versions, files and ranges."""
    plain = RELEASE.match(version)
    return tuple([*map(int, plain[1].split(".")), 0, 0][:3]) if plain else None


def requirement(name: str, version: str) -> str:
    """What pip is told to have just this version: ``torch==2.13.0``, ``torchao @ git+https://…``."""
    if "://" in version or version.startswith("file:"):
        return f"{name} @ {version}"
    return f"{name}{version}" if version[:1] in "<>~!" else f"{name}=={version}"


def index_options(version: str) -> list[str]:
    """Where PyTorch keeps builds of a local version: ``2.13.0+cu130`` is in the index of cu130."""
    local = version.partition("+")[2]
    if not re.fullmatch(r"cu\d+|cpu|rocm[\d.]+|xpu", local):
        return []
    nightly = "nightly/" if ".dev" in version else ""
    return [*(["--pre"] if nightly else []), "--extra-index-url", f"https://download.pytorch.org/whl/{nightly}{local}"]
