"""docs/slurm.md: its scripts are valid, and what they call exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lowbit.__main__ import make_parser
from lowbit.formats import FORMATS

PAGE = (Path(__file__).parent.parent / "docs" / "slurm.md").read_text()
SCRIPTS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
OPTIONS = (Path(__file__).parent.parent / "lowbit" / "pytest_plugin" / "options.py").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=["array", "submit", "node"])
def test_the_scripts_parse(script):
    result = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def selects(expression: str, row: str) -> bool:
    """What ``-k`` does: a word is true where it is part of the test's name or of one of its keywords."""
    names = {f"test_decode[{row}-eager-b1_c0]", *FORMATS[row].selectors}
    code = re.sub(r"\b(?!and\b|or\b|not\b)(\w+)", r"match('\1')", expression)
    return bool(eval(code, {"match": lambda word: any(word in name.lower() for name in names)}))


def test_the_parts_together_are_all_formats_each_once():
    parts = re.findall(r'"([^"]+)"', re.search(r"parts=\((.*)\)", SCRIPTS[0])[1])
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", SCRIPTS[1]).groups())
    assert last - first + 1 == len(parts)
    chosen = [row for part in parts for row in FORMATS if selects(part, row)]
    assert sorted(chosen) == sorted(FORMATS)  # each once


def test_lowbits_options_exist():
    used = {word for script in SCRIPTS for word in re.findall(r"pytest benches.*(?:\n +--.*)*", script)}
    words = {word for command in used for word in shlex.split(command.replace("\\\n", " ")) if word.startswith("--")}
    own = words - {"--junitxml"}
    assert own
    assert all(f'"{option}"' in OPTIONS for option in own)


def test_the_merge_command_parses():
    command = re.search(r"python -m lowbit (merge -o \S+)'", SCRIPTS[1])[1]
    options = make_parser().parse_args([*shlex.split(command), "a", "b"])
    assert options.runs == [Path("a"), Path("b")]
    assert options.output == Path("all.json")
