"""lm-evaluation-harness: the real one, offline, on local tasks; and lowbit's own loop, which has to agree with it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import eval_tasks
import pytest
import torch
from fakes import Bench
from tiny_lab import CPU

from lowbit import embedded, metrics, models
from lowbit.cases import evaluation_cases
from lowbit.errors import LowbitError
from lowbit.evaluation import Tasks, harness, harness_version, loglikelihood
from lowbit.metrics import Evaluation, Measurement
from lowbit.record import Record
from lowbit.regression import judge
from lowbit.spread import Row, Spreads, Values

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: tox -e tests has it"
)


@pytest.fixture
def bench(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("lowbit.pytest_plugin.evaluation.harness_version", lambda: "0.0")
    made = Bench(pytester, monkeypatch)
    (made.root / "benches" / "test_eval.py").write_text((ROOT / "benches" / "test_eval.py").read_text())
    return made


# -- the real harness --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Hugging Face's libraries without a network and with a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    pages = tuple(embedded.heldout_text().split("\n\n")[:3])
    folder = eval_tasks.write(tmp_path_factory.mktemp("tasks"), (pages[0][:300], pages[1][:200], "Once."))
    return Tasks(("story_end", "story_all"), folder)


@pytest.fixture(scope="module")
def host():
    return models.load(models.choose("embedded", "auto", CPU, {}), progress=lambda text: None, pin=False)


@pytest.fixture(scope="module")
def model(host):
    return host.build(torch.device("cpu"), torch.float32, None)


@pytest.fixture
def compared(monkeypatch):
    """Every (harness's, ours) that a run compares: all documents instead of the first few."""
    seen = []
    original = harness.compare

    def compare(sample, wrapper):
        for pair in original(sample, wrapper):
            seen.append(pair)
            yield pair

    monkeypatch.setattr(harness, "compare", compare)
    monkeypatch.setattr(harness, "CHECKED", 1000)
    return seen


@needs_harness
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("positions", "batch"), [(4096, 1), (24, 4)])
@pytest.mark.parametrize(("task", "requests"), [("story_end", 14), ("story_all", 3)])
def test_the_own_loop_agrees_with_the_harness(
    offline, tasks, host, model, compared, monkeypatch, task, requests, positions, batch
):
    """With few positions a page is scored in several windows, the last of which sees more text; never in a batch."""
    monkeypatch.setattr(model.config, "max_position_embeddings", positions)
    widths = set()
    counter = model.model.embed_tokens.register_forward_pre_hook(lambda _, ids: widths.add(len(ids[0])))
    outcome = harness.run(model, host.tokenizer, task, tasks, batch=batch)
    counter.remove()
    assert max(widths) == (batch if task == "story_end" else 1)
    assert len(compared) == requests
    assert [ours for _, ours in compared] == pytest.approx([theirs for theirs, _ in compared], abs=1e-4, rel=0)
    assert outcome.info["own_loop_difference"] <= 1e-4
    assert min(theirs for theirs, _ in compared) < -3  # they are log-likelihoods of something


