"""Quality from other runs, of formats that a run timed and did not score: with dummy weights, the embedded model's.

A KL on the embedded model is a figure of the format, not of the card: a run or a baseline of speed cases alone may
stand beside scores that were taken elsewhere, by the same protocol. They are shown with their source, and never judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lowbit.errors import LowbitError, tell_left_out
from lowbit.report import figures
from lowbit.report.content import Content
from lowbit.report.figures import EMBEDDED, Source
from lowbit.report.rows import join


def with_quality(content: Content, paths: Sequence[Path]) -> Content:
    """``content`` with the scores that runs under ``paths`` have of formats that it timed and has no KL of; of several
    the latest. Raises LowbitError where none of them fits: another model, another protocol, or no such format."""
    sources = [source for source in figures.read(paths, tell_left_out) if _fits(content, source)]
    wanted = {row.format for row in join(content.records) if row.speed and row.kld is None}
    scores = {
        record.format: replace(record, load_format=content.header.load_format)
        for source in sorted(sources, key=lambda source: source.header.started)
        for record in source.records
        if record.kind == "quality" and record.outcome == "measured" and record.format in wanted
    }
    if not scores:
        model = EMBEDDED if content.header.load_format == "dummy" else content.header.model
        raise LowbitError(
            f"--quality {' '.join(map(str, paths))}: expected test_quality of {model} by protocol "
            f"{content.header.protocol}, of {', '.join(sorted(wanted)) or 'a format without a KL, which no row is'}; "
            "found none"
        )
    names = ", ".join(map(str, paths))
    return replace(content, scores=list(scores.values()), scored_by=names)


def _fits(content: Content, source: Source) -> bool:
    """Whether its quality is of the same model and protocol: of dummy weights the embedded model's."""
    here, there = content.header, source.header
    if there.protocol != here.protocol:
        return False
    if here.load_format == "dummy":
        return there.load_format == "dummy" or there.model == EMBEDDED
    return (there.model, there.load_format) == (here.model, here.load_format)
