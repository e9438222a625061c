"""What failing cases have in common: told where so many would not share it by chance, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest
import report_runs

from lowbit import baselines, runs
from lowbit.report import content, markdown
from lowbit.report.common import in_common
from lowbit.report.content import Content


def judged(folder: Path, slower: dict[str, float]) -> Content:
    plan = report_runs.Plan(nights=1, fresh=2, step=0, slower=slower, faster={}, skipped="\0", failing="\0")
    accepted, _, last = report_runs.build(folder, plan)
    return content.of_run(runs.read(last), baselines.load(accepted))


@pytest.mark.parametrize(
    ("slower", "shared"),
    [
        ({"[a16w4_g128-torchao-": 0.7}, ["format a16w4_g128-torchao"]),
        ({"-gemlite-eager-": 0.6}, ["library gemlite", "mode eager"]),
        ({"-b8_c0": 0.7}, ["workload b8_c0"]),
        ({"[bf16-torch-eager-b1_c0]": 0.7}, []),
        ({"[bf16-torch-eager-b1_c0]": 0.6, "[a16w8-gemlite-reduce-overhead-p512]": 0.7}, []),
    ],
)
def test_what_they_share_and_the_others_do_not(tmp_path: Path, slower: dict[str, float], shared: list[str]) -> None:
    told = judged(tmp_path, slower)
    assert told.failures
    assert in_common(told) == shared
    assert ("**In common:** " in markdown.summary(told)) is bool(shared)


def test_what_stopped_running_has_nothing_to_compare(tmp_path: Path) -> None:
    told = judged(tmp_path, {})
    lost = {record.case: "no longer runs" for record in told.records if record.format == "a16w8-gemlite"}
    told.records[:] = [record for record in told.records if record.case not in lost]
    assert in_common(Content(told.header, told.records, lost=lost)) == []
