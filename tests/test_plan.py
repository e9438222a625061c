"""A suite in parts: every case once, within the limit, and -k expressions that select exactly a part's cases."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

from lowbit import plan, runs, typical
from lowbit.__main__ import main
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.pytest_plugin import collection
from lowbit.runs import Header

PARAMETERS = 8_030_000_000
PLAN = ("plan", "--device", "cuda", "--model", "llama-3.1-8b", "--load-format", "dummy")


def selected(expression, names):
    """As pytest does it: a word is true where it is part of the name."""
    compiled = Expression.compile(expression)
    return {name for name in names if compiled.evaluate(lambda word, name=name, **_: word.lower() in name.lower())}


@pytest.fixture(scope="module")
def planned():
    return plan.expect("full", plan.PLANNED, PARAMETERS, "cuda", {})


def test_parts_hold_every_case_once_within_the_limit(planned):
    parts = plan.split(planned, 600, 40)
    assert [one.nodeid for part in parts for one in part.cases] == [one.nodeid for one in planned]
    assert all(part.seconds <= 600 for part in parts)
    assert all(part.seconds == pytest.approx(40 + plan.seconds_of(part.cases)) for part in parts)
    assert len(parts) < 1.6 * sum(part.seconds for part in parts) / 600


@pytest.mark.parametrize("minutes", [2, 10])
def test_an_expression_selects_exactly_its_part(planned, minutes):
    names = {one.name for one in planned}
    parts = plan.split(planned, 60 * minutes, 40)
    for part in parts[:: max(1, len(parts) // 12)]:
        assert selected(plan.expression(part.cases, planned), names) == {one.name for one in part.cases}


def first_of_regional(name):
    """Seconds of a format's first case in a process, before this device has a kept run."""
    return typical.typical_s("cuda", "decode", "regional", name) + typical.first_s("cuda", FORMATS[name], "regional")


def test_the_first_regional_case_of_gemlite_has_triton_compile_every_candidate():
    """The 11 rows of docs/runs/h200-rows-2026-11-22b.json; later cases of the format find the kernels on disk."""
    took = [84.3, 126.9, 74.8, 100.9, 96.1, 107.0, 85.5, 72.5, 94.3, 101.9, 136.8]
    assert 0.8 < first_of_regional("a16w4_g64-gemlite") * len(took) / sum(took) < 1.5
    assert 16.3 <= typical.typical_s("cuda", "decode", "regional", "a16w4_g64-gemlite") <= 22.7
    assert typical.first_s("cuda", FORMATS["a16w4_g64-gemlite"], "reduce-overhead") > 0


@pytest.mark.parametrize("name", ["a16w4_g128_gemlite_head8-recipe", "a16w4_gemlite_g64-hqq"])
def test_what_runs_on_gemlites_kernels_waits_for_them_too(name):
    assert typical.first_s("cuda", FORMATS[name], "regional") == typical.first_s(
        "cuda", FORMATS["a16w8-gemlite"], "regional"
    )
    assert typical.first_s("cuda", FORMATS["a16w4_g128_head8-recipe"], "regional") == 0


def test_hqqs_search_is_in_its_seconds_of_regional():
    assert 11.1 <= first_of_regional("a16w4_g64-hqq") <= 17.2  # 12 rows of the same file
    assert typical.first_s("cuda", FORMATS["a16w4_g64-hqq"], "eager") > 0


def test_a_mode_that_compiles_one_layer_is_not_planned_as_one_that_compiles_32():
    regional = typical.typical_s("cuda", "decode", "regional", "a16w8-torchao")
    assert regional < typical.typical_s("cuda", "decode", "default", "a16w8-torchao")
    native = typical.typical_s("cuda", "decode", "native", "a16w8-lowbit")
    assert 6.8 <= native <= 11.1  # the ten rows of docs/runs/h200-rows-2026-11-22.json
    assert typical.typical_s("cpu", "decode", "regional") == typical.typical_s("cpu", "decode", "default")


