"""docs/example-report.html: built by the command in docs/report.md, and of the page's present structure.

Not compared byte for byte, nor by its figures: accepting a baseline patch must not make a test of the page fail.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser as browsers
import pytest

from lowbit import __main__
from lowbit.report import page

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "example-report.html"


class Structure(HTMLParser):
    """The ids of its elements and, for each script, a hash; the data apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.data: dict[str, Any] = {}
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes).get("id")
        self.ids += [named] if named else []
        self._script = (named or "") if tag == "script" else None

    def handle_data(self, text: str) -> None:
        if self._script == "data":
            self.data = json.loads(text)
        elif self._script is not None:
            self.scripts.append(hashlib.sha256(text.encode()).hexdigest())
        self._script = None


def command() -> list[str]:
    (line,) = re.findall(r"^    python -m lowbit (report .*-o docs/example-report\.html)$", _documented(), re.M)
    return shlex.split(line)


def _documented() -> str:
    return (ROOT / "docs" / "report.md").read_text()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Structure:
    out = tmp_path_factory.mktemp("example") / "report.html"
    words = command()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert __main__.main([*words[:-1], str(out), "--history", str(out.parent)]) == 0
    return Structure(out.read_text())


def test_the_committed_example_has_the_pages_present_structure(fresh: Structure) -> None:
    held = Structure(EXAMPLE.read_text())
    how = f"made of another version of the page; make it anew: python -m lowbit {shlex.join(command())}"
    assert held.ids == fresh.ids, how
    assert held.data.keys() == fresh.data.keys(), how
    assert held.data["cases"].keys() == fresh.data["cases"].keys(), how
    assert held.scripts[0] == fresh.scripts[0], how  # the plot library
    assert len(held.scripts) == len(fresh.scripts), how
    assert held.data["command"] == fresh.data["command"]
    assert set(held.data["cases"]["id"]) & set(fresh.data["cases"]["id"])


def test_it_is_one_small_file_that_the_readme_links() -> None:
    assert EXAMPLE.stat().st_size < page.LIMIT_BYTES
    assert "(docs/example-report.html)" in (ROOT / "README.md").read_text()
    assert str(ROOT) not in EXAMPLE.read_text()


def test_it_opens_quietly_with_every_plot() -> None:
    with browsers.launch() as chromium, browsers.opened(chromium, EXAMPLE) as found:
        for plot in ("plot-quality", "plot-memory", "plot-roofline", "plot-time"):
            assert found.page.locator(f"#{plot} svg path").count() > 10
        assert found.page.locator("#pareto-workload").input_value() == "short context"
        assert "scored in docs/runs/cpu-embedded.json" in found.text("#pareto")
        assert found.page.locator("#table tbody tr").count() == len(Structure(EXAMPLE.read_text()).data["cases"]["id"])
        assert found.requests == [EXAMPLE.as_uri()]
        assert found.messages == []
