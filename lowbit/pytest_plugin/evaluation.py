"""``--eval``: the options that ask for tasks of lm-evaluation-harness, and when benches/test_eval.py is collected."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import LowbitError
from lowbit.evaluation import Tasks, harness_version

FILE = "test_eval.py"


def add_options(group: Any) -> None:
    group.addoption(
        "--eval",
        metavar="TASKS",
        help="also run these tasks of lm-evaluation-harness, e.g. wikitext,winogrande,hellaswag, on every format "
        "(pip install 'lowbit[eval]'; docs/evaluation.md)",
    )
    group.addoption("--eval-tasks", type=Path, metavar="DIR", help="a folder with further tasks as YAML files")
    group.addoption("--eval-limit", type=int, metavar="N", help="only the first N documents of each task")


def read_options(config: pytest.Config) -> Tasks | None:
    """What is asked for, None for nothing. Raises pytest.UsageError; nothing is imported that takes time."""
    option = config.option
    if option.eval is None:
        for name in ("eval_tasks", "eval_limit"):
            if getattr(option, name) is not None:
                raise pytest.UsageError(f"--{name.replace('_', '-')}: says how to evaluate, give --eval TASKS too")
        return None
    names = tuple(dict.fromkeys(word.strip() for word in option.eval.split(",") if word.strip()))
    if not names:
        raise pytest.UsageError(f"--eval: expected tasks, e.g. wikitext,winogrande, got {option.eval!r}")
    if option.eval_tasks is not None and not option.eval_tasks.is_dir():
        raise pytest.UsageError(f"--eval-tasks: no such folder: {option.eval_tasks}")
    if option.eval_limit is not None and option.eval_limit < 1:
        raise pytest.UsageError(f"--eval-limit: expected at least 1, got {option.eval_limit}")
    if option.profile:
        raise pytest.UsageError("--profile looks at timed cases: leave --eval out")
    try:
        harness_version()
    except LowbitError as error:
        raise pytest.UsageError(str(error)) from error
    return Tasks(names, option.eval_tasks, option.eval_limit)


def ignores(path: Path, tasks: Tasks | None) -> bool:
    """Without --eval its bench file has no cases: pytest would show an empty parameter set as a skip."""
    return path.name == FILE and path.parent.name == "benches" and tasks is None


def arguments(tasks: Tasks | None) -> list[str]:
    """The options as a user would type them."""
    if tasks is None:
        return []
    words = [f"--eval {','.join(tasks.names)}"]
    words += [f"--eval-tasks {shlex.quote(str(tasks.folder))}"] if tasks.folder else []
    return words + ([f"--eval-limit {tasks.limit}"] if tasks.limit else [])
