"""The log in `docs/log`: an entry has its four parts and short lines, and the index names every entry, newest first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "docs" / "log"
INDEX = (LOG / "README.md").read_text(encoding="utf-8")
ENTRIES = sorted(path for path in LOG.iterdir() if path.name != "README.md")
PARTS = ["Question", "Change", "Result", "Verdict"]
# What may speak of an entry by its path: pages, and the comments of recipes, benchmarks and sources.
PAGES = [
    path
    for folder, names in {
        ".": "*.md",
        "docs": "**/*.md",
        "zoo": "*/*.md",
        "results": "*.md",
        "src": "**/*.toml",
        "benchmarks": "*.py",
    }.items()
    for path in sorted((ROOT / folder).glob(names))
]


def title(path: Path) -> tuple[str, str]:
    """Topic and verdict: the first line of an entry is `# TOPIC: VERDICT`."""
    topic, _, verdict = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").partition(": ")
    return topic, verdict


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_an_entry_has_its_parts_and_short_lines(path: Path) -> None:
    assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d-[a-z0-9_]+(-[a-z0-9_]+)*\.md", path.name), "DATE-topic.md"
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    assert all(title(path)), "# TOPIC: VERDICT"
    assert re.findall(r"^- \*\*(\w+)\.\*\* \S", text, flags=re.M) == PARTS
    head = text.partition("\n## ")[0].splitlines()
    assert len(head) <= 15, "what is longer stands under Details"
    assert re.findall(r"^#+ .*", text, flags=re.M)[1:] in ([], ["## Details"])
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 120] == []


def test_the_index_names_every_entry_newest_first() -> None:
    rows = [line for line in INDEX.splitlines() if line.startswith("| 20")]
    said = {}
    for row in rows:
        date, topic, verdict, link = row.strip("| ").split(" | ")
        name = link.rpartition("(")[2].rstrip(")")
        assert link == f"[{name[11:-3]}]({name})"
        assert name.startswith(date)
        said[name] = (topic, verdict)
    assert said == {path.name: title(path) for path in ENTRIES}
    assert len(rows) == len(ENTRIES)
    dates = [row[2:12] for row in rows]
    assert dates == sorted(dates, reverse=True)


def test_a_failure_is_marked_in_the_title() -> None:
    marked = [path for path in ENTRIES if title(path)[1].endswith("(negative)")]
    assert 5 < len(marked) < len(ENTRIES)
    for path in ENTRIES:
        assert ("(negative)" in path.read_text(encoding="utf-8")) == (path in marked), path.name


def test_every_entry_that_a_page_speaks_of_is_there() -> None:
    named = {}
    for page in PAGES:
        for name in re.findall(r"log/([\w.-]+\.md)", page.read_text(encoding="utf-8")):
            named.setdefault(name, page)
    for entry in ENTRIES:
        for name in re.findall(r"\]\((20[\w.-]+\.md)\)", entry.read_text(encoding="utf-8")):
            named.setdefault(name, entry)
    assert len(named) > 10
    assert {name: str(page) for name, page in named.items() if not (LOG / name).exists()} == {}
