"""``python -m lowbit formats --markdown``: what the page says of made-up runs. test_formats.py holds the real page."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import published
import pytest

from lowbit import baselines, runs
from lowbit.__main__ import main
from lowbit.cases import Case
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Unmet
from lowbit.formats import stored as stored_formats
from lowbit.report import checkpoint_table, figures, format_table
from lowbit.runs import Header
from lowbit.workloads import Workload

B1 = Workload("b1_c0", "decode", 1, 5, 128, "full")
FROM_128 = Workload("b1_c128", "decode", 1, 128, 128, "full")
LONG = Workload("b1_c8192", "decode", 1, 8192, 128, "full")
H200 = Header("nvidia-h200", "NVIDIA H200", "llama-3.1-8b", "dummy", "embedded_512", "full", {"torch": "2.11.0"})
CPU = Header("cpu-amd-epyc-2c", "AMD EPYC", "embedded", "auto", "embedded_512", "full", {"torch": "2.13.0"})


def quality(name, kld, **metrics):
    record = Case("quality", FORMATS[name]).record(f"benches/test_quality.py::test_quality[{name}]", "", "")
    record.metrics = {"ppl_embedded_512": 2.15, "kld_embedded_512_8176tok": kld, "kld_embedded_2048_9tok": 9.0}
    record.metrics |= metrics
    return record


def decode(name, mode, tok_s, workload=B1, **metrics):
    case = Case("decode", FORMATS[name], mode, workload)
    record = case.record(f"benches/test_decode.py::test_decode[{case.id}]", "", "")
    record.metrics = {"decode_tok_s": tok_s, "vram_peak_mib": 9950.0, "mbu": 0.462} | metrics
    return record


def skipped(name, reason):
    return replace(decode(name, "eager", 0), metrics={}, outcome="skipped", unmet=Unmet("capability", reason))


def kept(root, header, records, started="2026-11-21T10:00:00+00:00"):
    with runs.start(root, replace(header, started=started)) as writer:
        for record in records:
            writer.append(record, None)
        return writer.close(0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    kept(
        root,
        H200,
        [
            decode("bf16-torch", "eager", 53.1),
            decode("bf16-torch", "reduce-overhead", 180.0),
            quality("bf16-torch", 0.0, bits_per_weight=16.0),
            decode("a16w8-torchao", "eager", 36.5),
            decode("a16w8-torchao", "reduce-overhead", 259.2, quantize_s=0.5),
            quality("a16w8-torchao", 6.8e-5, bits_per_weight=8.0079),
            decode("a8w8-torchao", "eager", 4.8),
            decode("bf16_kv_int8-torch", "eager", 50.0, kv_bytes_per_tok=67584.0),
            skipped("a8w8_mxfp8-torchao", "needs SM100 (MXFP8 tensor cores), this is SM90"),
            replace(decode("a16w8-gemlite", "eager", 0), metrics={}, outcome="failed", error="no kernel\nTraceback"),
        ],
    )
    kept(root, CPU, [quality("a16w8-torchao", 7.1e-5, bits_per_weight=8.13), quality("a16w4_g64-hqq", 0.00123)])
    return root


def rows(page):
    """Each format's cells by the titles of its table."""
    found = {}
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        titles, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
        found |= {cells[0].strip(" `"): dict(zip(titles, cells, strict=True)) for cells in lines}
    return found


def make(*paths, formats=FORMATS):
    chosen = list(formats.values())
    return format_table.page(chosen, figures.read(paths), dict.fromkeys(FORMATS, "CPU"))


@pytest.fixture(scope="module")
def page(stored):
    return make(stored)


def test_every_row_is_there_once_under_its_library(page):
    assert sorted(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)) == sorted(FORMATS)
    assert page.index("## torchao\n") < page.index("| `a16w8-torchao` |") < page.index("## gemlite\n")


def test_a_measured_row_shows_its_fastest_mode_and_what_it_took(page):
    row = rows(page)["a16w8-torchao"]
    assert row["decode, H200"] == "259.2 reduce-overhead"
    assert (row["×bf16"], row["VRAM, MiB"], row["MBU"], row["quantize, s"]) == ("1.440", "9950", "46 %", "0.50")
    assert (row["bits"], row["KL, H200"], row["KL, CPU"]) == ("8.008", "6.8e-05", "7.1e-05")
    assert row["what it is"] == "A16W8 int8, `int8_weight_only`"
    assert "slower" not in row["remarks"]


