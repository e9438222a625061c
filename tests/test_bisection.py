"""bisect: in which order what changed is suspected, by what got worse; and the commands of the first step."""

from __future__ import annotations

import subprocess

import pytest
from nights import DECODE, TORCH, decode, keep, quality

from lowbit import bisection, pins
from lowbit.__main__ import main
from lowbit.formats import FORMATS

OLD = {
    **TORCH,
    "torchao": "0.17.0",
    "triton": "3.5.0",
    "gemlite": "0.5.0",
    "transformers": "5.1.0",
    "tokenizers": "0.22.0",
    "numpy": "2.3.0",
    "cuda": "12.8",
    "lowbit_source": "aaa",
}
NEW = {
    "torch": "2.13.0",
    "torchao": "0.18.0",
    "driver": "590.1",
    "triton": "3.7.0",
    "gemlite": "0.5.1",
    "transformers": "5.23.0",
    "tokenizers": "0.23.3",
    "numpy": "2.4.6",
    "cuda": "13.0",
    "lowbit_source": "bbb",
}
FORMATS_SLOWED = {"torchao": "a16w4_g128-torchao", "gemlite": "a16w4_g64-gemlite", "bf16": "bf16-torch"}


def runs(root, *slower, new=NEW, **fields):
    """Folders of a run in OLD and of one in ``new``, where the formats ``slower`` decode 10 % slower."""
    found = []
    for night, environment in enumerate((OLD, new)):
        records = [
            decode(name, decode_tok_s=90.0 if night and name in slower else 100.0) for name in FORMATS_SLOWED.values()
        ]
        found.append(keep(root, records, night=night, environment=environment, **fields))
    return found


def suspects(old, new, *cases, metric=""):
    one, two = bisection.read(old), bisection.read(new)
    return [found.name for found in bisection.find_suspects(one, two, bisection.find_moved(one, two, cases, metric))]


def test_the_names_that_the_tests_use_are_formats():
    assert set(FORMATS_SLOWED.values()) <= set(FORMATS)


def test_the_kernels_of_the_slower_case_come_first_and_other_libraries_last(tmp_path):
    names = suspects(*runs(tmp_path, FORMATS_SLOWED["torchao"]))
    assert names == ["torchao", "torch", "driver", "transformers", "lowbit", "gemlite", "numpy"]


def test_where_two_libraries_got_slower_what_both_have_comes_first(tmp_path):
    names = suspects(*runs(tmp_path, FORMATS_SLOWED["torchao"], FORMATS_SLOWED["gemlite"]))
    assert names[:4] == ["torch", "gemlite", "torchao", "driver"]


def test_where_bf16_got_slower_no_kernel_library_is_suspected(tmp_path):
    names = suspects(*runs(tmp_path, FORMATS_SLOWED["bf16"]))
    assert names == ["torch", "driver", "transformers", "lowbit", "gemlite", "numpy", "torchao"]


def test_a_worse_perplexity_points_to_the_models_code_before_the_driver(tmp_path):
    paths = [
        keep(tmp_path, [quality("bf16-torch", ppl_embedded_512=2.1 + late)], night=late, environment=environment)
        for late, environment in enumerate((OLD, NEW))
    ]
    assert suspects(*paths)[:4] == ["torch", "transformers", "lowbit", "driver"]


def test_compile_seconds_are_torchs_own_before_the_library(tmp_path):
    old, new = runs(tmp_path)
    assert suspects(old, new, FORMATS_SLOWED["torchao"], metric="compile_s")[:2] == ["torch", "torchao"]


def test_torch_takes_its_triton_and_cuda_along_and_transformers_its_tokenizers(tmp_path):
    old, new = map(bisection.read, runs(tmp_path))
    found = {one.name: one for one in bisection.find_suspects(old, new, bisection.Moved())}
    assert [change.name for change in found["torch"].changes] == ["torch", "cuda", "triton"]
    assert [change.name for change in found["transformers"].changes] == ["transformers", "tokenizers"]
    assert found["torch"].between == ["2.12.0"]


def test_triton_alone_is_a_suspect_of_its_own(tmp_path):
    old, new = runs(tmp_path, new={**OLD, "triton": "3.7.0", "cuda": "13.0"})
    assert suspects(old, new) == ["triton", "cuda"]


