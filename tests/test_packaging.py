"""Pins, tox, Docker and workflows say the same thing, and a wheel holds its data."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tomllib
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from lowbit import __version__

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TOP_LEVEL = {"pyproject.toml", "conftest.py", "lowbit", "benches", "tests", "Dockerfile", "tox.ini"}
TOP_LEVEL |= {"README.md", "LICENSE", "CHANGELOG.md", "docs"}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(package): version for package, version in found.items()}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def tox():
    parser = ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    return parser


def ranges(project) -> dict[str, str]:
    """Package -> its lower bound, of the dependencies and the gpu extra."""
    rows = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    return {canonical(name): bound for name, bound in (row.split(">=") for row in rows)}


def test_every_dependency_is_pinned_and_nothing_else(project):
    assert pins("constraints.txt").keys() == ranges(project).keys()


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_pins_lie_within_the_ranges(project, name):
    bounds = ranges(project)
    for package, version in pins(name).items():
        assert release(version) >= release(bounds[package]), package


def test_the_oldest_pins_are_the_oldest_of_their_ranges(project):
    bounds = ranges(project)
    for package, version in pins("constraints-oldest.txt").items():
        assert release(version)[:2] == release(bounds[package])[:2], package


def test_this_environment_is_one_of_the_pinned_ones():
    """Catches a pin that was raised in the file alone: tests/ would then speak of other versions than they ran on."""
    for package in ("pytest", "pytest-benchmark", "transformers"):
        allowed = {pins(name)[package] for name in ("constraints.txt", "constraints-oldest.txt")}
        assert metadata.version(package) in allowed, f"{package}: run the tests by tox"


def test_versions_agree(project):
    assert project["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_tox_has_one_environment_per_duty(tox):
    assert {"testenv", "testenv:bench", "testenv:lint", "testenv:type"} <= set(tox.sections())
    assert tox["testenv"]["commands"].split() == ["pytest", "{posargs:tests", "-n", "2}"]
    assert tox["testenv:bench"]["commands"].split() == ["pytest", "benches", "--compare-if-baseline", "{posargs}"]
    assert "lowbit.gpu_libraries" in tox["testenv:bench"]["commands_pre"]
    assert {"PIP_*", "HF_*", "CUDA_*", "LOWBIT_*"} <= set(tox["testenv"]["pass_env"].split())


@pytest.mark.parametrize("name", ["testenv", "testenv:bench", "testenv:type"])
def test_torch_is_installed_before_anything_that_asks_for_it(tox, name):
    deps = tox[name]["deps"]
    assert "-c .ci/constraints.txt" in deps
    assert "torch" in deps
    assert not {"transformers", "bitsandbytes", "torchao"} & set(deps.split())


def test_the_dockerfile_takes_the_same_pins_and_keeps_torch_before_the_code():
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines)
    assert re.search(r"^FROM nvidia/cuda:\d+\.\d+\.\d+-\S+$", text, re.M)
    order = ["COPY .ci/constraints.txt", "install --constraint /tmp/constraints.txt torch", "COPY . ."]
    positions = [text.index(step) for step in order]
    assert positions == sorted(positions)
    assert text.index("USER 1000") > text.index("COPY . .")
    assert re.search(r'^HEALTHCHECK .*CMD \["python", "-m", "lowbit", "formats"\]$', text, re.M)
    assert text.endswith('ENTRYPOINT ["pytest"]\nCMD ["benches"]')
    for name in ("LOWBIT_COMMIT", "COPY . ."):  # what changes with every commit comes after what does not
        assert text.index(name) > text.index("install --requirement /tmp/constraints.txt")


def test_the_build_context_is_small_and_has_what_is_copied():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert {".ci/constraints.txt", "lowbit", "benches", "conftest.py", "pyproject.toml", "README.md"} <= let_in
    for path in let_in:
        assert (ROOT / path).exists(), path


def uses(node) -> list[str]:
    if isinstance(node, dict):
        return [value for key, value in node.items() if key == "uses"] + [u for v in node.values() for u in uses(v)]
    return [found for entry in node for found in uses(entry)] if isinstance(node, list) else []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_and_may_only_read(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    found = uses(workflow)
    assert found
    for action in found:
        assert re.fullmatch(r"actions/[a-z-]+(/[a-z-]+)?@[0-9a-f]{40}", action), action
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] > 0


def test_every_tox_environment_of_a_workflow_exists(tox):
    known = {"tests", "tests-oldest", *(name.removeprefix("testenv:") for name in tox.sections())}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    used = {entry["env"] for entry in workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]}
    assert {"tests", "tests-oldest", "lint", "type"} <= used <= known


def test_pythons_of_the_matrix_are_those_that_pyproject_allows(project):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    tested = {entry["python"] for entry in workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]}
    assert tested == {"3.11", "3.12", "3.13"}
    assert project["requires-python"] == ">=3.11,<3.14"


@pytest.mark.parametrize("script", ["run", "expect_regression"])
def test_ci_scripts_are_executable_and_parse(script):
    path = ROOT / ".ci" / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("echo 'decode_tok_s 268.7 -> 241.0 tok/s (-10.3 %, limit 2.0 %)'; exit 1", 0, "was caught"),
        ("echo passed; exit 0", 1, "got 0"),
        ("echo usage; exit 4", 1, "got 4"),
        ("echo 'ttft_ms 1 -> 2 ms (limit 3 %)'; exit 1", 1, "not by decode_tok_s"),
    ],
)
def test_expect_regression_passes_only_on_that_metrics_failure(command, code, said):
    script = str(ROOT / ".ci" / "expect_regression")
    result = subprocess.run(
        [script, "decode_tok_s", "bash", "-c", command], capture_output=True, text=True, check=False
    )
    assert result.returncode == code
    assert said in result.stdout + result.stderr


def tracked() -> list[str]:
    result = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    return result.stdout.splitlines()


def test_the_top_level_is_what_the_design_fixed():
    names = {path.split("/")[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def test_no_cpu_baseline_is_committed():
    assert not fnmatch.filter(tracked(), "benches/baselines/cpu-*")


def test_an_installed_wheel_holds_the_embedded_model():
    distribution = metadata.distribution("lowbit")
    files = {str(path) for path in distribution.files or ()}
    if not any(path.startswith("lowbit/") for path in files):
        pytest.skip("an editable install lists no files of the package; tox installs the wheel")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "heldout.txt"):
        assert f"lowbit/embedded/{name}" in files
    assert "lowbit/py.typed" in files


def test_an_installed_wheel_holds_the_report_page():
    files = {str(path) for path in metadata.distribution("lowbit").files or ()}
    if not any(path.startswith("lowbit/") for path in files):
        pytest.skip("an editable install lists no files of the package; tox installs the wheel")
    folder = ROOT / "lowbit" / "report" / "page"
    assets = [path for path in folder.rglob("*") if path.suffix in (".js", ".css", ".html", ".txt")]
    assert len(assets) >= 10
    assert {str(path.relative_to(ROOT)) for path in assets} <= files
