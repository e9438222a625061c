"""--quality: KL of formats that a run timed and did not score, from runs that did; shown with their source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from nights import decode, keep, quality

from lowbit import __main__, baselines, runs
from lowbit.errors import LowbitError
from lowbit.report import content, markdown, page
from lowbit.report.content import Content
from lowbit.report.scores import with_quality

EMBEDDED = {"device": "cpu-epyc-2c", "model": "embedded", "load_format": "auto"}
H200 = Path(__file__).parents[1] / "benches/baselines/nvidia-h200/0001_llama-3.1-8b-dummy.json"
SCORES = Path(__file__).parents[1] / "docs/runs/cpu-embedded.json"


@pytest.fixture
def timed(tmp_path: Path) -> Content:
    """A run of dummy weights: three rows' speed, the KL of one of them."""
    speeds = {"bf16-torch": 180.0, "a16w8-torchao": 230.0, "a16w4_g128-torchao": 260.0}
    records = [decode(name, decode_tok_s=speed, vram_peak_mib=9e3) for name, speed in speeds.items()]
    path = keep(tmp_path / "runs", [*records, quality("a16w8-torchao", kld_embedded_512_8176tok=7e-5)])
    return content.of_run(runs.read(path), None)


def scored(folder: Path, night: int = 0, protocol: str = "embedded_512", **kld: float) -> Path:
    named = {"w4": "a16w4_g128-torchao", "w8": "a16w8-torchao", "other": "a16w3_g64-lowbit"}
    records = [quality(named[word], kld_embedded_512_8176tok=value) for word, value in kld.items()]
    return keep(folder, records, night=night, **{**EMBEDDED, "protocol": protocol})


def test_what_was_not_scored_gets_the_embedded_models_and_its_source(timed: Content, tmp_path: Path) -> None:
    assert "faster, but without a KL" in page.render(timed)
    path = scored(tmp_path, w4=0.0014, w8=0.9, other=0.02)
    told = with_quality(timed, [path])
    assert [(score.format, score.metrics["kld_embedded_512_8176tok"]) for score in told.scores] == [
        ("a16w4_g128-torchao", 0.0014)  # the run's own KL stays, a format that it did not time has no place
    ]
    text = page.render(told)
    assert "<b>a16w4_g128-torchao</b> · default" in text
    assert f"of the embedded model, scored in {path}" in text
    found = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert found["scores"] == [1, str(path)]
    assert len(found["cases"]["id"]) == len(timed.records)  # it is no case of this run
    assert (found["start"], found["short"]) == ("b1_c0", [])  # one context: its name says as much
    brief = markdown.summary(told)
    assert "KL 0.0014 on the embedded model" in brief
    assert f"(KL of formats that this run did not score: {path})".replace("_", r"\_") in brief
    assert told.counts == timed.counts
    assert told.findings == timed.findings == []


def test_of_several_runs_the_latest_counts(timed: Content, tmp_path: Path) -> None:
    late, early = scored(tmp_path, 2, w4=0.002), scored(tmp_path, 1, w4=0.001)
    (score,) = with_quality(timed, [late, early]).scores
    assert score.metrics["kld_embedded_512_8176tok"] == 0.002
    assert [each.metrics for each in with_quality(timed, [tmp_path]).scores] == [score.metrics]  # a folder of them


@pytest.mark.parametrize(("protocol", "load_format"), [("wikitext2_2048", "dummy"), ("embedded_512", "auto")])
def test_scores_of_another_protocol_or_of_another_model_are_refused(
    timed: Content, tmp_path: Path, protocol: str, load_format: str
) -> None:
    real = replace(timed, header=replace(timed.header, load_format=load_format))
    with pytest.raises(LowbitError, match=r"--quality .*: expected test_quality of .*a16w4_g128-torchao; found none"):
        with_quality(real, [scored(tmp_path, w4=0.0014, protocol=protocol)])


def test_a_run_that_scored_all_has_no_use_for_more(timed: Content, tmp_path: Path) -> None:
    whole = with_quality(timed, [scored(tmp_path, w4=0.0014)])
    full = replace(whole, records=whole.scored, scores=())
    with pytest.raises(LowbitError, match="a format without a KL, which no row is; found none"):
        with_quality(full, [tmp_path])


def test_the_committed_baseline_beside_the_stored_scores_recommends_a_native_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What docs/report.md says, by its command: measured at context 128 where not at 0."""
    out, brief = tmp_path / "r.html", tmp_path / "r.md"
    assert __main__.main(["report", str(H200), "--quality", str(SCORES), "-o", str(out), "--summary", str(brief)]) == 0
    rows = baselines.load(H200).rows
    case = next(case for case in rows if "[a16w4_g128-lowbit-native-b1_c128]" in case)
    speed = rows[case].metrics["decode_tok_s"].median
    assert f"a16w4\\_g128-lowbit · native (b1\\_c128): {speed:.1f} tok/s (" in brief.read_text()
    assert '-k "test_decode[a16w4_g128-lowbit-native-b1_c128]"' in brief.read_text()
    found = json.loads(out.read_text().partition('id="data">')[2].partition("</script>")[0])
    assert found["start"] == "short context"
    shown = [found["cases"]["workload"][number] for number in found["short"]]
    assert {"b1_c0", "b1_c128"} == set(shown)
    names = [(found["cases"]["format"][n], found["cases"]["mode"][n]) for n in found["short"]]
    assert len(names) == len(set(names))  # a row once
