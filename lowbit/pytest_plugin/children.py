"""Fresh processes: one case, or a whole run, measured again by a child pytest with this session's own options.

A parent calls ``record, stats = run_case(config, nodeid)`` after it has freed its device memory. The child is an
ordinary session with ``--lowbit-child FILE``; its plugin measures, does not judge or keep the run, and does this::

    def pytest_configure(config):
        if config.option.lowbit_child is not None:
            watch_parent()                                     # ends with its parent, however that ends
    def pytest_sessionfinish(session):
        write_result(config.option.lowbit_child, records, stats)   # both by node id

``session_args(config)`` are the arguments with which ``python -m pytest`` measures this session's selection again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import LowbitError
from lowbit.record import Record

TIMEOUT_S = 1800.0
GRACE_S = 5.0
TAIL_LINES = 20

PARENT_PIPE = "LOWBIT_PARENT_PIPE"
ROOT_PID = "LOWBIT_ROOT_PID"

# A child is a session of its own: no worker, and no options but those on its command line.
DROPPED_VARIABLES = (
    "PYTEST_ADDOPTS",
    "PYTEST_CURRENT_TEST",
    "PYTEST_XDIST_TESTRUNUID",
    "PYTEST_XDIST_WORKER",
    "PYTEST_XDIST_WORKER_COUNT",
)

# What decides which cases there are and what they measure. The rest selects, reports or judges: the parent's.
MEASURING = (
    *("model", "load_format", "suite", "text", "recipe", "max_kld", "auto_seconds", "lowbit_device"),
    *("eval", "eval_tasks", "eval_limit"),
)
SELECTING = {"keyword": "-k", "markexpr": "-m"}
SELECTING_LISTS = {"deselect": "--deselect", "ignore": "--ignore", "ignore_glob": "--ignore-glob"}


def child_args(config: pytest.Config) -> list[str]:
    """Arguments that make another session measure what this one does: pytest's set-up and lowbit's measuring options.

    Taken from the parsed options, so that it does not matter whether they came from the command line, the ini file or
    PYTEST_ADDOPTS; paths are absolute. addopts are emptied for that reason: they could hold ``-n`` or ``--junitxml``.
    """
    option = config.option
    args = [f"--rootdir={config.rootpath}", *(["-c", str(config.inipath)] if config.inipath else []), "-o", "addopts="]
    for setting in option.override_ini or ():
        if not setting.startswith("addopts="):
            args += ["-o", setting]
    for plugin in option.plugins or ():
        if plugin not in ("no:terminal", "no:xdist", "xdist", "xdist.plugin"):  # xdist takes its workers' terminal
            args += ["-p", plugin]
    for warning in option.pythonwarnings or ():
        args += ["-W", warning]
    if option.importmode != "prepend":
        args.append(f"--import-mode={option.importmode}")
    if getattr(option, "profile", False):
        args += ["--profile", f"--lowbit-profile={option.lowbit_profile}"]
    for name in MEASURING:
        value = getattr(option, name, None)
        if value is not None:
            args.append(f"--{name.replace('_', '-')}={_absolute(config, value)}")
    return args


def session_args(config: pytest.Config) -> list[str]:
    """Arguments of a run like this one: its selection, workers and ``--isolate``, but without judging or accepting."""
    option = config.option
    args = child_args(config)
    if getattr(option, "isolate", False):
        args.append("--isolate")
    if getattr(option, "numprocesses", None):
        args += ["-n", str(option.numprocesses)]
    for name, flag in SELECTING.items():
        if getattr(option, name, None):
            args += [flag, getattr(option, name)]
    for name, flag in SELECTING_LISTS.items():
        for value in getattr(option, name, None) or ():
            args.append(f"{flag}={value if name == 'deselect' else _absolute(config, Path(value))}")
    return [*args, *(_absolute_argument(config, str(argument)) for argument in config.args)]


def _absolute(config: pytest.Config, value: Any) -> str:
    """A path, or a --model that is a folder, made independent of the working directory; other values as they are."""
    path = Path(config.invocation_params.dir, str(value))
    return str(path) if isinstance(value, Path) or (isinstance(value, str) and path.is_dir()) else str(value)


def _absolute_argument(config: pytest.Config, argument: str) -> str:
    path, separator, name = argument.partition("::")
    return f"{Path(config.invocation_params.dir, path)}{separator}{name}"


def run_case(
    config: pytest.Config,
    nodeid: str,
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[Record, dict[str, Any] | None]:
    """Measure one case in a fresh process: its record, and pytest-benchmark's stats (None without timings).

    The child sees the device that this process sees. ``environment`` adds variables. Raises LowbitError with the
    child's last lines when it died, took longer than ``timeout_s`` or left no result; Ctrl-C ends it too.
    """
    with tempfile.TemporaryDirectory(prefix="lowbit-child-") as folder:
        result, output = Path(folder, "result.json"), Path(folder, "output.txt")
        command = [
            *(sys.executable, "-m", "pytest", f"{config.rootpath}/{nodeid}", *child_args(config)),
            # Without capture: what a child says while it dies would be lost with pytest's buffers.
            *("-p", "no:xdist", "-p", "no:cacheprovider", "-q", "-s", f"--lowbit-child={result}"),
        ]
        try:
            status = _run(command, config.invocation_params.dir, output, dict(environment or {}), timeout_s)
        except subprocess.TimeoutExpired:
            raise LowbitError(
                f"{nodeid}: its fresh process did not end within {timeout_s:g} s and was stopped; {_tail(output)}"
            ) from None
        if not result.exists():
            raise LowbitError(f"{nodeid}: its fresh process {_word_exit(status)} and left no result; {_tail(output)}")
        return _read_result(result, nodeid, output)


def _run(command: list[str], folder: Path, output: Path, environment: dict[str, str], timeout_s: float) -> int:
    """The child's exit status. Whatever ends the wait, no process of the child's group is left."""
    variables = {key: value for key, value in os.environ.items() if key not in DROPPED_VARIABLES}
    # The child's end of this pipe reads end-of-file when this process is gone, even if it was killed.
    theirs, ours = os.pipe()
    variables.update({PARENT_PIPE: str(theirs), ROOT_PID: str(_root_pid()), **environment})
    try:
        with output.open("wb") as stream:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs],
                start_new_session=True,
            )
        try:
            return process.wait(timeout_s)
        except BaseException:
            process.send_signal(signal.SIGINT)  # pytest ends in order: temporary files go
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    finally:
        os.close(theirs)
        os.close(ours)


def _word_exit(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"


def _tail(output: Path) -> str:
    lines = output.read_text(errors="replace").rstrip().splitlines()[-TAIL_LINES:] if output.exists() else []
    return "its last lines:\n" + "\n".join(f"  {line}" for line in lines) if lines else "it printed nothing"


def write_result(path: Path, records: Mapping[str, Record], stats: Mapping[str, dict[str, Any] | None]) -> None:
    """Leave a child's one result for its parent; nothing when nothing was measured. Complete or not there at all."""
    from pytest_benchmark.utils import safe_dumps

    if len(records) > 1:
        raise LowbitError(f"--lowbit-child measures one case, got {len(records)}: {', '.join(records)}")
    for nodeid, record in records.items():
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(safe_dumps({"record": record.to_dict(), "stats": stats.get(nodeid)}))
        unfinished.replace(path)


