"""Stand-ins that let the plugin's tests run in milliseconds: a device, a model choice and a lab that measures nothing.

A test says in ``plan.json`` of its project folder what the fakes do, so that fresh processes and workers do it too::

    {"formats": […], "environment": {…},            # what there is
     "tok_s": {"<part of a case's name>": 90},      # speeds other than DEFAULT_TOK_S
     "load" | "error" | "bug" | "memory" | "fault" | "kill" | "interrupt" | "sleep" | "void": "<part of a case's name>",
     "skip": ["<format>"], "real children": true}

Everything behind the lab (records, baselines, gate, kept runs) is real. ``Bench`` runs sessions in this process; there
a fresh process of one case is FakeLab again, and counted. With ``processes=True`` sessions and workers are real
processes, with ``-p fakes``, and so are their children where the plan says so.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_benches import GUARD_S

from lowbit import cases, measure, texts
from lowbit.device import Device
from lowbit.errors import LoadError, LowbitError
from lowbit.formats import FORMATS, Unmet
from lowbit.pytest_plugin import children, session
from lowbit.spent import Spent

FAKE_GPU = Device(
    kind="cuda",
    index=0,
    name="Fake GPU",
    slug="fake-gpu",
    capability=(9, 0),
    total_mib=100_000,
    multiprocessors=100,
    driver="1.0",
    cuda="13.0",
)
FAKE_CHOICE = SimpleNamespace(
    name="embedded",
    load_format="auto",
    why="a fake",
    parameters=1_000_000,
    source=None,
    config=SimpleNamespace(max_position_embeddings=4096),
)
PLAN = "LOWBIT_FAKE_PLAN"
DEFAULT_PLAN = {"formats": ["bf16-torch", "a16w4_g128-torchao"], "environment": {"torch": "2.13.0"}}
DEFAULT_TOK_S = 100.0
DECODE = "a16w4_g128-torchao-reduce-overhead-b1_c0"
NODE = f"benches/test_decode.py::test_decode[{DECODE}]"
BF16_NODE = "benches/test_decode.py::test_decode[bf16-torch-eager-b1_c0]"
CASES = 2 * (1 + 2 + 2)
"""Of the default plan: formats × (quality + 2 modes × (prefill, decode))."""
SLOW = {f"decode[{DECODE}]": 90}
"""As a plan's ``tok_s``: one case that regressed."""
TESTS = Path(__file__).parent
BENCHES = TESTS.parent / "benches"


def read_plan() -> dict:
    path = Path(os.environ[PLAN])
    return DEFAULT_PLAN | (json.loads(path.read_text()) if path.exists() else {})


class FakeLab:
    """The lab's face, without a model."""

    def __init__(
        self, device, choice, source=None, progress=print, spent=None, own_pids=set, profiler=None, tasks=None
    ):
        self.device, self.choice, self.source, self.progress = device, choice, source, progress
        self.spent = Spent()
        self.auto = SimpleNamespace()
        self.faulted = self.holding = False

    def unmet(self, case):
        if self.faulted:
            raise RuntimeError("CUDA error: asked for the free memory of a card that is gone")
        skips = read_plan().get("skip", [])
        return Unmet("capability", "needs SM100, this is SM90") if case.format.id in skips else None

    def release(self):
        if self.faulted:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.holding = False

    def close(self):
        self.release()

    def measure(self, case, nodeid, rounds):
        plan = read_plan()
        self.misbehave(plan, case.name)
        self.holding = True
        rounds(lambda: None, rounds=3)
        metrics = {"vram_peak_mib": 1000.0, "weights_mib": 500.0, "prefill_tok_s": 1000.0}
        if case.kind == "quality":
            metrics = {"kld_embedded_512_8176tok": 0.01, "ppl_embedded_512": 4.0}
        elif case.kind == "eval":
            metrics = {f"eval_acc_{case.task}_4docs": 0.5, f"eval_acc_stderr_{case.task}_4docs": 0.25}
        elif case.kind == "decode":
            speeds = (speed for part, speed in plan.get("tok_s", {}).items() if part in case.name)
            metrics["decode_tok_s"] = next(speeds, DEFAULT_TOK_S)
        else:
            metrics["ttft_ms"] = 10.0
        void = is_planned(plan, "void", case.name)
        return blank_record(
            case,
            nodeid,
            dtype="bf16",
            metrics=metrics,
            outcome="void" if void else "measured",
            error="thermal slowdown" if void else None,
        )

    def misbehave(self, plan, name):
        """The faults that a test asks for."""
        if is_planned(plan, "load", name):
            raise LoadError(plan.get("why", "model.safetensors is truncated"))
        if is_planned(plan, "error", name):
            raise LowbitError(f"NaN or Inf logits from {name}")
        if is_planned(plan, "bug", name):
            raise ValueError("a library's own error")
        if is_planned(plan, "memory", name):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA second line")
        if is_planned(plan, "fault", name):
            self.faulted = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if is_planned(plan, "kill", name):
            os.kill(os.getpid(), signal.SIGKILL)
        if is_planned(plan, "interrupt", name):
            raise KeyboardInterrupt
        if is_planned(plan, "sleep", name):
            Path(os.environ[PLAN]).with_name("asleep").write_text(str(os.getpid()))
            time.sleep(300)


