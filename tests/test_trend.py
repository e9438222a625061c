"""Trends: which series, since which night, and what changed in its environment."""

from __future__ import annotations

import json
import shlex
import shutil

import numpy as np
import pytest
from nights import DECODE, QUALITY, TORCH, decode, keep, quality

from lowbit import history, trend
from lowbit.__main__ import main
from lowbit.report.trends import certainty

UPGRADED = {**TORCH, "torch": "2.13.0"}
NIGHTS, STEP = 40, 30


def noisy(level, seed, step=0.0, sigma=0.004):
    values = level * (1 + sigma * np.random.default_rng(seed).standard_normal(NIGHTS))
    values[STEP:] *= 1 + step
    return [float(value) for value in values]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Forty nights; torch is upgraded in the 31st: int4 decodes 5 % slower, with more memory; its ppl is the same."""
    folder = tmp_path_factory.mktemp("history")
    bf16, int4 = noisy(180.0, 1), noisy(268.0, 2, -0.05)
    for night in range(NIGHTS):
        late = night >= STEP
        records = [
            decode("bf16-torch", decode_tok_s=bf16[night], vram_peak_mib=16_500.0, weights_mib=15_317.0),
            decode("a16w4_g128-torchao", decode_tok_s=int4[night], vram_peak_mib=6_400.0 + 100 * late, compile_s=20.0),
            quality("a16w4_g128-torchao", ppl_embedded_512=2.150, kld_embedded_512_8176tok=0.0014 - 0.0004 * late),
        ]
        keep(folder, records, night=night, environment=UPGRADED if late else TORCH)
    return folder


def find(root):
    (found,) = history.read(root).found
    return trend.find_trends(found)


def test_a_step_is_named_with_its_night_and_what_was_upgraded(root):
    slower, larger, closer = find(root)
    assert (slower.case, slower.metric) == (DECODE.format(format="a16w4_g128-torchao"), "decode_tok_s")
    assert (slower.worse, slower.unit) == (True, "tok/s")
    assert slower.change.index == STEP
    assert slower.first.date == "2026-05-31"
    assert slower.environment == ["torch 2.11.0 -> 2.13.0"]
    assert slower.change.size_relative == pytest.approx(-0.05, abs=0.005)
    assert (larger.metric, larger.worse, larger.change.size) == ("vram_peak_mib", True, pytest.approx(100))
    assert (closer.metric, closer.worse) == ("kld_embedded_512_8176tok", False)
    assert closer.case == QUALITY.format(format="a16w4_g128-torchao")


def test_the_newest_night_comes_first(tmp_path):
    early, late = noisy(100.0, 5), noisy(100.0, 6, 0.05)
    for night in range(NIGHTS):
        slow = early[night] * (0.9 if night >= 15 else 1)
        keep(
            tmp_path,
            [decode("bf16-torch", decode_tok_s=slow), decode("fp16-torch", decode_tok_s=late[night])],
            night=night,
        )
    assert [one.change.index for one in find(tmp_path)] == [STEP, 15]


def test_every_protocol_and_each_watched_metric_has_a_series(root):
    (found,) = history.read(root).found
    names = {name for _, name, _ in trend.watched(found)}
    assert names == {"decode_tok_s", "vram_peak_mib", "compile_s", "ppl_embedded_512", "kld_embedded_512_8176tok"}


def test_what_is_far_below_the_gates_limit_is_not_worth_a_name(tmp_path):
    for night in range(NIGHTS):
        records = [decode(decode_tok_s=100.0 - 0.4 * (night >= STEP), vram_peak_mib=100.0 + 15 * (night >= STEP))]
        keep(tmp_path / "runs", records, night=night)
    assert find(tmp_path / "runs") == []


def test_a_case_without_a_measurement_in_the_night_of_the_upgrade_names_it_all_the_same(tmp_path):
    values = noisy(268.0, 3, -0.05)
    for night in range(NIGHTS):
        outcome = "failed" if STEP - 2 <= night < STEP else "measured"
        environment = UPGRADED if night >= STEP - 2 else TORCH
        records = [decode(outcome=outcome, decode_tok_s=values[night]), quality(ppl_embedded_512=2.15)]
        keep(tmp_path / "runs", records, night=night, environment=environment)
    (one,) = find(tmp_path / "runs")
    assert one.change.index == STEP
    assert one.environment == ["torch 2.11.0 -> 2.13.0"]


def test_an_upgrade_within_the_nights_it_may_have_begun_in_is_named_as_such(tmp_path):
    values = noisy(268.0, 4, -0.015, sigma=0.008)
    for night in range(NIGHTS):
        keep(
            tmp_path / "runs",
            [decode(decode_tok_s=values[night])],
            night=night,
            environment={**TORCH, "driver": "590.1"} if night >= STEP - 1 else TORCH,
            commit="abc",
        )
    (one,) = find(tmp_path / "runs")
    assert one.change.earliest < STEP <= one.change.latest
    named = [one.environment, *(lines for _, lines in one.nearby)]
    assert ["driver 580.159.04 -> 590.1"] in named


def test_lowbits_own_commit_is_named_where_its_source_changed(tmp_path):
    before = history.Night("2026-05-01", tmp_path, {"lowbit_source": "aaa"}, "1" * 40)
    now = history.Night("2026-05-02", tmp_path, {"lowbit_source": "bbb"}, "2" * 40)
    lines = trend.environment_change(before, now)
    assert lines == ["lowbit_source aaa -> bbb", "lowbit commit 111111111111 -> 222222222222"]


def run(capsys, *arguments):
    code = main(["trend", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_what_since_when_how_much_how_sure_and_why(root, capsys):
    code, out, _ = run(capsys, "--history", root)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "llama-3.1-8b (dummy) on nvidia-h200: 40 nights, 2026-05-01 to 2026-06-09: 3 changes, 2 worse"
    at = lines.index("since 2026-05-31: torch 2.11.0 -> 2.13.0")
    words = lines[at + 1].split()
    assert words[:2] == ["decode[a16w4_g128-torchao-default-b1_c0]", "decode_tok_s"]
    assert float(words[4]) == pytest.approx(-5, abs=0.5)
    assert words[-1] == "worse"
    assert max(map(len, lines)) <= 100


@pytest.fixture(scope="module")
def upgrade(tmp_path_factory):
    """Forty nights; from the 31st on all eight formats take half as long again to compile, and one is 6 % slower."""
    folder = tmp_path_factory.mktemp("upgrade")
    formats = [f"a16w4_g{2**n}-torchao" for n in range(4, 11)] + [
        "a16w4_g128_a_name_as_long_as_recipes_have_them-recipe"
    ]
    for night in range(NIGHTS):
        late = night >= STEP
        records = [decode(name, compile_s=20.0 * (1.5 + 0.01 * n if late else 1)) for n, name in enumerate(formats)]
        records[-1].metrics["decode_tok_s"] = 94.0 if late else 100.0
        keep(folder, records, night=night, environment=UPGRADED if late else TORCH)
    return folder


def test_what_matters_comes_first_and_what_is_alike_is_counted(upgrade, capsys):
    _, out, _ = run(capsys, "--history", upgrade)
    lines = out.splitlines()
    at = lines.index("since 2026-05-31: torch 2.11.0 -> 2.13.0")
    assert lines[at + 1] == "decode[a16w4_g128_a_name_as_long_as_recipes_have_them-recipe-default-b1_c0]"
    assert lines[at + 2].split()[:4] == ["decode_tok_s", "100.0", "94.0", "-6.0"]
    assert sum("compile_s " in line for line in lines[at:]) == 5
    assert lines[-1] == "    and compile_s of 4 more cases: +50.0 to +53.0 %"
    assert max(map(len, lines)) <= 100


def test_all_lists_each(upgrade, capsys):
    _, out, _ = run(capsys, "--history", upgrade, "--all")
    assert sum("compile_s " in line for line in out.splitlines()) == 8
    assert "more case" not in out


def test_the_report_says_drift_that_it_is_over_and_where_it_may_have_begun(tmp_path, capsys):
    values, gone = noisy(268.0, 3), noisy(100.0, 4)
    for night in range(NIGHTS):
        slow = 1 - 0.003 * max(night - 19, 0)
        dip = 0.9 if 10 <= night < 14 else 1
        records = [
            decode("bf16-torch", decode_tok_s=values[night] * slow),
            decode("fp16-torch", decode_tok_s=gone[night] * dip),
        ]
        keep(tmp_path, records, night=night)
    _, out, _ = run(capsys, "--history", tmp_path)
    lines = out.splitlines()
    drift = next(n for n, line in enumerate(lines) if "a drift: -0." in line)
    assert lines[drift - 1].startswith("decode[bf16-torch")
    assert " a night; may have begun from 2026-05-" in lines[drift]
    over = lines.index("    for 4 nights, until 2026-05-15")
    assert lines[over - 1].startswith("decode[fp16-torch")


def test_several_upgrades_in_one_night_come_with_the_command_that_tells_them_apart(tmp_path, capsys):
    for night in range(NIGHTS):
        environment = {**TORCH, "torch": "2.13.0", "driver": "590.1"} if night >= STEP else TORCH
        keep(tmp_path, [decode(decode_tok_s=94.0 if night >= STEP else 100.0)], night=night, environment=environment)
    _, out, _ = run(capsys, "--history", tmp_path)
    command = out.splitlines()[-1].strip().removeprefix("which of them: python -m lowbit ")
    assert main(shlex.split(command)) == 0
    assert "bisect first: torch 2.11.0 -> 2.13.0" in capsys.readouterr().out


def test_two_protocols_keep_their_names(tmp_path, capsys):
    for night in range(NIGHTS):
        records = [quality(ppl_embedded_512=2.15 + 0.1 * (night > 20), ppl_wikitext2_2048=6.2 + 0.3 * (night > 20))]
        keep(tmp_path, records, night=night)
    _, out, _ = run(capsys, "--history", tmp_path)
    assert "ppl_embedded_512" in out
    assert "ppl_wikitext2_2048" in out


def test_a_merged_file_is_a_history_as_well(root, tmp_path, capsys):
    for night in range(NIGHTS):
        devices = {"nvidia-h200": 200.0, "nvidia-a100": 100.0 - 5 * (night >= STEP)}
        for device, speed in devices.items():
            keep(tmp_path / "runs" / str(night), [decode(decode_tok_s=speed)], night=night, device=device)
        assert (
            main(["merge", str(tmp_path / "runs" / str(night)), "-o", str(tmp_path / "merged" / f"{night}.json")]) == 0
        )
    capsys.readouterr()
    code, out, _ = run(capsys, "--history", tmp_path / "merged")
    assert code == 0
    assert "on nvidia-a100: 40 nights, 2026-05-01 to 2026-06-09: 1 change, 1 worse" in out
    assert "on nvidia-h200: 40 nights, 2026-05-01 to 2026-06-09: no change" in out


def test_a_change_is_information_unless_asked_to_fail(root, capsys):
    assert run(capsys, "--history", root, "--fail-on-change")[0] == 1
    assert run(capsys, "--history", root, "--fail-on-change", "--last", "5")[0] == 0
    assert run(capsys, "--history", root, "--fail-on-change", "--last", "10")[0] == 1


def test_json(root, capsys):
    code, out, _ = run(capsys, "--history", root, "--json", "--device", "nvidia-h200")
    assert code == 0
    (found,) = json.loads(out)
    assert (found["device"], len(found["nights"])) == ("nvidia-h200", NIGHTS)
    first = found["changes"][0]
    assert first["first_night"] == "2026-05-31T03:00:00+00:00"
    assert first["size_percent"] == pytest.approx(-5, abs=0.5)
    assert first["environment"] == ["torch 2.11.0 -> 2.13.0"]
    assert first["confidence"] > 0.999


def test_only_the_last_nights_are_looked_at(root, capsys):
    _, out, _ = run(capsys, "--history", root, "--nights", "9")
    assert "9 nights, 2026-06-01 to 2026-06-09: no change" in out


def test_too_few_nights_say_so(tmp_path, capsys):
    keep(tmp_path / "runs", [decode(decode_tok_s=100.0)])
    code, out, _ = run(capsys, "--history", tmp_path / "runs")
    assert (code, "from 8 on it can" in out) == (0, True)


def test_a_broken_run_is_named_and_the_others_are_read(tmp_path, capsys):
    keep(tmp_path, [decode(decode_tok_s=100.0)])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "journal.jsonl").write_text("{\n")
    code, out, err = run(capsys, "--history", tmp_path)
    assert (code, "1 night," in out) == (0, True)
    assert "left out: " in err
    assert "broken" in err


def test_no_history_is_one_line_and_exit_code_2(tmp_path, capsys):
    code, _, err = run(capsys, "--history", tmp_path / "none")
    assert code == 2
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_nights_is_a_whole_number(value, capsys):
    with pytest.raises(SystemExit):
        main(["trend", "--nights", value])
    assert "expected a whole number from 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("p", "text"), [(9e-4, "99.910"), (4e-4, "99.960"), (2e-5, "99.998"), (1.1e-5, "99.998"), (1e-9, ">99.999")]
)
def test_certainty_never_says_100(p, text):
    assert certainty(p) == text


def test_runs_can_be_named_as_every_other_command_takes_them(root, tmp_path, capsys):
    _, by_history, _ = run(capsys, "--history", root)
    assert run(capsys, root)[1] == by_history
    nights = sorted(root.iterdir())
    for night in nights[:20]:  # half of them in a folder, the others one by one
        shutil.copytree(night, tmp_path / night.name)
    _, split, _ = run(capsys, tmp_path, *nights[20:])
    assert split.replace(str(tmp_path), str(root)) == by_history


def test_a_run_that_is_not_there_is_named(root, tmp_path, capsys):
    code, _, err = run(capsys, root, tmp_path / "none")
    assert code == 2
    assert f"{tmp_path / 'none'}: no such folder of kept runs" in err


def test_on_a_cpu_the_ratio_to_the_hosts_own_speed_has_a_trend(tmp_path):
    """Of the wall clock a busy neighbour makes a step; the ratio, measured beside fixed work, has none."""
    for night, ratio in enumerate(noisy(0.2, 3, -0.3)):
        busy = 0.5 if 12 <= night < 20 else 1.0
        keep(tmp_path, [decode(decode_tok_s=900 * busy * ratio, speed_ratio=ratio)], night=night, device="cpu-epyc-2c")
    changes = {(one.metric, one.change.index) for one in find(tmp_path)}
    assert {index for metric, index in changes if metric == "speed_ratio"} == {STEP}
    assert {index for metric, index in changes if metric == "decode_tok_s"} >= {12, 20}
