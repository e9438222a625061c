"""lowbit's command line options, and the typed settings that the rest of the plugin reads."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lowbit.auto.ask import DEFAULT_SECONDS, RESERVE, Ask
from lowbit.baselines import DEFAULT_RUNS
from lowbit.cases import SUITE_MODES
from lowbit.errors import LowbitError
from lowbit.evaluation import Tasks
from lowbit.formats import FORMATS, recipes, register
from lowbit.pytest_plugin import evaluation

DEFAULT_BASELINE_RUNS = DEFAULT_RUNS
DEFAULT_MAX_KLD = 0.05


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("lowbit", "lowbit: low-bit Llama benchmarks (pytest benches)")
    group.addoption(
        "--model",
        default="auto",
        metavar="NAME|HUB_ID|DIR",
        help="embedded, llama-3.1-8b, llama-3.2-1b, llama-3.2-3b, a hub id or a folder. auto (default): LOWBIT_MODEL "
        "if set; on a GPU a Llama-3.1-8B found in the local Hugging Face cache, else the largest preset that fits, "
        "with dummy weights; without a GPU embedded",
    )
    group.addoption(
        "--load-format",
        default="auto",
        choices=("auto", "dummy"),
        help="dummy: seeded N(0, 0.02) weights of the true shape; speed, VRAM and energy are real, quality is n/a and "
        "the embedded model's KL under the same format stands in its place, labelled so",
    )
    group.addoption(
        "--suite",
        default="quick",
        metavar="|".join(SUITE_MODES),
        help="quick (default): the formats of a first choice × (eager, reduce-overhead, native) × (prefill, decode "
        "batch 1 at context 0); nightly: further group sizes and variants, all modes and workloads; full: also the "
        "reference formats, longer workloads and auto-recipe. Evaluations join any suite by --eval",
    )
    group.addoption("--text", type=Path, metavar="FILE", help="score perplexity and KL on this text file")
    group.addoption(
        "--recipe",
        type=Path,
        metavar="FILE",
        help='measure this recipe too: {"name": "mine", "parts": {"lm_head": "a16w8-torchao", "layers.*": '
        '"a16w4_g128-torchao"}}, the first pattern that matches a module decides; select it with -k mine',
    )
    group.addoption(
        "--baselines-dir",
        type=Path,
        metavar="DIR",
        help="where baselines are read and written (default: benches/baselines, one folder per device)",
    )
    group.addoption(
        "--update-baselines",
        action="store_true",
        help="accept what is measured as this device's baseline: takes kept runs of the same environment, measures the "
        "missing ones in fresh processes; with -k only those rows are replaced",
    )
    group.addoption(
        "--baseline-runs",
        type=int,
        default=DEFAULT_BASELINE_RUNS,
        metavar="N",
        help=f"runs (fresh processes) that a baseline is made of (default {DEFAULT_BASELINE_RUNS})",
    )
    group.addoption(
        "--baseline-patch",
        type=Path,
        metavar="FILE",
        help="with --benchmark-compare: write a diff for `git apply` that accepts exactly the cases that failed by "
        "their figures, changed, are new or no longer run; no file when there are none",
    )
    group.addoption(
        "--compare-if-baseline",
        action="store_true",
        help="--benchmark-compare where a baseline of this device and model exists, a plain run where none does; a "
        "case that the baseline lacks is measured and does not fail",
    )
    group.addoption("--isolate", action="store_true", help="a fresh process for every case")
    group.addoption("--resume", action="store_true", help="continue the last run that was killed or interrupted")
    group.addoption(
        "--max-kld",
        type=float,
        metavar="NAT",
        help=f"the recommendation's limit on mean KL divergence (default {DEFAULT_MAX_KLD}); auto-recipe stays "
        f"within it / {RESERVE:g} on its calibration text, for KL on another text may be higher",
    )
    group.addoption(
        "--auto-seconds",
        type=float,
        metavar="S",
        help=f"about how long the search of auto-recipe may take (default {DEFAULT_SECONDS:g}); its choice is "
        "kept in .lowbit/auto as a file for --recipe",
    )
    group.addoption(
        "--max-vram", type=float, metavar="MIB", help="the recommendation's limit on VRAM in MiB (default: the card)"
    )
    group.addoption(
        "--report",
        type=Path,
        metavar="FILE",
        help="write the HTML report: verdict, Pareto plots, roofline, all cases, history; one file, no network",
    )
    group.addoption(
        "--history",
        type=Path,
        metavar="DIR",
        help="further kept runs whose nights the report shows, beside .lowbit/runs",
    )
    group.addoption(
        "--summary",
        type=Path,
        metavar="FILE",
        help="write the run in Markdown, one screen; $GITHUB_STEP_SUMMARY is appended to",
    )
    group.addoption(
        "--lowbit-device", type=int, default=None, metavar="INDEX", help="the GPU to measure on (default 0)"
    )
    group.addoption(
        "--profile",
        action="store_true",
        help="profile each case: trace, memory snapshot (GPU), Inductor's output in .lowbit/profiles/, and a table "
        "of its longest kernels; the run is not kept, compared or accepted",
    )
    evaluation.add_options(group)
    # between lowbit's own processes: the folder of the run's profiles, the file for a fresh process's one case
    group.addoption("--lowbit-profile", metavar="DIR", help=argparse.SUPPRESS)
    group.addoption("--lowbit-child", type=Path, metavar="FILE", help=argparse.SUPPRESS)


@dataclass(frozen=True)
class Settings:
    """lowbit's options after parsing."""

    model: str
    load_format: str
    suite: str
    text: Path | None
    baselines_dir: Path
    update_baselines: bool
    baseline_runs: int
    baseline_patch: Path | None
    compare: bool
    compare_to: str | None
    compare_if_baseline: bool
    isolate: bool
    resume: bool
    max_kld: float
    max_vram: float | None
    report: Path | None
    history: Path | None
    summary: Path | None
    device_index: int
    child: Path | None
    profile: Path | None
    tasks: Tasks | None
    runs_dir: Path
    auto: Ask

    @classmethod
    def from_config(cls, config: pytest.Config) -> Settings:
        """Raises pytest.UsageError on values that exclude each other."""
        option = config.option
        if not hasattr(option, "benchmark_compare"):
            raise pytest.UsageError("benches need pytest-benchmark: it is not loaded (-p no:benchmark?)")
        if option.benchmark_disable:
            raise pytest.UsageError("--benchmark-disable: a bench without timing measures nothing; leave it out")
        if option.suite not in SUITE_MODES:
            raise pytest.UsageError(f"--suite: unknown suite {option.suite!r}; known: {', '.join(SUITE_MODES)}")
        if option.baseline_runs < 1:
            raise pytest.UsageError(f"--baseline-runs: expected at least 1, got {option.baseline_runs}")
        if option.text is not None and not option.text.is_file():
            raise pytest.UsageError(f"--text: no such file: {option.text}")
        if option.text is not None and option.text.stat().st_size == 0:
            raise pytest.UsageError(f"--text: {option.text} is empty; quality needs at least one window of text")
        if option.baselines_dir is not None and option.baselines_dir.is_file():
            raise pytest.UsageError(f"--baselines-dir: expected a folder, {option.baselines_dir} is a file")
        for name in ("max_kld", "max_vram"):
            limit = getattr(option, name)
            if limit is not None and not limit >= 0:  # NaN too: no case is within it
                raise pytest.UsageError(f"--{name.replace('_', '-')}: expected 0 or more, got {limit:g}")
        if option.recipe is not None:
            try:
                register(recipes.read(option.recipe, FORMATS))
            except LowbitError as error:
                raise pytest.UsageError(f"--recipe: {error}") from error
        max_kld = DEFAULT_MAX_KLD if option.max_kld is None else option.max_kld
        seconds = DEFAULT_SECONDS if option.auto_seconds is None else option.auto_seconds
        if seconds <= 0:
            raise pytest.UsageError(f"--auto-seconds: expected more than 0, got {seconds:g}")
        compare = option.benchmark_compare
        if compare and option.update_baselines:
            raise pytest.UsageError("--benchmark-compare judges a run, --update-baselines accepts it: give one of them")
        if option.baseline_patch is not None and not (compare or option.compare_if_baseline):
            raise pytest.UsageError("--baseline-patch accepts what a comparison shows: give --benchmark-compare too")
        return cls(
            model=option.model,
            load_format=option.load_format,
            suite=option.suite,
            text=option.text,
            baselines_dir=(option.baselines_dir or config.rootpath / "benches" / "baselines"),
            update_baselines=option.update_baselines,
            baseline_runs=option.baseline_runs,
            baseline_patch=option.baseline_patch and Path(config.invocation_params.dir, option.baseline_patch),
            compare=bool(compare),
            compare_to=compare if isinstance(compare, str) else None,
            compare_if_baseline=option.compare_if_baseline and not option.update_baselines and not option.profile,
            isolate=option.isolate,
            resume=option.resume,
            max_kld=max_kld,
            max_vram=option.max_vram,
            report=option.report,
            history=option.history,
            summary=option.summary,
            device_index=option.lowbit_device or 0,
            child=option.lowbit_child,
            profile=profile_folder(config),
            tasks=evaluation.read_options(config),
            runs_dir=config.rootpath / ".lowbit" / "runs",
            auto=Ask(max_kld, seconds, config.rootpath / ".lowbit" / "auto"),
        )


