"""Record: to JSON and back without loss, and clear errors for what is none."""

from __future__ import annotations

import json
import math

import pytest

from lowbit.errors import LowbitError
from lowbit.formats import Unmet
from lowbit.record import SCHEMA, Record


def full() -> Record:
    return Record(
        case="benches/test_decode.py::test_decode[a16w4_g128-torchao-eager-b1_c0]",
        kind="decode",
        format="a16w4_g128-torchao",
        mode="eager",
        workload="b1_c0",
        model="embedded",
        load_format="auto",
        dtype="bf16",
        outcome="skipped",
        unmet=Unmet("capability", "needs SM89 (fp8), this is SM80"),
        error="none",
        metrics={"decode_tok_s": 268.7},
        unavailable={"energy_j_per_tok": "no NVML"},
        samples={"decode_s": [0.1, 0.2]},
        info={"linears": 224, "clocks": {"sm_mhz": 1980}},
    )


def test_round_trip_through_json() -> None:
    back = Record.from_dict(json.loads(json.dumps(full().to_dict())))
    assert back == full()
    assert isinstance(back.unmet, Unmet)
    assert str(back.unmet) == "capability: needs SM89 (fp8), this is SM80"


def test_round_trip_of_the_least() -> None:
    least = Record("c", "quality", "bf16-torch", None, None, "embedded", "auto")
    assert Record.from_dict(json.loads(json.dumps(least.to_dict()))) == least
    assert least.outcome == "measured"
    assert least.schema == SCHEMA


def test_not_a_number_survives() -> None:
    record = full()
    record.metrics["ppl"] = math.nan
    assert math.isnan(Record.from_dict(json.loads(json.dumps(record.to_dict()))).metrics["ppl"])


def test_without_samples_only_they_are_gone() -> None:
    with_them, without = full().to_dict(), full().to_dict(samples=False)
    assert with_them.keys() - without.keys() == {"samples"}
    back = Record.from_dict(without)
    assert back.samples == {}
    assert back.metrics == full().metrics


def test_to_dict_is_a_copy() -> None:
    record = full()
    record.to_dict()["info"]["clocks"]["sm_mhz"] = 0
    assert record.info["clocks"]["sm_mhz"] == 1980


@pytest.mark.parametrize("schema", [0, SCHEMA + 1, "1", None])
def test_another_schema_is_refused(schema: object) -> None:
    with pytest.raises(LowbitError, match=rf"expected schema {SCHEMA}, got {schema!r}"):
        Record.from_dict({**full().to_dict(), "schema": schema})


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "red"},
        {"unmet": ["capability"]},
        {"unmet": 7},
    ],
)
def test_another_shape_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(LowbitError, match="not a lowbit record"):
        Record.from_dict({**full().to_dict(), **change})


@pytest.mark.parametrize("key", ["case", "kind", "format", "mode", "workload", "model", "load_format", "schema"])
def test_a_missing_part_is_refused(key: str) -> None:
    data = full().to_dict()
    del data[key]
    with pytest.raises(LowbitError, match="not a lowbit record"):
        Record.from_dict(data)


@pytest.mark.parametrize("data", [[], "text", 3, None])
def test_what_is_no_object_is_refused(data: object) -> None:
    with pytest.raises(LowbitError, match="not a lowbit record"):
        Record.from_dict(data)  # type: ignore[arg-type]


def test_backend_is_the_end_of_the_formats_id() -> None:
    assert full().backend == "torchao"
    assert Record("c", "decode", "a16w4_nf4_dq-bitsandbytes", None, None, "m", "auto").backend == "bitsandbytes"
