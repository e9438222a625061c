"""What ``auto`` stands for on one device and model: searched once, kept in a file, taken from there while it holds.

The file is a recipe for ``--recipe`` that says beside it how it was found. It holds as long as the question is the
same: device, model, limit, time, candidates, versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.auto.ask import RESERVE, Ask
from lowbit.auto.bench import LabBench, Workplace, has_mode
from lowbit.auto.search import Finalist, Outcome, Search
from lowbit.cases import Case
from lowbit.device import environment
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format, Unmet, auto, recipes
from lowbit.record import Record


@dataclass(frozen=True)
class Selection:
    """The row to take, the file that replays it, and the document in that file."""

    format: Format
    path: Path
    document: Mapping[str, Any]

    @property
    def sentence(self) -> str:
        """What was chosen, for the run's output."""
        found = self.document["found"]
        of, more = "", ""
        if found["kld_of"] is not None:
            of = f"of the {found['kld_of']} model "
            more = "; what it loses on a checkpoint is unknown: search again there"
        return (
            f"auto: {found['what']} ({found['mode']}, {found['step_ms']:.3f} ms per token, KL {found['kld']:.4g} {of}"
            f"on the calibration text, limit {found['kld_limit']:.4g} = {found['max_kld']:g} / {RESERVE:g} for other "
            f"texts; {found['against']}); again with --recipe {self.path}{more}"
        )

    def info(self) -> dict[str, Any]:
        """For a record: the choice and what it was measured against, without the tables of the search."""
        found = self.document["found"]
        told = ("what", "mode", "kld", "kld_of", "finalists")
        return {"recipe": str(self.path), **{name: found[name] for name in told}}


def select(lab: Workplace, ask: Ask) -> Selection:
    """The stored answer to this question, or a search for it; both are told to ``lab.progress``.

    Raises LowbitError for a file that is no recipe, and where nothing can be measured.
    """
    rows = [row for row in auto.candidates(FORMATS.values()) if lab.unmet(Case("quality", row)) is None]
    name = f"auto_{lab.device.slug}_{lab.choice.name}_{lab.choice.load_format}".replace("-", "_")
    path = ask.folder / f"{name}.json"
    asked = {
        "max_kld": ask.max_kld,
        "seconds": ask.seconds,
        "candidates": [row.id for row in rows],
        "environment": environment(lab.device),
    }
    document = _stored(path, asked)
    if document is None:
        document = {**_search(lab, ask, rows, name), "asked": asked}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    known = FORMATS.get(document.get("format", ""))
    selection = Selection(known or recipes.read(path, FORMATS), path, document)
    lab.progress(selection.sentence)
    return selection


def _stored(path: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LowbitError(f"{path} is no recipe of a search ({error}): delete it to search again") from error
    return document if isinstance(document, dict) and document.get("asked") == asked else None


def _search(lab: Workplace, ask: Ask, rows: list[Format], name: str) -> dict[str, Any]:
    lab.begin()
    bench = LabBench(lab)
    rows = sorted(rows, key=bench.rank)
    search = Search(bench, rows, FORMATS, max_kld=ask.kld_limit, seconds=ask.seconds, progress=lab.progress)
    try:
        return document_of(search.run(), name, ask, lab.quality_host.name if bench.stands_in else None)
    finally:
        bench.close()


def document_of(outcome: Outcome, name: str, ask: Ask, kld_of: str | None = None) -> dict[str, Any]:
    """The recipe file: ``parts`` and ``dtype`` of a mix, or the ``format``, and under ``found`` how it came to be.

    ``kld_of`` names the model whose KL it is, where that is not the model that was searched for.
    """
    best = outcome.best
    fmt = best.format
    chosen = {"parts": dict(fmt.parts), "dtype": fmt.dtypes[0]} if fmt.parts else {"format": fmt.id}
    what = fmt.note if fmt.parts else fmt.id
    return {
        "name": name,
        **chosen,
        "note": what,
        "found": {
            "what": what,
            "mode": best.mode,
            "kld": best.kld,
            "kld_of": kld_of,
            "max_kld": ask.max_kld,
            "kld_limit": ask.kld_limit,
            "step_ms": _ms(best.step_s),
            "against": _against(outcome),
            "finalists": [_row(one) for one in outcome.finalists],
            "options_kld_ms": {
                mode: {
                    group: {option.format: [option.kld, _ms(option.seconds)] for option in options}
                    for group, options in groups.items()
                }
                for mode, groups in outcome.options.items()
            },
            "left_out": outcome.left_out,
            "took_s": outcome.took_s,
        },
    }


def _row(one: Finalist) -> dict[str, Any]:
    return {
        "format": one.format.note if one.format.parts else one.format.id,
        "mode": one.mode,
        "kld": one.kld,
        "step_ms": _ms(one.step_s),
        "foreseen_products_ms": _ms(one.foreseen_s),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _against(outcome: Outcome) -> str:
    others = [one for one in outcome.finalists if one is not outcome.best and one.step_s is not None]
    if not others:
        return "nothing else was within the limit"
    second = min(others, key=lambda one: one.step_s or 0.0)
    name = "the mix" if second.format.parts else second.format.id
    return f"next {name}, {second.mode}, {_ms(second.step_s):.3f} ms"


class Chooser:
    """What the ``auto`` row stands for in a Lab: nothing until it is asked for, then one answer for good."""

    def __init__(self, lab: Workplace, ask: Ask | None = None) -> None:
        self.lab, self.ask = lab, ask
        self._selection: Selection | None = None

    def selection(self) -> Selection:
        """The answer; a search at the first call. Raises LowbitError where none was asked for."""
        if self._selection is None:
            if self.ask is None:
                raise LowbitError(
                    "an auto row stands for what a search finds, and none was asked for: set Lab.auto.ask"
                )
            self._selection = select(self.lab, self.ask)
        return self._selection

    def stands_for(self, case: Case) -> Case:
        """The case with the chosen row in an ``auto`` row's place; any other case itself."""
        return replace(case, format=self.selection().format) if case.format.scheme == auto.SCHEME else case

    def unmet(self, case: Case) -> Unmet | None:
        """Why an ``auto`` case has no choice here, or not under its mode; None for any other case."""
        if case.format.scheme != auto.SCHEME:
            return None
        if self.ask is None:
            return Unmet("capability", "needs a search, for which this session has no limit")
        chosen = self.selection().format
        if case.mode is None or has_mode(chosen, case.mode):
            return None
        return Unmet("capability", f"{chosen.id}, which auto chose here, is not measured under {case.mode}")

    def note(self, case: Case, record: Record) -> None:
        """Put the choice into an ``auto`` case's record."""
        if case.format.scheme == auto.SCHEME:
            record.info |= {"auto": self.selection().info(), "notes": [self.selection().sentence]}
