"""docs/slurm.md: its scripts are valid, and what they call exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nights
import pytest
from _pytest.mark.expression import Expression  # what -k itself reads

from lowbit import merge
from lowbit.__main__ import make_parser
from lowbit.cases import KINDS, Case, enumerate_cases
from lowbit.formats import FORMATS
from lowbit.pytest_plugin.collection import selectors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "slurm.md").read_text()
SCRIPTS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
OPTIONS = (Path(__file__).parent.parent / "lowbit" / "pytest_plugin" / "options.py").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=["array", "submit", "node"])
def test_the_scripts_parse(script):
    result = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def expressions() -> list[str]:
    """What bash makes of the array script's ``parts``."""
    lines = re.search(r"^parts=.*?(?=^part=)", SCRIPTS[0], re.DOTALL | re.MULTILINE)[0]
    command = ["bash", "-euc", lines + "printf '%s\\n' \"${parts[@]}\""]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def selects(part: Expression, case: Case) -> bool:
    """What ``-k`` does: a word is true where it is part of the test's name, of a parent's or of an extra keyword."""
    names = {"benches", f"test_{case.kind}.py", f"test_{case.name}", *selectors(case)}
    return part.evaluate(lambda word: any(word.lower() in name.lower() for name in names))


def test_the_parts_together_are_all_cases_each_once_and_a_format_in_one():
    parts = [Expression.compile(text) for text in expressions()]
    for script in SCRIPTS[:2]:
        first, last = map(int, re.search(r"--array=(\d+)-(\d+)", script).groups())
        assert range(first, last + 1) == range(len(parts))
    of_a_new_library = replace(FORMATS["bf16-torch"], name="a16w4_torchao_g64", backend="new")
    for row in [*FORMATS.values(), of_a_new_library]:
        cases = [case for kind in KINDS for case in enumerate_cases(kind, "full", 8_000_000_000, [row])]
        chosen = {number for number, part in enumerate(parts) for case in cases if selects(part, case)}
        assert len(chosen) == 1, row.id
        assert all(any(selects(part, case) for part in parts) for case in cases), row.id
    assert chosen == {len(parts) - 1}


@pytest.mark.parametrize("number", [0, 2], ids=["array", "node"])
def test_a_task_runs_pytest_on_all_its_cores_and_takes_resume(number, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\necho cores=$SRUN_CPUS_PER_TASK\nprintf '%s\\n' \"$@\"\n")
    srun.chmod(0o755)
    (tmp_path / "lowbit.sbatch").write_text(SCRIPTS[number])
    slurm = {"SUBMIT_DIR": tmp_path, "CPUS_PER_TASK": 8, "ARRAY_TASK_ID": 1, "ARRAY_JOB_ID": 77}
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", **{f"SLURM_{key}": str(v) for key, v in slurm.items()}}
    command = ["bash", "lowbit.sbatch", "--resume"]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[:3] == ["cores=8", "pytest", "benches"]
    assert out[-1] == "--resume"
    if number == 0:
        assert out[out.index("-k") + 1] == expressions()[1]
    assert "#SBATCH --signal=INT@" in SCRIPTS[number]  # B: would signal the shell alone, which waits for srun


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


SBATCH = """#!/bin/bash
# As Slurm does it: an array's tasks one after the other, each with its own SLURM_*; --wrap is a script for sh.
echo "$*" >> "$SLURM_LOG"
for word in "$@"; do
    case $word in
        --array=*) IFS=- read -r first last <<< "${word#*=}" ;;
        --constraint=*) export CONSTRAINT=${word#*=} ;;
        --output=*) output=${word#*=} ;;
        --wrap=*) wrap=${word#*=} ;;
        -*) ;;
        *) script=$word ;;
    esac
done
[[ -n ${wrap-} ]] && { sh -c "$wrap" > "$output"; exit; }
job=$((1000 + $(wc -l < "$SLURM_LOG")))
for ((task = first; task <= last; task++)); do
    SLURM_ARRAY_JOB_ID=$job SLURM_ARRAY_TASK_ID=$task SLURM_CPUS_PER_TASK=8 SLURM_SUBMIT_DIR=$PWD bash "$script" || true
done
echo "$job;cluster"
"""
PYTEST = """#!/bin/bash
# Keeps the run that this task would have made, and writes its -k down.
cp -r "made/$CONSTRAINT-$SLURM_ARRAY_TASK_ID" .lowbit/runs/
while [[ $1 != -k ]]; do shift; done
echo "$CONSTRAINT $2" >> tasks
exit 1
"""


def test_the_whole_sweep_on_a_slurm_that_is_none(tmp_path, monkeypatch):
    """The page's own scripts, submitted: every kind and part measured once, all runs of the sweep in one file."""
    kinds = ("h100", "h200", "a100")
    for name in ("logs", "made", "bin", ".venv/bin", ".lowbit/runs"):
        (tmp_path / name).mkdir(parents=True)
    programs = {"sbatch": SBATCH, "srun": '#!/bin/bash\nexec "$@"\n', "pytest": PYTEST}
    programs["python"] = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "lowbit.sbatch").write_text(SCRIPTS[0])
    for kind in kinds:
        for part in range(len(expressions())):
            made = nights.keep(tmp_path / "kept", [nights.decode(f"part{part}-torch")], device=f"nvidia-{kind}")
            shutil.move(made, tmp_path / "made" / f"{kind}-{part}")
    earlier = nights.keep(tmp_path / ".lowbit" / "runs", [nights.decode("earlier-torch")])
    for path in (earlier, *earlier.iterdir()):
        os.utime(path, (0, 0))
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    environment = {"PATH": path, "SLURM_LOG": str(tmp_path / "submitted"), "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-eu", "-c", SCRIPTS[1]], cwd=tmp_path, env=environment, check=True)
    assert "\n--dependency=afterany:1001:1002:1003 " in (tmp_path / "submitted").read_text()
    tasks = (tmp_path / "tasks").read_text().splitlines()
    assert tasks == [f"{kind} {part}" for kind in kinds for part in expressions()]
    assert "24 runs merged into all.json" in (tmp_path / "logs" / "merge.txt").read_text()
    merged = merge.read(tmp_path / "all.json")
    assert {run.header.device for run in merged} == {f"nvidia-{kind}" for kind in kinds}
    assert [len(run.entries) for run in merged] == [len(expressions())] * len(kinds)


@pytest.mark.parametrize("script", SCRIPTS, ids=["array", "submit", "node"])
def test_shellcheck_finds_nothing_in_the_scripts(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; the dev extra and tox have it")
    told = [shellcheck, "--shell=bash", "--exclude=SC1091", "-"]  # .venv/bin/activate is not there to be read
    result = subprocess.run(told, input=script, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