def test_a_row_without_a_stored_run_says_so(page):
    row = rows(page)["a16w4_nf4-bitsandbytes"]
    assert row["decode, H200"] == "not measured on an H200"
    assert (row["bits"], row["KL, CPU"], row["MBU"]) == ("–", "–", "–")


def test_the_page_counts_the_rows_with_a_figure_and_what_became_of_the_others(stored):
    names = (
        *("bf16-torch", "a16w8-torchao", "a16w8-gemlite", "a8w8_mxfp8-torchao", "a4w4_nvfp4-torchao"),
        *("a16w4_nf4-bitsandbytes", "a16w4_fp4-bitsandbytes"),
    )
    needs = dict.fromkeys(FORMATS, "SM75") | {"a4w4_nvfp4-torchao": "SM100"}
    told = format_table.page([FORMATS[name] for name in names], figures.read([stored]), needs)
    assert (
        "- H200: 2 of 7 rows have a decode figure; need a later GPU: 1; were skipped, for the reason in the "
        "remarks: 1; failed, as the remarks have it: 1; are in no stored run: 2.\n"
    ) in told
    whole = format_table.page([FORMATS["bf16-torch"]], figures.read([stored]), needs)
    assert "- H200: 1 of 1 rows have a decode figure.\n" in whole


def test_a_row_that_the_card_can_not_have_says_what_it_asks_for(stored):
    needs = dict.fromkeys(FORMATS, "CPU or SM90; triton; Triton 3.8 below SM100")
    needs |= {"a4w4_nvfp4-torchao": "SM100", "a16w4_nf4-bitsandbytes": "CPU or SM120; other"}
    found = rows(format_table.page(list(FORMATS.values()), figures.read([stored]), needs))
    assert found["a4w4_nvfp4-torchao"]["decode, H200"] == "can't run: needs SM100, this is SM90"
    assert found["a16w4_nf4-bitsandbytes"]["decode, H200"] == "can't run: needs SM120, this is SM90"
    assert found["a8w4_g32-torchao"]["decode, H200"] == "runs on a CPU alone"
    assert found["a16w4_g64-hqq"]["decode, H200"] == "not measured on an H200"
    assert found["bf16-torch"]["decode, H200"].endswith(" reduce-overhead")


def test_what_only_a_cpu_measured_is_shown_beside_that(page):
    row = rows(page)["a16w4_g64-hqq"]
    assert (row["KL, CPU"], row["ppl, CPU"], row["decode, H200"]) == ("0.0012", "2.150", "not measured on an H200")
    assert row["path"] == "reference"


def test_slower_than_bf16_is_said_with_the_rows_own_reason(page):
    row = rows(page)["a8w8-torchao"]
    assert row["decode, H200"] == "4.80 eager"
    assert row["remarks"].startswith("**slower than bf16** on an H200: compiled, its int8 product asks for 17 tokens")
    assert row["×bf16"] == "0.027"


def test_slower_and_never_compiled_is_said_so(page):
    row = rows(page)["bf16_kv_int8-torch"]
    assert row["×bf16"] == "0.278"
    told = "**slower than bf16** on an H200: in eager mode, all that was measured; bf16's figure is reduce-overhead; "
    assert row["remarks"].startswith(told)


def test_another_context_is_named_and_not_held_against_bf16_at_none(tmp_path):
    name = "a16w4_g128-lowbit"
    slow, fast = (decode(name, mode, tok_s, FROM_128, mbu=0.6) for mode, tok_s in (("eager", 60.0), ("native", 749.2)))
    long = decode(name, "native", 568.8, LONG, vram_peak_mib=8934.0)
    kept(tmp_path, H200, [decode("bf16-torch", "reduce-overhead", 180.0), long, slow, fast])
    row = rows(make(tmp_path))[name]
    assert (row["decode, H200"], row["×bf16"]) == ("749.2 native, b1_c128", "–")
    assert (row["VRAM, MiB"], row["MBU"]) == ("9950", "60 %")
    headline = decode(name, "native", 700.0)
    kept(tmp_path, H200, [headline])
    assert rows(make(tmp_path))[name]["decode, H200"] == "700.0 native"


def test_skips_and_failures_give_their_reasons(page):
    found = rows(page)
    assert found["a8w8_mxfp8-torchao"]["remarks"] == "H200: needs SM100 (MXFP8 tensor cores), this is SM90"
    assert found["a16w8-gemlite"]["remarks"] == "H200: failed: no kernel"
    assert found["a16w8-gemlite"]["decode, H200"] == "not measured on an H200"


def test_a_cache_tells_its_bytes(page):
    row = rows(page)["bf16_kv_int8-torch"]
    assert row["what it is"] == "A16W16, KV cache in int8"
    assert "KV cache: 67,584 bytes per position" in row["remarks"]


