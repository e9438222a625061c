"""Options whose values can't serve are refused in one line, before anything is measured."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-kld", "-1", "expected 0 or more, got -1"),
        ("--max-kld", "nan", "expected 0 or more, got nan"),
        ("--max-vram", "-1", "expected 0 or more, got -1"),
        ("--text", "empty.txt", "empty.txt is empty; quality needs at least one window of text"),
        ("--text", "none.txt", "no such file: none.txt"),
        ("--baselines-dir", "empty.txt", "expected a folder, empty.txt is a file"),
    ],
)
def test_a_value_that_can_not_serve_is_refused(bench, option, value, message):
    (bench.root / "empty.txt").touch()
    result = bench.run(f"{option}={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {option}: {message}"])
    assert bench.runs() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "no:benchmark"), "benches need pytest-benchmark: it is not loaded (-p no:benchmark?)"),
        (("--benchmark-disable",), "--benchmark-disable: a bench without timing measures nothing; leave it out"),
    ],
)
def test_benches_do_not_run_without_timing(bench, arguments, message):
    result = bench.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {message}" in result.stderr.str()
    assert bench.runs() == []