FOR_BENCHES = ("benchmark_compare", "update_baselines", "compare_if_baseline", "resume", "report", "summary", "profile")
"""Options that only a bench run follows."""


def refuse_without_path(config: pytest.Config) -> None:
    """UsageError for ``pytest --benchmark-compare``: without a path tests/ would run, compared with nothing."""
    option = config.option
    if option.help or option.version or option.file_or_dir:
        return
    given = [name for name in FOR_BENCHES if getattr(option, name, None)]
    if given:
        words = " ".join(str(word) for word in config.invocation_params.args)
        flag = f"--{given[0].replace('_', '-')}"
        raise pytest.UsageError(f"{flag} is for benches, and without a path tests/ would run: pytest benches {words}")


def profile_folder(config: pytest.Config) -> Path | None:
    """Where --profile writes, the same folder for workers and fresh processes; None without it.

    Raises pytest.UsageError beside what would judge, accept or continue a run.
    """
    option = config.option
    if not option.profile:
        return None
    given = {
        "--benchmark-compare": getattr(option, "benchmark_compare", None),
        "--update-baselines": option.update_baselines,
        "--resume": option.resume,
    }
    for name, value in given.items():
        if value:
            raise pytest.UsageError(f"--profile slows down what it looks at, and keeps no run: leave {name} out")
    if option.lowbit_profile is None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        option.lowbit_profile = str(config.rootpath / ".lowbit" / "profiles" / f"{stamp}-{os.getpid()}")
    return Path(option.lowbit_profile)
