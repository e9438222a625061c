from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbit import formats
from lowbit.backends import BACKENDS
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Unmet
from lowbit.formats.row import table_of
from lowbit.report import format_table, formats_page

ROWS = list(FORMATS.values())


def test_every_row_is_filed_under_its_own_id():
    assert [row.id for row in ROWS] == list(FORMATS)
    assert all(row.id == f"{row.name}-{row.backend}" for row in ROWS)


def test_the_formats_of_issue_2_are_there():
    assert set(FORMATS) >= {
        "bf16-torch",
        "fp16-torch",
        "a16w8-torchao",
        "a8w8-torchao",
        "a16w4_g128-torchao",
        "a16w8_fp8-torchao",
        "a8w8_fp8-torchao",
        "a16w8-gemlite",
        "a16w4_g128-gemlite",
        "a8w8_fp8-gemlite",
        "a8w8_llmint8-bitsandbytes",
        "a16w4_nf4_dq-bitsandbytes",
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_row_is_consistent(row):
    assert row.backend in BACKENDS
    assert set(row.devices) <= {"cpu", "cuda"}
    assert row.devices
    assert set(row.dtypes) <= {"bf16", "fp16"}
    assert row.dtypes
    if "_g" in row.name and not row.parts:
        assert row.name.endswith(f"_g{row.group_size}")
    if row.quantized:
        start = f"a{row.activation_bits:g}w{row.weight_bits:g}"
        assert row.name.startswith((start, start.replace(".", "")))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_inductor_flags_of_a_row_exist_in_this_torch(row):
    known = torch._inductor.config.get_config_copy()
    assert set(row.inductor) <= set(known)
    assert all(isinstance(value, type(known[flag])) for flag, value in row.inductor.items())


def test_there_is_one_baseline():
    assert [row.id for row in ROWS if row.is_baseline] == ["bf16-torch"]
    assert [row.id for row in ROWS if not row.quantized] == [
        *("bf16-torch", "fp16-torch", "bf16-lowbit"),
        *("bf16_kv_int8-torch", "bf16_kv_fp8-torch", "bf16_kv_int4-torch", "bf16_attn_fp8-torch"),
        "auto-recipe",
    ]


def test_selectors_hold_both_spellings():
    words = FORMATS["a16w4_g128-torchao"].selectors
    assert {"int4", "torchao", "a16w4", "w4a16", "W4A16", "A16W4", "g128"} <= words
    assert "fp8" in FORMATS["a8w8_fp8-gemlite"].selectors


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("tf32", "bf16-torch"),
        ("int5", "a16w5_intx_g32-torchao"),
        ("INT4", "a16w4_g128-torchao"),
        ("a16w8-torchoa", "a16w8-torchao"),
    ],
)
def test_an_unknown_format_names_the_nearest(name, near):
    with pytest.raises(LowbitError, match=f"unknown format '{name}'; of {len(FORMATS)} the nearest: .*{near}") as error:
        formats.find(name)
    assert "all of them: python -m lowbit formats" in str(error.value)
    assert len(str(error.value)) < 500
    assert formats.find("bf16-torch") is FORMATS["bf16-torch"]


def test_two_rows_of_one_id_are_refused():
    twice = FORMATS["bf16-torch"]
    with pytest.raises(LowbitError, match="two rows bf16-torch: give one of them another name"):
        table_of([*FORMATS.values(), replace(twice, note="another")])


def test_unmet_reads_as_kind_and_reason():
    assert str(Unmet("capability", "needs SM89 (fp8), this is SM80")) == "capability: needs SM89 (fp8), this is SM80"


def test_formats_need_no_torch():
    code = "import sys, lowbit.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ROOT = Path(__file__).parent.parent


def test_docs_formats_is_what_the_command_writes(monkeypatch):
    """All of it where the runs that it is made of are stored here, else that it has exactly these rows."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "formats.md").read_text()
    anew = f"write it anew, after a rebase too: {format_table.COMMAND}"
    assert set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)) == set(FORMATS), anew
    sources = [Path(found) for found in re.findall(r"^- `([^`]+\.json)`: ", page, re.MULTILINE)]
    assert sources
    if all(path.exists() for path in sources):
        monkeypatch.setattr(formats_page, "STORED", sources)  # a baseline that a user accepted here is not of the page
        assert formats_page.render().splitlines() == page.splitlines(), anew
