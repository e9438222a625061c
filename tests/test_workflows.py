"""CI as text: linters on workflows, scripts and Dockerfile; secrets; the scripts, with docker and gh as fakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CI = ROOT / ".ci"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = sorted(path for path in CI.iterdir() if path.read_bytes().startswith(b"#!"))


def tool(name: str) -> str:
    """A linter's path: beside this interpreter or on PATH. Skips where it is not installed (``pip install .[dev]``)."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; the dev extra and tox have it")
    return found


def check(*command: str, given: str | None = None) -> None:
    result = subprocess.run(command, input=given, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def steps(path: Path) -> list[dict]:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


RUNS = [
    pytest.param(path, step, id=f"{path.stem}-{number}")
    for path in WORKFLOWS
    for number, step in enumerate(steps(path))
    if "run" in step
]


# -- linters -----------------------------------------------------------------------------------------------------------


def test_the_workflows_are_the_three():
    assert [path.name for path in WORKFLOWS] == ["nightly.yml", "publish.yml", "tests.yml"]


def test_zizmor_finds_nothing_in_the_workflows():
    check(tool("zizmor"), "--offline", "--no-progress", *map(str, WORKFLOWS))


def test_zizmor_would_find_something(tmp_path):
    """Else the test above could pass on an option that makes it look away."""
    path = tmp_path / ".github" / "workflows" / "bad.yml"
    path.parent.mkdir(parents=True)
    path.write_text(
        "on: pull_request_target\njobs:\n  a:\n    runs-on: ubuntu-24.04\n    steps:\n"
        "      - run: echo ${{ github.event.pull_request.title }}\n"
    )
    result = subprocess.run([tool("zizmor"), "--offline", "--no-progress", str(path)], capture_output=True, check=False)
    assert result.returncode != 0


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_the_scripts(path):
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert path.stat().st_mode & 0o111
    check(tool("shellcheck"), str(path))


@pytest.mark.parametrize(("path", "step"), RUNS)
def test_shellcheck_finds_nothing_in_a_workflows_step(path, step):
    check(tool("shellcheck"), "--shell=bash", "-", given=re.sub(r"\$\{\{.*?\}\}", "expression", step["run"]))


def test_hadolint_finds_nothing_in_the_dockerfile():
    check(tool("hadolint"), "--failure-threshold", "style", str(ROOT / "Dockerfile"))


# -- secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_secrets_reach_a_step_by_its_environment_alone(path):
    """In a script's text an expression is pasted before the shell sees it: it would be logged, and could be code."""
    text = path.read_text()
    in_environment = [
        name
        for step in steps(path)
        for name, value in step.get("env", {}).items()
        if re.search(r"secrets\.|github\.token", str(value))
    ]
    assert len(re.findall(r"secrets\.|github\.token", text)) == len(in_environment)
    for step in steps(path):
        assert not re.search(r"\bset -[a-z]*x", step.get("run", "")), "xtrace logs what it runs"
        for name in in_environment:
            for line in step.get("run", "").splitlines():
                assert f"${name}" not in line or line.rstrip().endswith(f'--password-stdin <<< "${name}"'), line


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_traces_or_prints_a_token(path):
    assert not re.search(r"set -[a-z]*x|TOKEN|\bprintenv\b|^\s*env\s*$", path.read_text(), re.M)


# -- publish_image -----------------------------------------------------------------------------------------------------


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Run .ci/publish_image with a docker that only writes down what it is asked: (exit code, stderr, its commands)."""
    log = tmp_path / "log"
    docker = tmp_path / "docker"
    docker.write_text(
        f"#!{sys.executable}\nimport json, sys\nopen({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    docker.chmod(0o755)

    def run(ref: str) -> tuple[int, str, list[list[str]]]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "GITHUB_REPOSITORY": "Some-One/Lowbit",
            "GITHUB_SHA": "0" * 40,
            "GITHUB_REF": ref,
        }
        result = subprocess.run(
            [str(CI / "publish_image")], env=environment, capture_output=True, text=True, check=False
        )
        lines = log.read_text().splitlines() if log.exists() else []
        return result.returncode, result.stderr, [json.loads(line) for line in lines]

    return run


def version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert found
    return found[1]


@pytest.mark.parametrize(
    ("ref", "tags"),
    [
        ("refs/heads/main", ["0" * 40, "main"]),
        ("refs/heads/a/b", ["0" * 40, "a-b"]),
        (f"refs/tags/v{version()}", ["0" * 40, version(), "latest"]),
    ],
)
def test_an_image_has_a_tag_per_commit_and_per_release(publish, ref, tags):
    code, _, commands = publish(ref)
    assert code == 0
    build, *tries = commands
    assert build[0] == "build"
    names = [f"ghcr.io/some-one/lowbit:{tag}" for tag in tags]
    assert [word for before, word in pairwise(build) if before == "--tag"] == names
    assert f"LOWBIT_COMMIT={'0' * 40}" in build
    assert [command[0] for command in tries] == ["run", "run", *["push"] * len(tags)]  # tried before it is pushed
    assert [command[1] for command in tries if command[0] == "push"] == names


def test_a_release_of_another_version_than_the_packages_is_not_built(publish):
    code, said, commands = publish("refs/tags/v99.0.0")
    assert code == 1
    assert "tag v99.0.0, but pyproject.toml says" in said
    assert commands == []
