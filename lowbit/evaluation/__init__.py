"""``--eval TASKS``: lm-evaluation-harness on the quantized model in place (optional extra ``eval``).

harness.py runs it; loglikelihood.py is lowbit's own loop over the same questions, which has to agree with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lowbit.errors import LowbitError

PACKAGE = "lm_eval"


@dataclass(frozen=True)
class Tasks:
    """What is asked for. ``folder`` holds further tasks as YAML files; ``limit`` cuts each to its first documents."""

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None


def harness_version() -> str:
    """The installed harness's version. Raises LowbitError naming the extra that brings it."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise LowbitError(
            "--eval needs lm-evaluation-harness, which is not installed: pip install 'lowbit[eval]' "
            "(in a checkout: pip install -c .ci/constraints.txt -e '.[eval]')"
        ) from None