def test_a_format_stays_in_one_part_where_it_fits(planned):
    parts = plan.split(planned, 3600, 40)
    homes = [
        {number for number, part in enumerate(parts) for one in part.cases if one.case.format.id == fmt}
        for fmt in FORMATS
    ]
    assert all(len(home) == 1 for home in homes)


def test_a_case_longer_than_the_limit_has_a_part_of_its_own(planned):
    long = planned[7].nodeid
    some = plan.expect("full", plan.PLANNED, PARAMETERS, "cuda", {long: 900.0})[:30]
    alone = [part for part in plan.split(some, 600, 40) if part.seconds > 600]
    assert [[one.nodeid for one in part.cases] for part in alone] == [[long]]


def test_a_limit_that_the_start_takes_is_refused(planned):
    with pytest.raises(LowbitError, match="longer than their start of 40 s, got 30 s"):
        plan.split(planned, 30, 40)


def test_a_row_that_the_device_can_not_have_takes_no_time():
    found = plan.expect("full", ("decode",), PARAMETERS, "cpu", {})
    assert {one.seconds for one in found if one.case.format.devices == ("cuda",)} == {0.0}
    assert all(one.seconds > 0 for one in found if "cpu" in one.case.format.devices)


def test_guesses_are_about_what_an_h200_took():
    """Rows of torchao in eager mode: 10.6 to 66 s each, where 10 s for any case had parts end after 25 minutes."""
    took = plan.recorded_seconds([Path(__file__).parents[1] / "docs" / "runs"], "llama-3.1-8b", "cuda")
    every = plan.expect("full", ("decode",), PARAMETERS, "cuda", {})
    guessed = {one.nodeid: one.seconds for one in plan.with_first([o for o in every if o.nodeid in took], "cuda")}
    assert len(guessed) >= 10
    assert 0.8 < sum(guessed.values()) / sum(took[nodeid] for nodeid in guessed) < 1.5


@pytest.mark.parametrize(
    ("library", "took_s"),
    [
        ("torch", [8.7, 13.2, 15.1]),
        ("torchao", [6.2, 6.6, 9.6, 7.0, 10.5, 16.8, 24.0, 23.1]),
        ("gemlite", [22.7, 19.0, 18.2]),
        ("bitsandbytes", [6.3]),
    ],
)
def test_guesses_of_regional_are_about_what_an_h200_took_to_compile_and_measure(library, took_s):
    """Every cold case of 2026-11-22, Llama-3.1-8B b1_c0, torch 2.11: lowbit/typical.py says which."""
    guess = typical.typical_s("cuda", "decode", "regional", f"a16w8-{library}")
    assert 0.8 < guess * len(took_s) / sum(took_s) < 1.5


def test_the_first_case_of_a_format_tunes_or_searches():
    asked = plan.expect("full", ("decode",), PARAMETERS, "cuda", {})
    recorded = next(one.nodeid for one in asked if one.case.format.id == "a16w4_g128-gemlite")
    asked = plan.expect("full", ("decode",), PARAMETERS, "cuda", {recorded: 9.0})
    more = {}
    for before, after in zip(asked, plan.with_first(asked, "cuda"), strict=True):
        more.setdefault(before.case.format.id, []).append(after.seconds - before.seconds)
    assert more["a16w8-gemlite"][0] > 30
    assert more["auto-recipe"][0] >= 300
    assert not any(any(seconds[1:]) for seconds in more.values())
    assert more["a16w4_g128-gemlite"][0] == 0  # what was recorded has it
    assert not any(more["bf16-torch"])
    skipped = plan.expect("full", ("decode",), PARAMETERS, "cpu", {}, lambda case: True)
    assert not any(one.seconds for one in plan.with_first(skipped, "cpu"))


def test_on_this_machine_what_is_skipped_here_takes_no_time(monkeypatch, capsys):
    found = []
    monkeypatch.setattr(plan, "split", lambda cases, *limits: found.extend(cases) or [plan.Part(0.0, [])])
    assert main(["plan", "--model", "embedded", "--suite", "full", "--device", "cpu", "--kind", "decode"]) == 0
    seconds = {one.case.id: one.seconds for one in found}
    assert seconds["a16w4_g256-torchao-eager-b1_c0"] == 0.0  # no such group on a CPU
    assert seconds["a16w4_g128-torchao-eager-b1_c0"] > 0


