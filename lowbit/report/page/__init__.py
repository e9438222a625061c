"""The HTML report: one file with everything in it, that asks no network for anything.

``render`` fills ``page.html`` with the style, ECharts, our scripts, the data and what is told without a script: the
verdict and the environment. A content security policy by hash lets these scripts run and nothing else: neither a
script nor a handler that came in by a name or a message, nor any request.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from lowbit import __version__
from lowbit.report.content import Content
from lowbit.report.page import markup, verdict
from lowbit.report.page.data import to_json

LIMIT_BYTES = 3_000_000

SCRIPTS = ("core", "table", "charts", "pareto", "roofline", "history", "main")
"""Of ``js/``, in the order in which they are joined to one script."""

LIBRARY = "vendor/echarts.common.min.js"


def render(content: Content) -> str:
    """The whole page as text. Everything of ``content`` in it is escaped for where it stands."""
    scripts = [_asset(LIBRARY), own_script()]
    parts = {
        "version": markup.escape(__version__),
        "hashes": " ".join(f"'sha256-{_hash(script)}'" for script in scripts),
        "title": markup.escape(markup.title(content)),
        "style": _asset("style.css"),
        "subject": markup.escape(markup.subject(content)),
        "facts": markup.facts(content),
        "state": markup.state(content),
        "verdict": verdict.verdict(content),
        "environment": markup.environment(content),
        "footer": markup.footer(),
        "data": to_json(content),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    # One pass: what is put in is never looked at again, so that a case named {{data}} stays a name.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def own_script() -> str:
    """Our scripts as one, in a scope of its own."""
    joined = "\n".join(_asset(f"js/{name}.js") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{joined}}})();'


@cache
def _asset(name: str) -> str:
    """A file of this package, as text with \\n alone: the hashes are over what a browser sees."""
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