def test_sources_are_named_with_device_date_and_versions(page, stored):
    assert re.search(r"^- `\S+`: llama-3.1-8b, dummy weights on NVIDIA H200, 2026-11-21, .*; 1 run$", page, re.M)
    assert re.search(r"^- `\S+`: embedded on AMD EPYC, 2026-11-21, ", page, re.M)
    assert "Decode on a CPU is in no stored run" in page


def test_the_later_measurement_counts_and_never_a_later_failure(tmp_path):
    kept(tmp_path, H200, [decode("bf16-torch", "eager", 60.0)], "2026-11-22T00:00:00+00:00")
    kept(tmp_path, H200, [decode("bf16-torch", "eager", 50.0)], "2026-11-20T00:00:00+00:00")
    failed = replace(decode("bf16-torch", "eager", 0), metrics={}, outcome="failed", error="out of memory")
    kept(tmp_path, H200, [failed], "2026-11-23T00:00:00+00:00")
    assert rows(make(tmp_path))["bf16-torch"]["decode, H200"] == "60.0 eager"


def test_a_baseline_is_a_source_with_its_medians_and_skips(tmp_path):
    speeds = (250.0, 260.0, 270.0)
    parts = [
        runs.read(
            kept(
                tmp_path / "runs",
                H200,
                [decode("a16w8-torchao", "eager", speed), skipped("a4w4_mxfp4-torchao", "needs SM100")],
            )
        )
        for speed in speeds
    ]
    baselines.save(baselines.build(parts), tmp_path / "baselines")
    page = make(tmp_path / "baselines")
    assert rows(page)["a16w8-torchao"]["decode, H200"] == "260.0 eager"
    assert rows(page)["a4w4_mxfp4-torchao"]["remarks"] == "H200: needs SM100"
    assert re.search(r"on NVIDIA H200, 2026-11-21, suite full; torch 2.11.0; 3 runs$", page, re.M)


def test_another_gpu_has_columns_of_its_own_and_the_h200_stays(tmp_path):
    other = replace(H200, device="nvidia-b200", device_name="NVIDIA B200")
    kept(tmp_path, other, [decode("a16w8-torchao", "eager", 99.0)])
    found = rows(make(tmp_path))
    assert found["a16w8-torchao"]["decode, B200"] == "99.0 eager"
    assert found["bf16-torch"]["decode, B200"] == "not measured on a B200"
    assert found["a16w8-torchao"]["decode, H200"] == "not measured on an H200"


def test_a_run_of_the_embedded_model_on_a_gpu_gives_its_kl_and_nothing_else(stored, tmp_path):
    """What the small model stores (K padded to 1,024, say) and how fast it is are no figures of the 8B's."""
    nf4, wide, mx = "a16w4_nf4-bitsandbytes", "a16w4_nf4_g512-bitsandbytes", "a8w8_mxfp8-torchao"
    shape = "group 512 does not divide q_proj (K=256)"
    records = [
        quality("bf16-torch", 0.0, bits_per_weight=16.0),
        quality("a16w8-torchao", 6.5e-5, bits_per_weight=15.0, quantize_s=99.0),
        quality(nf4, 1.3e-3, bits_per_weight=4.9),
        decode("a16w8-torchao", "native", 9999.0),
        decode("fp16-torch", "native", 9999.0),
        replace(quality(wide, 0), metrics={}, outcome="skipped", unmet=Unmet("shape", shape)),
        replace(
            quality("a8w8-torchao", 0),
            metrics={},
            outcome="failed",
            error="no kernel\nTraceback",
            info={"notes": ["untuned"]},
        ),
        replace(quality(mx, 0), metrics={}, outcome="skipped", unmet=Unmet("capability", "another reason")),
    ]
    kept(tmp_path, replace(H200, model="embedded", load_format="auto"), records, "2026-11-22T00:00:00+00:00")
    cpu = replace(quality(wide, 0), metrics={}, outcome="skipped", unmet=Unmet("shape", shape))
    kept(tmp_path, CPU, [cpu])
    kept(tmp_path, H200, [decode(wide, "eager", 70.0)])
    page = make(stored, tmp_path)
    before, found = rows(make(stored)), rows(page)
    assert (found["a16w8-torchao"] | {"KL, H200": "6.8e-05"}) == before["a16w8-torchao"]
    assert found["a16w8-torchao"]["KL, H200"] == "6.5e-05"
    assert (found[nf4]["KL, H200"], found[nf4]["bits"], found[nf4]["decode, H200"]) == (
        *("0.0013", "–"),
        "not measured on an H200",
    )
    assert found["fp16-torch"] == before["fp16-torch"]
    assert found["bf16-torch"] == before["bf16-torch"]
    assert found[wide]["remarks"].endswith(r"; CPU, KL on H200: group 512 does not divide q\_proj (K=256)")
    assert "; KL on H200: failed: no kernel (untuned)" in found["a8w8-torchao"]["remarks"]
    first, second = found[mx]["remarks"].split("; ")
    assert (first, second) == ("H200: needs SM100 (MXFP8 tensor cores), this is SM90", "H200: another reason")
    cuda = sum("cuda" in row.devices for row in FORMATS.values())
    assert f"- H200: 3 of {cuda} rows have a KL; were skipped, for the reason in the remarks: 2; failed" in page
    assert "have a KL" not in make(stored)
    assert re.search(r"^- `\S+`: embedded on NVIDIA H200, 2026-11-22, ", page, re.M)


