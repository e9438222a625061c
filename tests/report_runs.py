"""Kept runs and a baseline as an H200 would leave them, for the report's tests: figures are made up, shapes are real.

``python tests/report_runs.py FOLDER [--cases N] [--nights N]`` leaves them on disk, to look at a page without a GPU.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

from lowbit import baselines, regression, runs
from lowbit.baselines import Baseline
from lowbit.cases import Case, enumerate_cases, run_order
from lowbit.formats import FORMATS, Unmet
from lowbit.history import History, Night
from lowbit.record import Record
from lowbit.report import content, since
from lowbit.report.content import Content
from lowbit.roofline import mean_context
from lowbit.runs import Header, Run
from lowbit.spread import pool_spread

PARAMETERS = 8_030_000_000
READ_GB_S = 4606.0
KV_BYTES_PER_TOK = 131_072.0
PROTOCOL = "embedded_512"
STATS = {"min": 1.0, "max": 1.2, "mean": 1.1, "stddev": 0.1, "rounds": 3, "median": 1.1}
ENVIRONMENT = {
    "lowbit": "0.1.0",
    "lowbit_source": "ee5918b089f3",
    "python": "3.12.3",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    "torchao": "0.18.0",
    "gemlite": "0.6.0.post2",
    "bitsandbytes": "0.50.2",
    "cuda": "13.0",
    "driver": "580.159.04",
}
UPGRADED = ENVIRONMENT | {"torch": "2.12.0+cu130", "triton": "3.7.0", "lowbit_source": "0c1d77aa42b9"}
BYTES = {16.0: 15.0e9, 8.0: 8.0e9, 4.0: 4.6e9}
FEW = (
    *("bf16-torch", "fp16-torch", "a16w8_fp8-torchao", "a16w4_g128-torchao", "a16w8-gemlite", "a16w8-torchao"),
    *("a8w8_fp8-gemlite", "a16w4_g128-gemlite", "a16w4_nf4_dq-bitsandbytes", "a8w8_fp8-torchao"),
    *("a8w8_llmint8-bitsandbytes", "a8w8-torchao"),
)
"""The formats of a plan without a number of cases: those of docs/h200-2026-11-21.md."""
EVIL = "</script><img src=x onerror=\"document.title='owned'\">"


@dataclass
class Plan:
    """What is kept. ``slower`` maps a part of a case's id to the factor that its speed has from night ``step`` on,
    ``drifting`` to what it loses each night from then on."""

    nights: int = 40
    cases: int | None = None
    seed: int = 0
    noise: float = 0.004
    fresh: int = 5
    step: int = 33
    slower: dict[str, float] = field(default_factory=lambda: {"a16w4_g128-torchao-reduce-overhead-b1_c0": 0.88})
    faster: dict[str, float] = field(default_factory=lambda: {"a8w8_fp8-torchao-reduce-overhead-p512": 0.90})
    drifting: dict[str, float] = field(default_factory=dict)
    skipped: str = "llmint8"
    failing: str = "gemlite-eager-b8"
    error: str = "NaN or Inf logits"


def chosen(plan: Plan) -> list[tuple[Case, str]]:
    """Cases and their node ids; more than the suite has are given numbers."""
    cases = [case for kind in ("quality", "prefill", "decode") for case in enumerate_cases(kind, "nightly", PARAMETERS)]
    if plan.cases is None:
        modes = (None, "eager", "reduce-overhead")
        workloads = (None, "p512", "b1_c0", "b8_c0")
        cases = [c for c in cases if c.mode in modes and (c.workload and c.workload.id) in workloads]
        cases = [c for c in cases if c.format.id in FEW]
    else:
        cases.sort(key=run_order)  # whole formats, so that decode is among the first
    named = [(case, f"benches/test_{case.kind}.py::test_{case.kind}[{case.id}]") for case in cases]
    count = plan.cases or len(named)
    return [
        (case, node if turn == 0 else f"{node[:-1]}-again{turn}]")
        for turn in range(math.ceil(count / len(named)))
        for case, node in named
    ][:count]


def header(night: int, environment: dict[str, str]) -> Header:
    started = datetime(2026, 10, 12, 2, 17, tzinfo=UTC) + timedelta(days=night)
    return Header(
        device="nvidia-h200",
        device_name="NVIDIA H200",
        model="llama-3.1-8b",
        load_format="dummy",
        protocol=PROTOCOL,
        suite="nightly",
        environment=environment,
        argv=["benches", "--benchmark-compare", "--suite", "nightly"],
        started=started.isoformat(timespec="seconds"),
        commit="fb5d2e7a90c14f7d8f2b6d5c0f6c1a2b3c4d5e6f",
    )


def speed(case: Case) -> float:
    """Decode tokens per second that look like the format's on an H200: more bits less, eager a quarter."""
    fmt = case.format
    share = {16.0: 0.59, 8.0: 0.47, 4.0: 0.28}.get(fmt.weight_bits, 0.3)
    share *= 0.9 + 0.2 * random.Random(fmt.id).random()
    share *= {"eager": 0.2 + 0.15 * random.Random(fmt.id + "e").random(), "default": 0.8}.get(case.mode or "", 1.0)
    return share * READ_GB_S * 1e9 / BYTES.get(fmt.weight_bits, 5.2e9)


