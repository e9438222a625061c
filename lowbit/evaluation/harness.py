"""Runs tasks of lm-evaluation-harness on a model that is already on the device, quantized, and reads its results.

The harness wraps the very model object that was measured: nothing is reloaded, and what its wrapper would do to the
weights (tie them again) is kept from it. Written against lm_eval 0.4.13: evaluator.simple_evaluate, models.huggingface.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.evaluation import Tasks, harness_version, loglikelihood
from lowbit.metrics import EVALUATED, Evaluation

CHECKED = 4
"""Questions of a task whose log-likelihood is computed once more, by lowbit's own loop."""


@dataclass(frozen=True)
class Outcome:
    """A task's figures, and for the record's info what they were made with."""

    evaluation: Evaluation
    info: dict[str, Any]


def run(model: Any, tokenizer: Any, task: str, tasks: Tasks, *, batch: int = 1) -> Outcome:
    """Run one task on ``model``, a LlamaForCausalLM of any format: ``batch`` answers at a time, long texts one by one.

    Raises LowbitError without the harness, without a tokenizer, for an unknown task, for one whose data can't be had,
    and for one with none of the metrics that lowbit stores.
    """
    version = harness_version()
    if tokenizer is None or (tokenizer.bos_token_id is None and tokenizer.eos_token_id is None):
        raise LowbitError(
            "--eval needs the model's tokenizer with its beginning or end of text: expected tokenizer.json and "
            f"tokenizer_config.json, got {'no tokenizer' if tokenizer is None else 'one that names neither'}"
        )
    with _quiet():
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        wrapper = _wrap(HFLM, model, copy.deepcopy(tokenizer), batch)  # it may get a padding token
        manager = _manager(task, tasks.folder)
        try:
            results = lm_eval.simple_evaluate(
                model=wrapper,
                tasks=[task],
                task_manager=manager,
                limit=tasks.limit,
                log_samples=True,
                # No seeds: the process's generators stay as they are. The tasks are scored, nothing is sampled.
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        except (OSError, ConnectionError, ValueError) as error:
            raise LowbitError(
                f"--eval {task}: {type(error).__name__}: {error}; where there is no network, put the task's YAML and "
                "data into a folder and give --eval-tasks FOLDER (docs/evaluation.md)"
            ) from error
    return _read(results, task, version, wrapper)


def _wrap(wrapper: Any, model: Any, tokenizer: Any, batch: int) -> Any:
    class OneTextAtATime(wrapper):  # type: ignore[misc]
        """A window is as long as the model's positions, 131,072 of Llama-3.1: a batch of them would not fit a card."""

        batch_size_per_gpu: int

        def loglikelihood_rolling(self, *arguments: Any, **settings: Any) -> Any:
            former, self.batch_size_per_gpu = self.batch_size_per_gpu, 1
            try:
                return super().loglikelihood_rolling(*arguments, **settings)
            finally:
                self.batch_size_per_gpu = former

    vars(model)["tie_weights"] = lambda *_, **__: None  # a quantized head would be replaced by the embedding
    try:
        return OneTextAtATime(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, softmax_dtype="float32"
        )
    finally:
        del vars(model)["tie_weights"]


@functools.cache
def _load_tasks(folder: Path | None) -> Any:
    """The harness's index of its tasks, with those of ``folder``: 10 s for its 14,000 YAML files, once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder))


def _manager(task: str, folder: Path | None) -> Any:
    """Where the task is found: in ``folder`` alone if it is there, which spares the harness's own index."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        local = TaskManager(include_path=str(folder), include_defaults=False)
        if task in local.all_tasks:
            return local
    manager = _load_tasks(folder)
    known = manager.all_tasks
    if task not in known:
        near = [name for name in known if task in name or name in task][:10]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise LowbitError(f"--eval: the harness knows no task {task!r} (it knows {len(known)}){hint}")
    return manager


def _read(results: Any, task: str, version: str, wrapper: Any) -> Outcome:
    rows = results["results"].get(task, {})
    found = {name.partition(",")[0]: value for name, value in rows.items() if isinstance(value, int | float)}
    values = {name: float(found[name]) for name in EVALUATED if name in found}
    if not values:
        raise LowbitError(
            f"--eval {task}: expected one of {', '.join(EVALUATED)}, got {', '.join(found) or 'a group of tasks'}; "
            "name its single tasks"
        )
    stderr = {name: float(found[f"{name}_stderr"]) for name in values if f"{name}_stderr" in found}
    samples = results["samples"][task]
    docs = int(results["n-samples"][task]["effective"])
    config = results["configs"][task]
    info = {
        "harness": version,
        "task": task,
        "task_version": results["versions"].get(task),
        "docs": docs,
        "fewshot": config.get("num_fewshot") or 0,
        "dataset": "/".join(str(part) for part in (config.get("dataset_path"), config.get("dataset_name")) if part),
        "values": values,
        "stderr": stderr,
        "own_loop_difference": _check(samples[:CHECKED], wrapper),
    }
    return Outcome(Evaluation(task, docs, values, stderr), info)


def _check(samples: list[Any], wrapper: Any) -> float | None:
    """The largest difference, in nats, between the harness's log-likelihoods and the own loop's; None for none."""
    pairs = [pair for sample in samples for pair in compare(sample, wrapper)]
    return max((abs(theirs - ours) for theirs, ours in pairs), default=None)


def compare(sample: Any, wrapper: Any) -> Iterator[tuple[float, float]]:
    """(the harness's, ours) for each request of one logged sample."""
    model, limit = wrapper.model, wrapper.max_length
    requests = sample["arguments"].values() if isinstance(sample["arguments"], dict) else sample["arguments"]
    for request, responses in zip(requests, sample["resps"], strict=True):
        words = list(request.values()) if isinstance(request, dict) else list(request)
        theirs = responses[0] if isinstance(responses[0], list | tuple) else responses
        if len(words) == 1:
            tokens = wrapper.tok_encode(words[0])
            yield float(theirs[0]), loglikelihood.rolling(model, tokens, wrapper.prefix_token_id, limit)
        elif words[0]:
            context, tokens = wrapper._encode_pair(*words)
            yield float(theirs[0]), loglikelihood.continuation(model, context, tokens, limit)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness's log lines, progress bars and warnings are not a bench's."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
