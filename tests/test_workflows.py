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

from lowbit import trend

ROOT = Path(__file__).parents[1]
CI = ROOT / ".ci"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = sorted(path for path in CI.iterdir() if path.is_file() and path.read_bytes().startswith(b"#!"))


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
    text = path.read_text().replace("--env HF_TOKEN ", "")  # docker takes it by name, in no command line
    assert not re.search(r"set -[a-z]*x|TOKEN|\bprintenv\b|^\s*env\s*$", text, re.M)


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


# -- nightly -----------------------------------------------------------------------------------------------------------


SUMMARY = "### 1 regression\n\n| case | metric |\n"


@pytest.fixture
def nightly(tmp_path, monkeypatch):
    """Run .ci/nightly with a docker that leaves a summary and ends as told: (exit code, docker's commands, folder)."""
    log, docker, root = tmp_path / "log", tmp_path / "docker", tmp_path / "a night"
    docker.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "if sys.argv[1] == 'rm': sys.exit('no such container')\n"
        "if sys.argv[1] == 'run':\n"
        "    mounts = dict(reversed(w.split(':')) for b, w in zip(sys.argv, sys.argv[1:]) if b == '--volume')\n"
        f"    pathlib.Path(mounts['/out'], 'summary.md').write_text({SUMMARY!r})\n"
        "    run = pathlib.Path(mounts['/lowbit/.lowbit'], 'runs', '0002')\n"
        "    run.mkdir()\n"
        "    (run / 'run.json').write_text('{}')\n"
        "    sys.exit(int(os.environ['CODE']))\n"
    )
    docker.chmod(0o755)
    former = root / "kept" / "lowbit" / "runs" / "0001"
    former.mkdir(parents=True)
    os.utime(former, (0, 0))

    def night(code: int, arguments: str = "") -> tuple[int, list[list[str]], Path]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(tmp_path / "home"),
            "GITHUB_SHA": "0" * 40,
            "GITHUB_STEP_SUMMARY": str(tmp_path / "step"),
            "HF_TOKEN": "hf_secret",
            "ARGUMENTS": arguments,
            "CODE": str(code),
        }
        command = [str(CI / "nightly"), str(root / "out" / "nvidia-h200"), str(root / "kept")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.stderr == ""
        return result.returncode, [json.loads(line) for line in log.read_text().splitlines()], root

    return night


def test_a_night_is_a_comparison_in_the_image(nightly, tmp_path):
    code, (build, remove, run), root = nightly(3, "--model llama-3.1-8b -k 'int4 and decode'")
    assert code == 3  # pytest's
    assert (build[0], build[-1], remove[:2]) == ("build", ".", ["rm", "--force"])
    assert f"LOWBIT_COMMIT={'0' * 40}" in build
    image = run.index("lowbit:nightly")
    assert run[image + 1 : image + 5] == ["benches", "--benchmark-compare", "--suite", "nightly"]
    assert run[-4:] == ["--model", "llama-3.1-8b", "-k", "int4 and decode"]
    written = {run[run.index(option) + 1] for option in OF_A_NIGHT}
    assert all(path.startswith("/out/") for path in written)
    assert len(written) == len(OF_A_NIGHT)
    assert {"--gpus", "--no-healthcheck", f"{os.getuid()}:{os.getgid()}"} < set(run[:image])
    mounts = {
        words[1].partition(":")[2]: words[1].partition(":")[0] for words in pairwise(run) if words[0] == "--volume"
    }
    assert mounts["/home/lowbit/.cache/lowbit"] == str(
        root / "kept" / "cache"
    )  # Inductor, Triton, NVRTC: see compilers
    assert "hf_secret" not in " ".join([*build, *run])
    assert run[run.index("--env") + 1] == "HF_TOKEN"


OF_A_NIGHT = ("--junitxml", "--benchmark-json", "--report", "--summary", "--baseline-patch")


def test_a_night_without_its_folders_says_what_it_takes():
    result = subprocess.run([str(CI / "nightly")], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: .ci/nightly OUT KEPT")


def test_a_nights_options_exist():
    from lowbit.pytest_plugin.options import add_options

    class Parser:
        def __init__(self) -> None:
            self.names: set[str] = set()

        def getgroup(self, *title: str) -> Parser:
            return self

        def addoption(self, name: str, **settings: object) -> None:
            self.names.add(name)

    parser = Parser()
    add_options(parser)
    assert {"--suite", *OF_A_NIGHT} - {"--junitxml", "--benchmark-json"} <= parser.names


def test_a_night_leaves_its_summary_its_code_and_its_own_run(nightly, tmp_path):
    code, _, root = nightly(0)
    out = root / "out" / "nvidia-h200"
    assert code == 0
    assert (tmp_path / "step").read_text() == SUMMARY
    assert (out / "exit_code").read_text() == "0\n"
    assert sorted(path.name for path in out.iterdir()) == ["exit_code", "runs", "summary.md"]
    assert [path.name for path in (out / "runs").iterdir()] == ["0002"]  # the nights before are kept, not uploaded
    assert sorted(path.name for path in (root / "kept" / "lowbit" / "runs").iterdir()) == ["0001", "0002"]


def test_a_night_keeps_as_many_runs_as_the_trend_looks_at(nightly, tmp_path):
    """The folder is cached: it must not grow for ever."""
    kept = tmp_path / "a night" / "kept" / "lowbit" / "runs"
    for number in range(trend.NIGHTS):
        (kept / f"0000-{number:03}").mkdir()
    nightly(0)
    left = sorted(path.name for path in kept.iterdir())
    assert len(left) == trend.NIGHTS
    assert left[0] == "0000-002"  # the two oldest went; 0001 and this night's 0002 came after
    assert left[-2:] == ["0001", "0002"]


# -- nightly_issue -----------------------------------------------------------------------------------------------------


@pytest.fixture
def issue(tmp_path):
    """Run .ci/nightly_issue with a gh that writes down what it is asked: its commands, and the issue's text."""
    log, gh, results = tmp_path / "log", tmp_path / "gh", tmp_path / "results"
    gh.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, sys\n"
        "body = [pathlib.Path(w).read_text() for b, w in zip(sys.argv, sys.argv[1:]) if b == '--body-file']\n"
        f"open({str(log)!r}, 'a').write(json.dumps([sys.argv[1:], body]) + '\\n')\n"
        "if sys.argv[1:3] == ['issue', 'list']: print(os.environ['OPEN'], end='')\n"
    )
    gh.chmod(0o755)
    results.mkdir()

    def tell(result: str, *, number: str = "", **found: dict[str, str]) -> tuple[list[list[str]], str]:
        for device, files in found.items():
            (results / device).mkdir()
            for name, text in files.items():
                (results / device / name).write_text(text)
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "GITHUB_SERVER_URL": "https://github.com",
            "GITHUB_REPOSITORY": "some/lowbit",
            "GITHUB_RUN_ID": "77",
            "DEVICES": '["h200",\n  "h100", "a100"]',
            "RESULT": result,
            "OPEN": number,
        }
        command = [str(CI / "nightly_issue"), str(results)]
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        return [words for words, _ in rows], "".join(text for _, bodies in rows for text in bodies)

    return tell


