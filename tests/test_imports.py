"""Data flows one way: a module imports only from earlier stages. Read from the source, so that lazy imports count."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit

ROOT = Path(lowbit.__file__).parent

STAGES = (
    {"errors", "faults"},
    {
        "formats",
        "workloads",
        "quiet",
        "documents",
        "digest",
        "gpu_libraries",
        "dummy",
        "hostmemory",
        "presets",
        "spent",
        "graphs",
        "vram_limit",
    },
    {"digest", "pins"},
    {"record", "metrics"},
    {"cases"},
    {"roofline", "spread"},
    {"regression", "changepoint"},
    {"simulation", "changepoint_simulation"},
    {"device", "nvml"},
    {"ceilings", "card", "kernels", "sampling"},
    {"embedded", "checkpoint", "presets", "hostmodel"},
    {"stored_layouts"},
    {"prequantized"},
    {"hub", "loading"},
    {"models", "reference"},
    {"backends"},
    {"process_state", "regional", "logits_store", "kvcache", "truth", "packed_file", "contenders", "native_times"},
    {"compilers", "generate", "attention"},
    {"measure", "quality"},
    {"texts", "streamed", "quantized", "kernel_times"},
    {"profiling", "evaluation", "energy"},
    {"timing", "scoring", "calibration", "products", "prefill_times"},
    {"loaded", "native_logits"},
    {"auto"},
    {"lab"},
    {"runs"},
    {"baselines"},
    {"merge"},
    {"history"},
    {"comparison", "trend", "baseline_patch"},
    {"bisection"},
    {"report"},
    {"typical"},
    {"native_step", "nightly", "plan"},
    {"step_command"},
    {"pytest_plugin", "__main__"},
)
"""Each stage may import those before it. A package counts as one module."""

PURE = ("formats", "workloads", "record", "metrics", "cases", "regression", "baselines", "comparison", "report")
"""Must not bring torch in: the command line and the collection of tests are fast without it."""

STAGE_OF = {module: number for number, stage in enumerate(STAGES) for module in stage}


def unit_of(path: Path) -> str:
    """The module or package directly under lowbit/ that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(source: str) -> set[str]:
    """Full names of every module that the source imports, wherever: ``from lowbit import metrics`` → lowbit.metrics."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module stands"
            names |= {node.module} if node.module != "lowbit" else {f"lowbit.{alias.name}" for alias in node.names}
    return names


def internal_imports(path: Path) -> set[str]:
    """The units of lowbit that a file imports, but for its own."""
    found = {name.split(".")[1] for name in imports_of(path.read_text()) if name.startswith("lowbit.")}
    exported = {"__version__"}
    return found - {unit_of(path)} - exported


SOURCES = sorted(path for path in ROOT.rglob("*.py") if unit_of(path) != "__init__")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_earlier_stages(path):
    unit = unit_of(path)
    assert unit in STAGE_OF, f"give {unit} its place in STAGES, before everything that imports it"
    late = {name for name in internal_imports(path) if STAGE_OF.get(name, len(STAGES)) >= STAGE_OF[unit]}
    assert not late, f"{path.relative_to(ROOT)} imports {sorted(late)}: not an earlier stage than {unit}"


def test_the_walk_sees_every_way_to_import():
    top = "import lowbit.lab\nfrom lowbit import metrics\n"
    source = top + "def f():\n    from lowbit.record import Record\n    import pytest\n"
    assert imports_of(source) == {"lowbit.lab", "lowbit.metrics", "lowbit.record", "pytest"}


def test_only_the_plugin_imports_pytest():
    importers = {
        unit_of(path)
        for path in SOURCES
        if any(
            name.split(".")[0] in ("pytest", "_pytest", "pytest_benchmark", "xdist")
            for name in imports_of(path.read_text())
        )
    }
    assert importers == {"pytest_plugin"}


def test_pure_modules_bring_no_torch_in_and_a_session_no_libraries():
    code = (
        "import importlib, sys\n"
        f"for name in {PURE!r}:\n"
        "    importlib.import_module('lowbit.' + name)\n"
        "    heavy = {'torch', 'transformers', 'pytest'} & set(sys.modules)\n"
        "    assert not heavy, f'lowbit.{name} imports {heavy}'\n"
        "import lowbit.pytest_plugin.session\n"
        "heavy = {'transformers', 'torchao', 'bitsandbytes'} & set(sys.modules)\n"
        "assert not heavy, f'a session, before it has a model, imports {heavy}: 7 s in each worker and child'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
