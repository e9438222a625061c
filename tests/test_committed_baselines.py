"""The baselines of this repository: small, whole, of medians alone, and read by pytest-benchmark's own command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit import baselines
from lowbit.formats import FORMATS
from lowbit.report import figures

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "benches" / "baselines").glob("*/*.json"))
pytestmark = pytest.mark.skipif(not FILES, reason="built without benches/baselines, as a source archive is")


@pytest.fixture(params=FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def path(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_it_loads_as_the_baseline_of_its_folder_and_name(path: Path):
    baseline = baselines.load(path)
    header = baseline.header
    assert header.device == path.parent.name
    assert path.stem.endswith(f"_{header.model}-{header.load_format}")
    assert baselines.find(ROOT / "benches" / "baselines", header.device, header.model, header.load_format) is not None
    assert baseline.rows
    assert {len(values.runs) for row in baseline.rows.values() for values in row.metrics.values()} <= {
        *range(1, baseline.runs + 1)
    }


def test_it_is_small_and_has_no_raw_samples(path: Path):
    assert path.stat().st_size < 1e6
    entries = json.loads(path.read_text())["benchmarks"]
    assert [entry["name"] for entry in entries if "data" in entry["stats"]] == []
    assert [entry["name"] for entry in entries if "samples" in entry["extra_info"]["lowbit"]] == []


def test_pytest_benchmark_compares_it(path: Path):
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(path), "--columns=median"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    names = {row.partition("::")[2] for row in baselines.load(path).rows}
    assert [name for name in names if name not in result.stdout] == []


def test_quantizing_an_8b_on_an_h200_took_at_most_5_s():
    """Of every stored row that neither searches (hqq, auto) nor is fitted to a text."""
    found = figures.read([ROOT / "benches" / "baselines", ROOT / "docs" / "runs"])
    h200 = [source for source in found if source.header.device == "nvidia-h200" and not source.beside]
    assert {source.header.model for source in h200} == {"llama-3.1-8b"}
    took = {
        record.format: record.metrics["quantize_s"] for source in h200 for record in source.records if record.metrics
    }
    rows = [FORMATS[name] for name in took if not ({"hqq", "search"} & FORMATS[name].selectors)]
    rows = [row for row in rows if row.backend != "calibrated"]
    assert len(rows) >= 20
    assert {row.id: took[row.id] for row in rows if took[row.id] > 5} == {}


def test_the_readmes_h200_table_says_what_the_baseline_says():
    (path,) = (ROOT / "benches" / "baselines" / "nvidia-h200").glob("*.json")
    rows = {(row.format, row.mode, row.workload): row.metrics for row in baselines.load(path).rows.values()}
    bf16 = rows["bf16-torch", "reduce-overhead", "b1_c0"]["decode_tok_s"].median
    table = (ROOT / "README.md").read_text().partition("<!-- h200 table -->")[2].partition("<!-- end")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(lines) > 10
    for line in lines:
        name, mode, context, speed, ratio, vram, energy, mbu, _ = (cell.strip() for cell in line.strip("|").split("|"))
        found = rows[name.split()[0], mode, f"b1_c{context}"]
        decode = found["decode_tok_s"].median
        assert speed == (f"{decode:,.0f}" if decode >= 1000 else f"{decode:.1f}"), line
        assert ratio in ("–", f"{decode / bf16:.2f}"), line
        assert vram == f"{found['vram_peak_mib'].median:,.0f}", line
        assert energy == f"{found['energy_j_per_tok'].median:.2f}", line
        assert mbu == f"{100 * found['mbu'].median:.0f} %", line