def test_cuda_launch_blocking_comes_before_everything(tmp_path):
    old, new = runs(tmp_path, new={**NEW, "CUDA_LAUNCH_BLOCKING": "1"})
    assert suspects(old, new)[0] == "cuda-launch-blocking"


def test_of_several_metrics_speed_is_asked_about(tmp_path):
    paths = []
    for late in (0, 1):
        names = list(FORMATS_SLOWED.values())
        records = [decode(name, decode_tok_s=100.0, vram_peak_mib=6000.0 + 900 * late) for name in names]
        records[1].metrics["decode_tok_s"] -= 10 * late
        paths.append(keep(tmp_path, records, night=late, environment=(OLD, NEW)[late]))
    moved = bisection.find_moved(*map(bisection.read, paths))
    assert (moved.metric, moved.cases) == ("decode_tok_s", [DECODE.format(format="a16w4_g64-gemlite")])
    assert moved.others == {"vram_peak_mib": 3}
    assert moved.worst == "10.0 % in decode[a16w4_g64-gemlite-default-b1_c0]"


def test_a_lost_case_points_to_its_library(tmp_path):
    old = keep(tmp_path, [decode("a16w4_g128-torchao", decode_tok_s=100.0)], environment=OLD)
    broken = decode("a16w4_g128-torchao", outcome="failed")
    broken.error = "ImportError: cannot import name"
    new = keep(tmp_path, [broken], night=1, environment=NEW)
    moved = bisection.find_moved(bisection.read(old), bisection.read(new))
    assert (moved.metric, "ImportError" in moved.worst) == ("", True)
    assert suspects(old, new)[0] == "torchao"


@pytest.mark.parametrize(
    ("format", "libraries"),
    [
        ("bf16-torch", set()),
        ("a16w4_g128-torchao", {"torchao"}),
        ("a16w4_g64-gemlite", {"gemlite", "hqq"}),
        ("a16w4_gemlite_g64-hqq", {"gemlite", "hqq"}),
        ("a16w4_nf4_attn8_head8-recipe", {"torchao", "bitsandbytes"}),
        ("a16w4_of_1999-gemlite", {"gemlite"}),
    ],
)
def test_libraries_of_a_format(format, libraries):
    assert bisection.libraries_of(format) == libraries


def test_the_format_is_found_in_a_cases_name():
    assert {bisection.format_of(DECODE.format(format=name)) for name in FORMATS} == set(FORMATS)
    assert bisection.format_of("benches/test_quality.py::test_quality[bf16-torch]") == "bf16-torch"


FREEZE_OLD = """\
torch==2.11.0+cu128
triton==3.5.0
nvidia_cublas_cu12==12.8.4
nvidia-ml-py==13.1
torchao==0.17.0
torchao-extras==1.0
numpy==2.3.0
"""
FREEZE_NEW = """\
torch==2.13.0+cu130
triton==3.7.0
nvidia-cublas==13.1
nvidia-ml-py==13.2
torchao==0.18.0
torchao-extras==1.0
numpy==2.4.6
"""


@pytest.fixture
def freezes(tmp_path):
    (tmp_path / "old.txt").write_text(FREEZE_OLD)
    (tmp_path / "new.txt").write_text(FREEZE_NEW)
    return tmp_path / "old.txt", tmp_path / "new.txt"


def run(capsys, *arguments):
    code = main(["bisect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def commands(out):
    lines = out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("half way: "))
    return [line.strip() for line in lines[start:] if line.startswith("    ")]


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ([], {"torchao": "0.18.0"}),
        (["--case", "bf16-torch"], {"torch": "2.13.0+cu130", "triton": "3.7.0", "nvidia-cublas": "13.1"}),
    ],
    ids=["a library", "torch with its own"],
)
def test_the_half_way_pins_are_old_but_for_the_suspect(freezes, tmp_path, capsys, arguments, changed):
    code, out, _ = run(capsys, *freezes, *arguments)
    assert code == 0
    written = [line for line in commands(out) if line.startswith(("grep", "printf"))]
    subprocess.run(["bash", "-c", "\n".join(written)], cwd=tmp_path, check=True)
    expected = pins.read(freezes[0]) | changed
    if "torch" in changed:
        del expected["nvidia-cublas-cu12"]
    assert pins.read(tmp_path / "half.txt") == expected
    install = next(line for line in commands(out) if line.startswith("pip install"))
    assert install.endswith("-r half.txt")
    assert ("https://download.pytorch.org/whl/cu130" in install) == ("torch" in changed)