NIGHT = {
    "h200": {"exit_code": "1\n", "summary.md": SUMMARY, "accept.patch": "--- a\n"},
    "h100": {"exit_code": "0\n", "summary.md": "### nothing got worse\n"},
}


def test_a_failing_night_opens_an_issue_with_each_devices_table(issue):
    (listed, label, create), body = issue("failure", **NIGHT)
    assert listed[:2] == ["issue", "list"]
    assert label[:3] == ["label", "create", "nightly"]
    assert create[:2] == ["issue", "create"]
    assert create[create.index("--label") + 1] == "nightly"
    sections = {part.partition("\n")[0]: part for part in body.split("## ") if not part.startswith("Last night")}
    head, _, rest = body.partition("## h200\n")
    assert head == "Last night: https://github.com/some/lowbit/actions/runs/77\n\n"
    assert rest.startswith(SUMMARY)
    assert "gh run download 77 --name nightly-h200 && git apply h200/accept.patch" in rest
    assert sections["h100"].strip() == "h100\nNothing got worse."
    assert "no runner labelled `a100`" in sections["a100"]


def test_an_open_issue_is_updated(issue):
    (_, edit, comment), body = issue("failure", number="5\n", **NIGHT)
    assert edit[:3] == ["issue", "edit", "5"]
    assert SUMMARY in body
    assert comment[:3] == ["issue", "comment", "5"]
    assert comment[-1].endswith("/runs/77")