def divergence(weight_bits: float) -> float:
    """A KL that looks like the bits'."""
    return 3e-5 if weight_bits >= 16 else 1e-4 if weight_bits >= 8 else 1.5e-3 * 4.0 ** (4 - weight_bits)


def record(case: Case, node: str, rng: random.Random, plan: Plan, night: int) -> Record:
    made = case.record(node, "llama-3.1-8b", "dummy")
    fmt, streamed = case.format, BYTES.get(case.format.weight_bits, 5.2e9)
    if plan.skipped in node:
        made.outcome, made.unmet = "skipped", Unmet("capability", "needs SM100 (fp4), this is SM90")
        return made
    if case.kind == "quality":
        kld = 0.0 if fmt.is_baseline else random.Random(fmt.id).uniform(0.5, 2) * divergence(fmt.weight_bits)
        made.metrics = {f"kld_{PROTOCOL}_8176tok": kld, f"top1_{PROTOCOL}_8176tok": 1 - kld}
        made.unavailable = {"ppl": "dummy weights: quality is not applicable"}
        made.dtype = "bf16"
        return made
    factor = rng.gauss(1, plan.noise)
    if night >= plan.step:
        factor *= next((share for part, share in plan.slower.items() if part in node), 1.0)
        factor /= next((share for part, share in plan.faster.items() if part in node), 1.0)
        a_night = next((share for part, share in plan.drifting.items() if part in node), 0.0)
        factor *= 1 - a_night * (night - plan.step + 1)
    vram = streamed / 2**20 + 1900 + 64 * (case.workload.batch if case.workload else 1)
    compile_s = 0.0 if case.mode == "eager" else 14 * rng.gauss(1, 0.05)
    made.metrics = {"weights_mib": streamed / 2**20, "vram_peak_mib": round(vram), "compile_s": compile_s}
    made.metrics |= {"load_s": 4.1, "quantize_s": 1.7, "graph_breaks": 0.0, "recompiles": 0.0}
    if case.kind == "decode":
        assert case.workload is not None
        tok_s = speed(case) * factor * case.workload.batch**0.95
        tpot = 1e3 * case.workload.batch / tok_s
        context = mean_context(case.workload.prompt_tokens, case.workload.new_tokens)
        streamed += KV_BYTES_PER_TOK * case.workload.batch * context
        mbu = streamed * tok_s / case.workload.batch / (READ_GB_S * 1e9)
        made.metrics |= {"kv_bytes_per_tok": KV_BYTES_PER_TOK}
        made.metrics |= {"decode_tok_s": tok_s, "tpot_ms_p50": tpot, "tpot_ms_p99": 1.02 * tpot, "mbu": mbu}
        made.metrics |= {"energy_j_per_tok": 470 / tok_s * rng.gauss(1, 0.01)}
    else:
        ttft = (12 + 2 * fmt.weight_bits % 7) / factor
        made.metrics |= {"ttft_ms": ttft, "prefill_tok_s": 512e3 / ttft, "mfu": 7.6 / ttft}
    made.dtype = "bf16"
    card = {"sm_mhz": 1980 - rng.randrange(3) * 15, "mem_mhz": 3201, "temperature_c": 45 + rng.randrange(20)}
    card |= {"power_w": 480.0 + rng.randrange(200), "throttle": ["sw_power_cap"] if rng.random() < 0.1 else []}
    made.info = {
        "ceilings": {"read_gb_s": READ_GB_S, "copy_gb_s": 4012.0, "matmul_tflop_s": 768.0, "read_method": "triton"},
        "coverage": {"linears": 224, "streamed_bytes": BYTES.get(case.format.weight_bits, 5.2e9)},
        "card": {"before": card | {"others": []}, "after": card | {"others": []}},
        "wall_s": 6.5,
    }
    return made


