"""lm-evaluation-harness: accuracies and perplexities of its tasks."""

from __future__ import annotations

from lowbit.metrics.measurement import Measurement
from lowbit.metrics.row import Limit, metric

EVALUATED = ("word_perplexity", "byte_perplexity", "bits_per_byte", "acc", "acc_norm")
"""What is kept of the harness's figures, by its own names; stored as eval_<name>_<task>_<n>docs."""

OF_ACCURACY = Limit(absolute=0.002, stderrs=1.0)


def _evaluated(m: Measurement, name: str) -> float | None:
    return m.evaluation.values.get(name) if m.evaluation else None


@metric("", "lower", Limit(relative=0.001), ("eval",))
def eval_word_perplexity(m: Measurement) -> float | None:
    """The harness's perplexity per word of the original text."""
    return _evaluated(m, "word_perplexity")


@metric("", "lower", kinds=("eval",))
def eval_byte_perplexity(m: Measurement) -> float | None:
    """The harness's perplexity per byte."""
    return _evaluated(m, "byte_perplexity")


@metric("bit", "lower", kinds=("eval",))
def eval_bits_per_byte(m: Measurement) -> float | None:
    """log2 of the perplexity per byte."""
    return _evaluated(m, "bits_per_byte")


@metric("share", "higher", OF_ACCURACY, ("eval",))
def eval_acc(m: Measurement) -> float | None:
    """Share of questions where the likeliest answer is the right one."""
    return _evaluated(m, "acc")


@metric("share", "higher", OF_ACCURACY, ("eval",))
def eval_acc_norm(m: Measurement) -> float | None:
    """The same, log-likelihoods divided by the answers' lengths."""
    return _evaluated(m, "acc_norm")


@metric("share", "neither", kinds=("eval",))
def eval_acc_stderr(m: Measurement) -> float | None:
    """Standard error of eval_acc over the questions, by the harness."""
    return m.evaluation.stderr.get("acc") if m.evaluation else None


@metric("share", "neither", kinds=("eval",))
def eval_acc_norm_stderr(m: Measurement) -> float | None:
    """Standard error of eval_acc_norm."""
    return m.evaluation.stderr.get("acc_norm") if m.evaluation else None