def test_a_missing_baseline_is_told(issue):
    _, body = issue("failure", h200={"exit_code": "4\n"}, h100={"exit_code": "3\n"})
    assert "## h200\nWrong usage: no baseline of this device" in body
    assert "## h100\nExit code 3 and no summary" in body


def test_a_night_that_could_judge_nothing_tells_why(issue):
    summary = "### ⚠️ nothing could be judged; 3 cases void\n"
    _, body = issue("failure", h200={"exit_code": "4\n", "summary.md": summary})
    assert f"## h200\n{summary}" in body
    assert "Wrong usage" not in body


@pytest.mark.parametrize(("number", "did"), [("", []), ("5", [["issue", "close", "5"]])])
def test_a_good_night_closes_it(issue, number, did):
    commands, _ = issue("success", number=number, h200={"exit_code": "0\n"})
    assert [words[:3] for words in commands[1:]] == did


VOID = "### ⚠️ nothing got worse in what could be judged; 2 cases void\n"


def test_a_night_with_void_cases_closes_nothing(issue):
    (_, comment), _ = issue("success", number="5", h200={"exit_code": "0\n", "summary.md": VOID}, h100=NIGHT["h100"])
    assert comment[:3] == ["issue", "comment", "5"]
    assert "not all could be on h200: " in comment[-1]


def test_a_device_with_void_cases_says_so_beside_one_that_fails(issue):
    _, body = issue("failure", h200=NIGHT["h200"], h100={"exit_code": "0\n", "summary.md": VOID})
    assert f"## h100\n{VOID}" in body


def test_the_nightly_workflow_hands_the_scripts_what_they_read():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())["jobs"]
    bench, told = jobs["bench"], jobs["issue"]
    assert bench["runs-on"] == ["self-hosted", "linux", "gpu", "${{ matrix.device }}"]
    assert "LOWBIT_DEVICES" in bench["strategy"]["matrix"]["device"]
    assert bench["strategy"]["fail-fast"] is False
    (run,) = (step for step in bench["steps"] if "run" in step)
    assert run["run"] == '.ci/nightly ".nightly/out/$DEVICE" .nightly/kept'
    used = {action: step for step in bench["steps"] for action in [step.get("uses", "").partition("@")[0]]}
    assert used["actions/upload-artifact"]["if"] == "always()"
    assert used["actions/upload-artifact"]["with"]["path"] == ".nightly/out"
    for action in ("actions/cache/restore", "actions/cache/save"):
        steps_of = [step for step in bench["steps"] if step.get("uses", "").startswith(f"{action}@")]
        assert [step["with"]["path"] for step in steps_of] == [".nightly/kept/cache", ".nightly/kept/lowbit"]
        assert all(step.get("if") == ("always()" if action.endswith("save") else None) for step in steps_of)
    saved = [step["with"]["key"] for step in bench["steps"] if "cache/" in step.get("uses", "")]
    assert saved[:2] == saved[2:]
    assert told["needs"] == "bench"
    assert told["permissions"] == {"contents": "read", "issues": "write"}
    script = (CI / "nightly_issue").read_text()
    environment = next(step for step in told["steps"] if "run" in step)["env"]
    for name in ("DEVICES", "RESULT"):
        assert f"${name}" in script
        assert name in environment