def test_the_commands_together_are_the_suite_and_each_is_pytests(capsys):
    assert main([*PLAN, "--kind", "decode", "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {one.name for one in plan.expect("full", ("decode",), PARAMETERS, "cuda", {})}
    told = []
    for line in lines:
        *words, flag, expression = shlex.split(line)
        assert flag == "-k"
        assert words == shlex.split(
            "pytest benches/test_decode.py --model llama-3.1-8b --load-format dummy --suite full"
        )
        told += {name for name in names if any(word in name for word in expression.split(" or "))}
    assert sorted(told) == sorted(names)


def test_modes_and_a_workload_narrow_it(capsys):
    modes = ("--mode", "eager", "--mode", "reduce-overhead")
    assert main([*PLAN, "--kind", "decode", *modes, "--workload", "b1_c0", "--commands", "--minutes", "9"]) == 0
    every = plan.expect("full", ("decode",), PARAMETERS, "cuda", {})
    told = [
        name
        for line in capsys.readouterr().out.splitlines()
        for name in selected(shlex.split(line)[-1], {one.name for one in every})
    ]
    wanted = [one for one in every if one.case.mode in modes and one.case.workload.id == "b1_c0"]
    assert sorted(told) == sorted(one.name for one in wanted)


def test_nothing_to_plan_is_an_error(capsys):
    assert main([*PLAN, "--workload", "b99"]) == 2
    assert "nothing to plan" in capsys.readouterr().err


def test_stored_runs_give_the_seconds(tmp_path, capsys):
    header = Header("nvidia-h200", "NVIDIA H200", "llama-3.1-8b", "dummy", "embedded_512", "full", {})
    case = plan.expect("full", ("decode",), PARAMETERS, "cuda", {})[0]
    record = case.case.record(case.nodeid, "llama-3.1-8b", "dummy")
    record.info = {"wall_s": 123.0}
    for other in (header, Header("cpu-x", "X", "llama-3.1-8b", "dummy", "embedded_512", "full", {})):
        with runs.start(tmp_path, other) as writer:
            writer.append(record, None)
            writer.close(0)
        record.info = {"wall_s": 9.0}
    assert plan.recorded_seconds([tmp_path], "llama-3.1-8b", "cuda") == {case.nodeid: 123.0}
    assert main([*PLAN, "--kind", "decode", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "(1 case by stored runs, the others a guess)" in shown
    killed = tmp_path / "killed" / "journal.jsonl"
    killed.parent.mkdir()
    killed.touch()
    assert main([*PLAN, "--kind", "decode", str(tmp_path)]) == 0  # one of a folder's costs itself
    captured = capsys.readouterr()
    assert captured.out == shown
    assert captured.err.startswith(f"lowbit: left out: {killed}: ")
    assert main([*PLAN, "--kind", "decode", str(killed)]) == 2  # one that was named does not
    assert re.search(r"\npart 1: \d+ cases, about \d+\.\d min\npytest ", shown)


def test_what_a_device_cannot_run_takes_no_minutes_of_the_announcement():
    cpu = Device("cpu", 0, "a CPU", "a-cpu", None, None, 1, None, None)

    def minutes(case, kind="decode"):
        return collection.expected_minutes([f"benches/test_{kind}.py::test_{kind}[{case}]"], {}, cpu)

    assert minutes("a16w4_g128-lowbit-eager-b1_c0") == typical.typical_s("cpu", "decode", "eager") / 60 > 0
    assert minutes("a16w4_g128-lowbit", "quality") == typical.typical_s("cpu", "quality", None) / 60 > 0
    for case in ("a16w4_g128-lowbit-native-b1_c0", "a16w8-lowbit-reduce-overhead-b1_c0", "a16w8-gemlite-eager-b1_c0"):
        assert minutes(case) == 0
    assert minutes("a16w8-gemlite", "quality") == 0
