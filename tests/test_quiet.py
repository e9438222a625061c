from __future__ import annotations

import logging
import subprocess
import sys
import textwrap

import pytest

from lowbit import quiet
from lowbit.quiet import captured_output, quiet_import

NOISY = """
    import logging, os, sys, warnings
    os.write(1, b"from compiled code\\n")
    os.write(2, b"and to stderr\\n")
    print("from python")
    warnings.warn("an API is deprecated", DeprecationWarning)
    handler = logging.StreamHandler()
    log = logging.getLogger("noisy")
    log.propagate = False
    log.addHandler(handler)
    log.warning("from a logger")
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Writes a library with this source and makes it importable, under a name of its own."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def test_nothing_is_printed_and_no_warning_leaves(library, capfd):
    quiet_import(library("noisy_quiet", NOISY))
    assert capfd.readouterr() == ("", "")


def test_a_handler_made_at_import_still_works(library, capsys):
    module = quiet_import(library("noisy_handler", NOISY))
    module.log.warning("later")
    assert "later" in capsys.readouterr().err
    logging.getLogger("noisy").removeHandler(module.handler)


def test_a_failing_import_shows_what_was_printed(library, capfd):
    name = library("noisy_broken", textwrap.dedent(NOISY) + "raise RuntimeError('no driver')\n")
    with pytest.raises(RuntimeError, match="no driver") as failure:
        quiet_import(name)
    (note,) = failure.value.__notes__
    assert "noisy_broken printed while it was imported" in note
    for text in ("from compiled code", "and to stderr", "from python", "from a logger"):
        assert text in note
    assert capfd.readouterr() == ("", "")


def test_a_missing_library_is_an_import_error():
    with pytest.raises(ModuleNotFoundError):
        quiet_import("lowbit_has_no_such_library")


def test_streams_come_back(capsys):
    before = sys.stdout, sys.stderr
    with captured_output() as output:
        print("inside")
        assert output() == "inside\n"
    assert (sys.stdout, sys.stderr) == before
    print("outside")
    assert capsys.readouterr().out == "outside\n"


def test_a_library_that_was_loaded_before_is_hushed_once(library, monkeypatch):
    calls = []
    name = library("noisy_loaded", "")
    __import__(name)
    monkeypatch.setitem(quiet._HUSH, name, calls.append)
    assert quiet_import(name) is quiet_import(name)
    assert calls == [sys.modules[name]]


def test_llm_int8_does_not_repeat_itself():
    quiet_import("bitsandbytes")
    assert not logging.getLogger("bitsandbytes.autograd._functions").isEnabledFor(logging.WARNING)


def test_a_loud_librarys_import_logs_nothing(library, monkeypatch, caplog):
    name = library("loud_logger", "import logging\nlogging.getLogger(__name__).warning('no kernel here')\n")
    monkeypatch.setattr(quiet, "_LOGGERS", frozenset({name}))
    quiet_import(name)
    logging.getLogger(f"{name}.ops").warning("a cast")
    assert caplog.records == []


def test_torchs_handler_with_an_earlier_stream_is_silent_too():
    """pytest's capture gives torch such a stream. In a process of its own: torch and transformers are imported once."""
    code = (
        "import io, sys\n"
        "shown, sys.stderr = sys.stderr, io.StringIO()\n"
        "import torch\n"
        "captured, sys.stderr = sys.stderr, shown\n"
        "from lowbit.quiet import quiet_import\n"
        "quiet_import('transformers')\n"
        "print(captured.getvalue())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("", "")
