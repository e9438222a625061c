"""Rules that hold for tests/ alone: every warning is an error here, while a night of benches/ must survive one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fakes import Bench

    from lowbit import texts
    from lowbit.lab import Lab

HERE = Path(__file__).parent
DYNAMO_ON_3_13_0 = "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"
"""Of the interpreter's build, not of lowbit: torch/_dynamo/guards.py says it once per process, on 3.13.0 alone."""


def pytest_configure() -> None:
    # A shell that starts a job in the background has it ignore Ctrl-C, which every process that it starts inherits: the
    # tests that interrupt such a process would wait for ever.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Workers share the cores, and so does what the tests start: threads that wait for each other on one core made text
    # generation 8 times slower.
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            # Not appended: a test's own filterwarnings mark is closer to it and wins.
            item.add_marker(pytest.mark.filterwarnings("error", DYNAMO_ON_3_13_0), append=False)


@pytest.fixture
def bench(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A project whose hardware is fake, for modules with ``pytest_plugins = ["pytester"]``."""
    from fakes import Bench  # brings torch in

    return Bench(pytester, monkeypatch)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers on disk, with a tokenizer; nobody writes to it."""
    import tiny_lab

    return tiny_lab.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> texts.Source:
    """A text in that tokenizer's words."""
    import tiny_lab

    return tiny_lab.write_story(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tiny_bench(tiny_folder: Path, story: texts.Source) -> Iterator[Lab]:
    """A lab with that Llama and text on the CPU, for all tests of a module."""
    import tiny_lab

    made = tiny_lab.make_lab(tiny_folder, story)
    yield made
    made.close()


@pytest.fixture
def with_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU it is asked what it can; whether this machine could compile for it is a question of its own."""
    from lowbit.kernels import nvrtc

    monkeypatch.setattr(nvrtc, "available", lambda: None)


@pytest.fixture(scope="session")
def kernels_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where emulated kernels are compiled, once for all tests and all workers: that is half of their time."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated_kernels"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def same_formats() -> Iterator[None]:
    """The rows that models bring along are gone after each test."""
    from lowbit.formats import FORMATS

    before = dict(FORMATS)
    yield
    for name in set(FORMATS) - set(before):
        del FORMATS[name]
