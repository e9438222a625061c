"""Tasks of lm-evaluation-harness on local data, as a user without a network would write them: YAML beside JSONL."""

from __future__ import annotations

import json
import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
CHOICE = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
"""What the page shows is what runs."""

ROLLING = """
task: story_all
dataset_path: json
dataset_kwargs:
  data_files:
    test: /data/story_all.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 2.0
"""

QUESTIONS = (
    {"context": "Once upon a", "choices": [" time", " stone lamp"], "label": 0},
    {"context": "The girl was very", "choices": [" happy", " the", " upon a hill"], "label": 0},
    {"context": "They walked to the", "choices": [" of", " river", " and the"], "label": 1},
    {"context": "He said, \"I am", "choices": [" sorry", " table"], "label": 0},
    {"context": "In the morning", "choices": [" she went out", " sky sky sky"], "label": 0},
    {"context": "The cat and the", "choices": [" dog", " was"], "label": 0},
)  # fmt: skip


def write(folder: Path, pages: tuple[str, ...]) -> Path:
    """Both tasks and their data in ``folder``."""
    folder.mkdir(exist_ok=True)
    for name, text, rows in (
        ("story_end", CHOICE, QUESTIONS),
        ("story_all", ROLLING, [{"page": page} for page in pages]),
    ):
        (folder / f"{name}.yaml").write_text(text.replace("/data/", f"{folder}/"))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