def test_the_command_on_runs(tmp_path, capsys):
    old, new = runs(tmp_path, FORMATS_SLOWED["torchao"], suite="nightly")
    code, out, _ = run(capsys, old, new / "run.json")
    assert code == 0
    assert "worse: decode_tok_s of 1 case, by 10.0 % in decode[a16w4_g128-torchao-default-b1_c0] at most" in out
    assert "bisect first: torchao 0.17.0 -> 0.18.0: the kernels of the worse case" in out
    assert "  2. torch 2.11.0 -> 2.13.0, cuda 12.8 -> 13.0, triton 3.5.0 -> 3.7.0; runs and" in out
    install, measure, compare = commands(out)
    assert install.startswith("pip install torchao==0.18.0 torch==2.11.0 triton==3.5.0 ")
    assert not {"driver", "cuda", "lowbit"} & {word.partition("==")[0] for word in install.split()}
    assert measure == (
        "pytest benches --model llama-3.1-8b --load-format dummy --suite nightly "
        "-k 'test_decode[a16w4_g128-torchao-default-b1_c0]'"
    )
    assert compare == f"python -m lowbit compare {old} .lowbit/runs"
    assert out.splitlines()[-1] == "does not: it is not; keep NEW's torchao and add NEW's torch"


@pytest.mark.parametrize(
    ("changed", "step"),
    [
        ({"driver": "590.1"}, "# pip can't: a host or an image with driver 590.1"),
        ({"lowbit_source": "bbb"}, "git bisect start 2222 1111 -- lowbit benches"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "unset CUDA_LAUNCH_BLOCKING"),
        ({"gemlite": "not installed"}, "pip uninstall -y gemlite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_version_to_install(tmp_path, capsys, changed, step):
    old = keep(tmp_path, [decode(decode_tok_s=100.0)], environment=OLD, commit="1111")
    new = keep(tmp_path, [decode(decode_tok_s=90.0)], night=1, environment=OLD | changed, commit="2222")
    _, out, _ = run(capsys, old, new)
    assert commands(out)[0] == step


def test_nothing_changed(tmp_path, capsys):
    old, new = runs(tmp_path, "bf16-torch", new=OLD)
    code, out, _ = run(capsys, old, new)
    assert (code, "nothing to bisect" in out, "half way" in out) == (0, True, False)


def test_runs_of_different_things_are_told_apart(tmp_path, capsys):
    old, new = runs(tmp_path)
    assert "measured different things" not in run(capsys, old, new)[1]
    other = keep(tmp_path, [decode(decode_tok_s=90.0)], night=2, environment=NEW, device="nvidia-a100")
    code, out, _ = run(capsys, old, other)
    assert (code, "they measured different things (device, model" in out) == (0, True)


def test_a_run_and_pins_are_compared_in_what_both_name(tmp_path, freezes, capsys):
    old, _ = runs(tmp_path / "runs")
    _, out, _ = run(capsys, old, freezes[1])
    assert "torchao 0.17.0 -> 0.18.0" in out
    assert "-> none" not in out


def test_many_differences_are_counted(tmp_path, capsys):
    for name, version in (("old.txt", 1), ("new.txt", 2)):
        (tmp_path / name).write_text("".join(f"package-{i}=={version}.0\n" for i in range(40)))
    _, out, _ = run(capsys, tmp_path / "old.txt", tmp_path / "new.txt")
    assert "     and 28 more" in out
    told = out.partition("half way")[0].splitlines()[2:]
    assert max(map(len, told)) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "speed"], "unknown metric 'speed'"),
        (["--case", "nf9"], "expected a part of a case"),
    ],
)
def test_an_unknown_name_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    code, _, err = run(capsys, *runs(tmp_path), *arguments)
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err


def test_a_file_of_neither_kind_is_exit_code_2(tmp_path, freezes, capsys):
    (tmp_path / "other.json").write_text("{}")
    for path in (tmp_path / "other.json", tmp_path / "none.txt"):
        code, _, err = run(capsys, freezes[0], path)
        assert (code, len(err.splitlines()), path.name in err) == (2, 1, True)