@needs_harness
@pytest.mark.filterwarnings("default")
def test_a_run_has_the_harnesss_figures_and_leaves_the_model_alone(offline, tasks, host, model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, padding = torch.get_rng_state(), host.tokenizer.pad_token
    outcome = harness.run(model, host.tokenizer, "story_end", tasks)
    assert outcome.evaluation.docs == len(eval_tasks.QUESTIONS)
    accuracy, docs = outcome.evaluation.values["acc"], outcome.evaluation.docs
    assert 0 < accuracy <= 1
    spread = math.sqrt(accuracy * (1 - accuracy) / (docs - 1))
    assert outcome.evaluation.stderr["acc"] == pytest.approx(spread)
    assert outcome.info["harness"] == harness_version()
    assert (outcome.info["task_version"], outcome.info["fewshot"]) == (1.5, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert host.tokenizer.pad_token == padding
    assert "tie_weights" not in vars(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@needs_harness
@pytest.mark.filterwarnings("default")
def test_a_rolling_task_gives_perplexities_of_the_own_loops_sum(offline, tasks, host, model, compared):
    outcome = harness.run(model, host.tokenizer, "story_all", Tasks(tasks.names, tasks.folder, limit=2))
    assert outcome.evaluation.docs == 2
    pages = [json.loads(line)["page"] for line in (tasks.folder / "story_all.jsonl").read_text().splitlines()][:2]
    own = sum(ours for _, ours in compared)
    size = sum(len(page.encode()) for page in pages)
    assert outcome.evaluation.values["bits_per_byte"] == pytest.approx(-own / size / math.log(2), rel=1e-6)
    assert outcome.evaluation.stderr == {}


@needs_harness
@pytest.mark.filterwarnings("default")
def test_a_task_that_can_not_be_had_says_what_to_do(offline, tasks, host, model, tmp_path):
    missing = eval_tasks.write(tmp_path / "tasks", ("a",))
    (missing / "story_end.jsonl").unlink()
    with pytest.raises(LowbitError, match=r"--eval story_end: .*--eval-tasks FOLDER"):
        harness.run(model, host.tokenizer, "story_end", Tasks(("story_end",), missing))
    with pytest.raises(LowbitError, match="no tokenizer"):
        harness.run(model, None, "story_end", tasks)


@needs_harness
def test_pytest_benches_eval_on_this_cpu(tasks, tmp_path):
    """The command itself, in a process of its own and offline: quantized formats, record, table."""
    for name in ("benches", "conftest.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    words = ["--model", "embedded", "--eval", "story_end", "--eval-tasks", str(tasks.folder)]
    words += ["--eval-limit", "4", "-k", "eval and (bf16-torch or a16w8-torchao)"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "CI"))}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "benches", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (journal,) = (tmp_path / ".lowbit" / "runs").glob("*/journal.jsonl")
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    records = {row["record"]["format"]: row["record"] for row in rows if row["type"] == "case"}
    assert set(records) == {"bf16-torch", "a16w8-torchao"}
    for record in records.values():
        assert record["workload"] == record["info"]["eval"]["task"] == "story_end"
        assert {"eval_acc_story_end_4docs", "eval_acc_stderr_story_end_4docs"} <= set(record["metrics"])
        assert record["info"]["eval"]["harness"] == harness_version()
    assert records["a16w8-torchao"]["info"]["coverage"]["linears"] == 28  # quantized in place, not reloaded
    assert f"lm_eval {harness_version()}; ± one standard error" in result.stdout


# -- without it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "limit", "sizes"),
    [
        (3, 8, [(1, 3)]),
        (8, 8, [(1, 8)]),
        (20, 8, [(1, 8), (1, 8), (5, 4)]),  # the last one sees 8 positions: 5 of context, 4 scored but for one
        (17, 8, [(1, 8), (1, 8), (8, 1)]),
    ],
)
def test_windows_score_each_token_once(length, limit, sizes):
    found = list(loglikelihood.windows(list(range(1, length + 1)), 0, limit))
    assert [(len(context), len(scored)) for context, scored in found] == sizes
    assert [token for _, scored in found for token in scored] == list(range(1, length + 1))
    assert all(context[-1] == scored[0] - 1 for context, scored in found)
    assert all(len(context) + len(scored) - 1 <= limit for context, scored in found)


def test_figures_are_stored_with_task_and_count():
    made = Measurement(
        kind="eval", evaluation=Evaluation("winogrande", 1267, {"acc": 0.7, "acc_norm": 0.6}, {"acc": 0.013})
    )
    assert metrics.derive(made) == {
        "eval_acc_winogrande_1267docs": 0.7,
        "eval_acc_norm_winogrande_1267docs": 0.6,
        "eval_acc_stderr_winogrande_1267docs": 0.013,
    }
    for name, metric in {
        "eval_acc_winogrande_1267docs": "eval_acc",
        "eval_acc_norm_x_1docs": "eval_acc_norm",
        "eval_acc_stderr_x_1docs": "eval_acc_stderr",
        "eval_word_perplexity_wikitext_62docs": "eval_word_perplexity",
    }.items():
        assert metrics.find(name).name == metric
    assert metrics.stderr_of("eval_acc_norm_x_1docs") == "eval_acc_norm_stderr_x_1docs"
    assert metrics.stderr_of("eval_word_perplexity_wikitext_62docs") is None
    assert metrics.stderr_of("decode_tok_s") is None


@pytest.mark.parametrize(
    ("now", "stderr", "status"),
    [
        (0.690, 0.013, "ok"),  # within one standard error
        (0.686, 0.013, "regression"),
        (0.714, 0.013, "improvement"),
        (0.6985, 0.0001, "ok"),  # many documents: the floor of 0.002
        (0.6975, 0.0001, "regression"),
    ],
)
def test_an_accuracys_limit_is_a_standard_error(now, stderr, status):
    name, beside = "eval_acc_x_9docs", "eval_acc_stderr_x_9docs"
    values = {name: Values(0.7, [0.7]), beside: Values(stderr, [stderr])}
    row = Row("benches/test_eval.py::test_eval[f-x]", "eval", "f", None, "x", "bf16", values)
    record = Record(row.case, "eval", "f", None, "x", "m", "auto", metrics={name: now, beside: stderr})
    verdicts = {verdict.metric: verdict for verdict in judge(record, row, Spreads(), "cpu")}
    assert verdicts[name].status == status
    assert verdicts[beside].status == "ungated"


def test_evaluations_are_cases_of_every_format_of_the_suite(bench):
    bench.run("--eval", "winogrande,hellaswag", "-k", "eval").assert_outcomes(passed=4, deselected=10)
    names = [line["record"]["case"] for line in bench.journal() if line["type"] == "case"]
    assert "benches/test_eval.py::test_eval[a16w4_g128-torchao-winogrande]" in names
    assert len(names) == 4
    bench.run("--eval", "winogrande", "-k", "winogrande").assert_outcomes(passed=2, deselected=10)
    bench.run().assert_outcomes(passed=10)  # not asked for: no case, no skip
    assert len({case.id for case in evaluation_cases("full", ["a", "b"])}) % 2 == 0


def test_a_baseline_with_evaluations_judges_those_that_run(bench):
    bench.accept("--eval", "winogrande")
    assert len(bench.rows()) == 12
    bench.run("--benchmark-compare").assert_outcomes(passed=10)  # not asked for: not vanished
    bench.run("--benchmark-compare", "--eval", "winogrande").assert_outcomes(passed=12)
    unknown = bench.run("--benchmark-compare", "--eval", "hellaswag")
    unknown.assert_outcomes(passed=10, failed=2)
    assert "eval[bf16-torch-hellaswag] on fake-gpu: not in the baseline" in unknown.stdout.str()
    bench.accept()
    assert len(bench.rows()) == 12  # what was not measured stays accepted


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--eval", ","], "--eval: expected tasks"),
        (["--eval-limit", "3"], "--eval-limit: says how to evaluate, give --eval TASKS too"),
        (["--eval", "x", "--eval-limit", "0"], "expected at least 1, got 0"),
        (["--eval", "x", "--eval-tasks", "nowhere"], "no such folder: nowhere"),
        (["--eval", "x", "--profile"], "leave --eval out"),
    ],
)
def test_bad_options_are_usage_errors(bench, arguments, text):
    result = bench.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert text in result.stderr.str()


def test_without_the_harness_the_extra_is_named_before_anything_is_loaded(bench):
    bench.monkeypatch.setattr("lowbit.pytest_plugin.evaluation.harness_version", harness_version)
    bench.monkeypatch.setattr("lowbit.evaluation.PACKAGE", "no-such-harness")
    result = bench.run("--eval", "winogrande")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "pip install 'lowbit[eval]'" in result.stderr.str()


def test_dummy_weights_are_not_evaluated(bench):
    bench.monkeypatch.setattr("fakes.FAKE_CHOICE.load_format", "dummy")
    result = bench.run("--eval", "winogrande")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--eval needs real weights" in result.stderr.str()