def test_a_gpu_that_the_embedded_model_alone_ran_on_shows_that(tmp_path):
    other = replace(H200, device="nvidia-b200", device_name="NVIDIA B200", model="embedded", load_format="auto")
    kept(tmp_path, other, [quality("a16w8-torchao", 6.5e-5)])
    row = rows(make(tmp_path))["a16w8-torchao"]
    assert (row["KL, B200"], row["decode, B200"]) == ("6.5e-05", "not measured on a B200")
    assert (row["KL, CPU"], row["bits"]) == ("–", "–")


def test_other_models_are_left_out(tmp_path):
    kept(tmp_path, replace(H200, model="llama-3.2-1b"), [decode("a16w8-torchao", "eager", 400.0)])
    assert rows(make(tmp_path))["a16w8-torchao"]["decode, H200"] == "not measured on an H200"


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(LowbitError, match="no such kept run"):
        figures.read([tmp_path / "none.json"])
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(LowbitError, match=r"cut\.json"):
        figures.read([tmp_path])  # what the repository stores is whole


def test_a_named_folders_broken_run_costs_itself(stored, tmp_path, monkeypatch, capsys):
    (tmp_path / "cut.json").write_text("{")
    monkeypatch.chdir(stored)
    assert main(["formats", "--markdown", str(tmp_path), str(stored)]) == 0
    captured = capsys.readouterr()
    assert f"lowbit: left out: {tmp_path / 'cut.json'}: " in captured.err
    assert "a16w8-torchao" in captured.out


def test_a_baseline_that_somebody_accepted_on_a_cpu_is_not_of_the_page(stored, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stored, tmp_path / "benches" / "baselines" / "nvidia-h200")
    own = tmp_path / "benches" / "baselines" / "cpu-amd-epyc-2c"
    own.mkdir()
    (own / "0001_embedded-auto.json").write_text("not even read")
    assert main(["formats", "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "cpu-amd-epyc-2c" not in page
    assert "decode, H200" in page


def test_the_command_prints_or_writes_the_page(stored, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "out" / "formats.md"
    assert main(["formats", "--markdown", str(stored)]) == 0
    printed = capsys.readouterr().out
    assert main(["formats", "--markdown", str(stored), "-o", str(target)]) == 0
    assert target.read_text() == printed
    assert rows(printed)["a16w8-torchao"]["needs"] == "CPU or SM70"


@pytest.mark.parametrize("words", [["-o", "x.md"], ["run.json"], ["--markdown", "--json"]])
def test_arguments_that_contradict_each_other_are_refused(words, capsys):
    assert main(["formats", *words]) == 2
    assert "--markdown" in capsys.readouterr().err


def test_checkpoints_that_are_quantized_already_have_their_section():
    """What the page says is read is read: each example's config gives its row."""
    told = "\n".join(checkpoint_table.section())
    for how, said in checkpoint_table.EXAMPLES:
        assert f"| {how.layout}, {said} | `{stored_formats.as_row(how).id}` | " in told
    rows = [stored_formats.as_row(how).id for how, _ in checkpoint_table.EXAMPLES]
    assert len(set(rows)) == len(rows)
    for scheme in (published.Plain("float", "block", "group"), published.Plain("int", "row", "static")):
        how = stored_formats.read({"quantization_config": published.plain_config(scheme)}, "a test")
        assert f"`{stored_formats.as_row(how).id}`" in told
    act = published.config(published.Scheme("gptq", 4, 128, True, ordered=True))
    assert f"`{stored_formats.as_row(stored_formats.read({'quantization_config': act}, 'a test')).id}`" in told