def night_records(plan: Plan, night: int, last: bool) -> Iterator[Record]:
    rng = random.Random(plan.seed * 1000 + night)
    for number, (case, node) in enumerate(chosen(plan)):
        made = record(case, node, rng, plan, night)
        if last and case.kind == "decode" and plan.failing in node:
            made = replace(made, outcome="failed", error=plan.error, metrics={}, info={})
        elif last and case.kind == "prefill" and number % 17 == 0 and made.outcome == "measured":
            made = replace(made, outcome="void", error="another process came to the card: 4711 (python, 512 MiB)")
        yield made


def keep(root: Path, plan: Plan, night: int, baseline: Baseline | None = None, *, last: bool = False) -> Path:
    """One kept run; with a baseline the gate's verdicts lie beside its records, suspicions confirmed three times."""
    environment = UPGRADED if night >= plan.step else ENVIRONMENT
    spreads = pool_spread(baseline.rows.values()) if baseline else None
    regressed = False
    with runs.start(root, header(night, environment)) as writer:
        for made in night_records(plan, night, last):
            writer.append(made, STATS if made.metrics and made.kind != "quality" else None)
            if baseline is None or spreads is None or made.outcome != "measured":
                continue
            verdicts = regression.judge(made, baseline.rows[made.case], spreads, "cuda")
            verdicts = [replace(v, beyond=3, runs=3) if v.status == "regression" else v for v in verdicts]
            regressed |= any(verdict.fails for verdict in verdicts)
            told = [verdict.to_dict() for verdict in verdicts if verdict.status != "ungated"]
            writer.judged(made.case, told, baseline.identity)
        writer.close(int(regressed), regressed=regressed)
    return writer.path


def build(folder: Path, plan: Plan) -> tuple[Path, Path, Path]:
    """``folder/baselines`` and ``folder/runs``: the baseline's file, the runs' folder, the last night's run."""
    with mock.patch("os.fsync"):  # no power cut is to be survived here
        return _build(folder, plan)


def _build(folder: Path, plan: Plan) -> tuple[Path, Path, Path]:
    fresh = [keep(folder / "fresh", replace(plan, seed=1 + turn, step=10**6), 0) for turn in range(plan.fresh)]
    made = baselines.build([runs.read(path) for path in fresh])
    accepted = baselines.save(made, folder / "baselines")
    baseline = baselines.load(accepted)
    for night in range(plan.nights - 1):
        keep(folder / "runs", plan, night)
    return accepted, folder / "runs", keep(folder / "runs", plan, plan.nights - 1, baseline, last=True)


def _drawn(last: Run, plan: Plan, night: int, rng: random.Random) -> Night:
    """A night drawn about the last one's figures; before the plan's step the slower ones are as fast as ever."""
    environment, metrics = (UPGRADED if night >= plan.step else ENVIRONMENT), {}
    for made in last.records():
        slower = next((share for part, share in plan.slower.items() if part in made.case), 1.0)
        speed = rng.gauss(1, plan.noise) / (1.0 if night >= plan.step else slower)
        drawn = {name: value * speed for name, value in made.metrics.items() if name in ("decode_tok_s", "compile_s")}
        drawn |= {
            name: value / speed for name, value in made.metrics.items() if name in ("ttft_ms", "energy_j_per_tok")
        }
        steady = ("vram_peak_mib", f"kld_{PROTOCOL}_8176tok")
        metrics[made.case] = drawn | {name: made.metrics[name] for name in steady if name in made.metrics}
    return Night(header(night, environment).started, Path(str(night)), environment, "", metrics)


def large(folder: Path, cases: int, nights: int) -> Content:
    """A last night of many cases beside its baseline, with a history made in memory: no run is written for a night."""
    plan = Plan(nights=1, fresh=2, step=nights - 6, cases=cases, slower={"a16w4_g128": 0.9}, skipped="\0", error=EVIL)
    accepted, root, _ = build(folder, replace(plan, step=10**6))
    shutil.rmtree(root)
    baseline = baselines.load(accepted)
    with mock.patch("os.fsync"):
        last = runs.read(keep(root, plan, nights - 1, baseline, last=True))
    found = [_drawn(last, plan, night, random.Random(night)) for night in range(nights)]
    head = last.header
    history = History(head.device, head.device_name, head.model, head.load_format, found)
    return since.with_history(content.of_run(last, baseline), history)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--nights", type=int, default=40)
    parser.add_argument("--evil", action="store_true", help="an error message that tries to be markup")
    options = parser.parse_args()
    plan = Plan(nights=options.nights, cases=options.cases, step=options.nights - 7)
    plan.error = EVIL if options.evil else plan.error
    accepted, _, last = build(options.folder, plan)
    print(f"{len(FORMATS)} formats; {accepted}; {last}")


if __name__ == "__main__":
    main()
