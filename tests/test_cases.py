from __future__ import annotations

from itertools import pairwise

import pytest

from lowbit import cases, compilers, workloads
from lowbit.cases import Case
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS

SMALL, LARGE = 4_000_000, 8_000_000_000


def test_quick_is_its_formats_eager_and_reduce_overhead_at_one_prefill_and_one_decode():
    rows = [row for row in FORMATS.values() if row.suite == "quick"]
    for kind, workload in (("prefill", "p512"), ("decode", "b1_c0")):
        found = cases.enumerate_cases(kind, "quick", LARGE)
        assert {case.format.id for case in found} == {row.id for row in rows}
        assert {case.mode for case in found} == {"eager", "reduce-overhead", "native"}
        assert {case.workload.id for case in found} == {workload}
        assert len(found) == sum(len({"eager", "reduce-overhead", "native"} & set(row.modes)) or 2 for row in rows)
        assert {case.format.backend for case in found if case.mode == "native"} == {"lowbit"}


def test_nightly_has_all_modes_and_workloads():
    found = cases.enumerate_cases("decode", "nightly", LARGE)
    assert {case.mode for case in found} == set(compilers.MODES)
    assert {case.workload.id for case in found} == {"b1_c0", "b1_c2048", "b8_c0"}


def test_the_suites_modes_are_the_compilers_modes():
    assert all(set(modes) <= set(compilers.MODES) for modes in cases.SUITE_MODES.values())
    assert set(workloads.SUITES) == set(cases.SUITE_MODES)


def test_small_models_get_small_workloads():
    assert {c.workload.id for c in cases.enumerate_cases("prefill", "nightly", SMALL)} == {"p128", "p384"}


def test_an_unknown_suite_lists_the_known_ones():
    with pytest.raises(LowbitError, match="unknown suite 'huge'; known: full, nightly, quick"):
        cases.enumerate_cases("decode", "huge", LARGE)


def test_names_are_those_of_the_tests():
    (case, *_) = cases.enumerate_cases("decode", "quick", LARGE, [FORMATS["a16w4_g128-torchao"]])
    assert case.id == "a16w4_g128-torchao-eager-b1_c0"
    assert case.name == "decode[a16w4_g128-torchao-eager-b1_c0]"
    assert Case("quality", FORMATS["bf16-torch"]).name == "quality[bf16-torch]"


def test_rows_of_a_products_activations():
    prefill, *_ = cases.enumerate_cases("prefill", "quick", LARGE)
    decodes = {case.workload.id: case.rows for case in cases.enumerate_cases("decode", "nightly", LARGE)}
    assert prefill.rows == 512
    assert decodes == {"b1_c0": 1, "b1_c2048": 1, "b8_c0": 8}
    assert Case("quality", FORMATS["bf16-torch"]).rows is None


def test_lm_head_sees_one_token_of_each_sequence():
    every = [case for kind in ("prefill", "decode") for case in cases.enumerate_cases(kind, "nightly", LARGE)]
    seen = {case.workload.id: case.head_rows for case in every}
    assert seen == {"p512": 1, "p2048": 1, "b1_c0": 1, "b1_c2048": 1, "b8_c0": 8}
    assert Case("quality", FORMATS["bf16-torch"]).head_rows is None


def test_one_format_is_alive_at_a_time():
    every = [case for kind in cases.KINDS for case in cases.enumerate_cases(kind, "nightly", LARGE)]
    order = [case.format.id for case in sorted(every, key=cases.run_order)]
    changes = sum(a != b for a, b in pairwise(order))
    assert changes == len(set(order)) - 1


def test_a_cases_record_joins_by_format_mode_and_workload():
    decode, *_ = cases.enumerate_cases("decode", "quick", LARGE)
    record = decode.record("benches/test_decode.py::test_a", "llama-3.1-8b", "dummy")
    assert (record.kind, record.format, record.mode, record.workload) == ("decode", "bf16-torch", "eager", "b1_c0")
    assert (record.case, record.model, record.load_format) == (
        "benches/test_decode.py::test_a",
        "llama-3.1-8b",
        "dummy",
    )
    quality = Case("quality", FORMATS["bf16-torch"]).record("a", "b", "auto")
    assert (quality.mode, quality.workload) == (None, None)