def blank_record(case, nodeid, **fields):
    return replace(case.record(nodeid, FAKE_CHOICE.name, FAKE_CHOICE.load_format), **fields)


def is_planned(plan: dict, what: str, name: str) -> bool:
    return what in plan and plan[what] in name


def run_case(config, nodeid):
    """A fresh process's result: FakeLab again, without another pytest."""
    function, _, rest = nodeid.rpartition("::test_")[2].partition("[")
    case = next(c for c in cases.enumerate_cases(function, "quick", 1) if c.id == rest.removesuffix("]"))
    try:
        return FakeLab(FAKE_GPU, FAKE_CHOICE).measure(case, nodeid, lambda target, rounds: target()), None
    except LowbitError as error:
        return blank_record(case, nodeid, outcome="failed", error=str(error)), None


def install(set_attribute: Callable[..., None]) -> None:
    """Put the fakes in place; what there is to measure is the plan's."""
    plan = read_plan()
    set_attribute(session, "Lab", FakeLab)
    set_attribute(session, "detect", lambda index: FAKE_GPU)
    set_attribute(session, "environment", lambda device: dict(plan["environment"]))
    set_attribute(session.models, "choose", lambda *args: FAKE_CHOICE)
    set_attribute(session.texts, "choose_source", lambda *args: texts.Source("embedded", 512, None))
    set_attribute(measure, "timer", lambda device: time.perf_counter)
    set_attribute(cases, "FORMATS", {row: FORMATS[row] for row in plan["formats"]})


def pytest_addoption(parser: pytest.Parser) -> None:
    """As a plugin, ``-p fakes``: a process of its own."""
    install(setattr)
    if "real children" not in read_plan():
        children.run_case = run_case


class Bench:
    """A project folder with the real benches, on fake hardware."""

    def __init__(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pytester, self.monkeypatch, self.root = pytester, monkeypatch, pytester.path
        self.children: list[str] = []
        (self.root / "benches").mkdir()
        for name in ("test_decode.py", "test_prefill.py", "test_quality.py"):
            shutil.copy(BENCHES / name, self.root / "benches" / name)
        for variable in (
            "CI",
            "BUILD_NUMBER",
            "PYTEST_XDIST_WORKER",
            "PYTEST_XDIST_WORKER_COUNT",
            "PYTEST_XDIST_TESTRUNUID",
        ):
            monkeypatch.delenv(variable, raising=False)  # no worker, no longer summary
        (self.root / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers --import-mode=importlib\n")
        (self.root / "conftest.py").write_text('pytest_plugins = ["lowbit.pytest_plugin"]\n')
        monkeypatch.setenv(PLAN, str(self.root / "plan.json"))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(TESTS), str(TESTS.parent))))  # this checkout's lowbit
        monkeypatch.setenv("LOWBIT_FAKE_DEVICES", "0")
        monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
        monkeypatch.setattr(children, "run_case", self.run_case)

    def run_case(self, config, nodeid):
        self.children.append(nodeid)
        return run_case(config, nodeid)

    def plan(self, **plan) -> None:
        """What the fakes do from now on; what is not given is as in the beginning."""
        (self.root / "plan.json").write_text(json.dumps(plan))

    def recover(self) -> None:
        """From the next fresh process on, nothing that was planned happens: what it confirms is that all is well."""

        def recovered(config, nodeid):
            self.plan()
            return self.run_case(config, nodeid)

        self.monkeypatch.setattr(children, "run_case", recovered)

    def run(self, *args: str, processes: bool = False, paths: tuple[str, ...] = ("benches",)) -> pytest.RunResult:
        if processes:
            return self.pytester.runpytest_subprocess(*paths, "-p", "fakes", *args, timeout=GUARD_S)
        variables = dict(os.environ)
        with self.monkeypatch.context() as patch:
            install(patch.setattr)
            try:
                return self.pytester.runpytest_inprocess(*paths, *args, no_reraise_ctrlc=True)
            finally:  # a session sets some for its compilers
                os.environ.clear()
                os.environ.update(variables)

    def accept(self, *args: str) -> pytest.RunResult:
        result = self.run("--update-baselines", "--baseline-runs", "1", *args)
        assert result.ret == 0, result.outlines
        return result

    @property
    def baseline(self) -> Path:
        return self.root / "benches" / "baselines" / "fake-gpu" / "0001_embedded-auto.json"

    def rows(self) -> dict[str, dict[str, list[float]]]:
        """The baseline's metrics by case: the value of each run."""
        document = json.loads(self.baseline.read_text())
        return {row["fullname"]: row["extra_info"]["lowbit"]["metrics"] for row in document["benchmarks"]}

    def runs(self) -> list[Path]:
        return sorted((self.root / ".lowbit" / "runs").glob("*"))

    def journal(self) -> list[dict]:
        """The lines of the newest kept run."""
        return [json.loads(line) for line in (self.runs()[-1] / "journal.jsonl").read_text().splitlines()]