def _read_result(path: Path, nodeid: str, output: Path) -> tuple[Record, dict[str, Any] | None]:
    try:
        result = json.loads(path.read_text())
        record, stats = Record.from_dict(result["record"]), result["stats"]
    except (ValueError, TypeError, KeyError) as error:
        raise LowbitError(f"{nodeid}: its fresh process left no readable result ({error}); {_tail(output)}") from error
    if record.case != nodeid:
        raise LowbitError(f"{nodeid}: its fresh process measured another case, {record.case}; {_tail(output)}")
    return record, stats


def watch_parent() -> None:
    """In a child: end at once when the parent is gone. A case of a dead session would hold the device for minutes."""
    pipe = os.environ.pop(PARENT_PIPE, None)
    if pipe is None:
        return

    def wait_for_end() -> None:
        os.read(int(pipe), 1)
        os._exit(1)

    threading.Thread(target=wait_for_end, name="lowbit-watch-parent", daemon=True).start()


def own_pids() -> set[int]:
    """This session's processes: the first of them (xdist's controller, a child's parent) and all its descendants.

    From /proc; where there is none (no Linux, hence no NVML accounting by pid), this process alone.
    """
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            # pid (command, which may hold anything) state ppid …
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found, waiting = {os.getpid()}, [_root_pid()]
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += children.get(pid, [])
    return found


def _root_pid() -> int:
    """The session's first process: a child is told, an xdist worker's parent is its controller."""
    told = os.environ.get(ROOT_PID)
    if told is not None:
        return int(told)
    return os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
