"""The documentation site: it is built without a warning, every public name has its place, no link on it is dead."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import unperturb

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a page in no menu, a broken link or anchor, or an unknown name is an error."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="needs the extra `docs`")
    place = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    said = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=False
    )
    assert said.returncode == 0, said.stderr
    return place


class Leads(HTMLParser):
    """What a page links to, what it loads, and the places on it that a link may name."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = dict(attrs)
        self.ids |= {has.get("id") or "", has.get("name") or ""}
        if tag == "a" and has.get("href"):
            self.links.append(str(has["href"]))
        if tag in ("img", "script") and has.get("src"):
            self.loads.append(str(has["src"]))
        if tag == "link" and has.get("rel") in ("stylesheet", "icon"):
            self.loads.append(str(has["href"]))


def test_every_page_of_the_repository_is_on_it(site: Path) -> None:
    sources = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("zoo/*/README.md"),
        ROOT / "results/README.md",
    ]
    assert len(sources) > 150
    for source in sources:
        name = source.relative_to(ROOT).with_suffix(".html")
        page = site / (name.with_name("index.html") if source.stem == "README" else name)
        assert page.exists(), source


def test_whatever_a_page_links_to_or_shows_is_there(site: Path) -> None:
    pages = {page: Leads(page) for page in site.rglob("*.html") if page.name != "404.html"}
    pictures = 0
    for page, leads in pages.items():
        assert [load for load in leads.loads if urlsplit(load).scheme] == [], f"{page} asks another server"
        for link in leads.links + leads.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)} leads to {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{page.relative_to(site)} leads to {link}"
            pictures += link.endswith((".png", ".svg")) and "results" in target.parts
    assert pictures > 10


def test_every_public_name_has_its_place(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    named = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    assert {f"unperturb.{name}" for name in unperturb.__all__ if not name.startswith("_")} - named == set()


def test_the_pictures_of_knowledge_are_those_that_the_command_draws() -> None:
    folder = ROOT / "docs" / "concepts"
    drawn = runpy.run_path(str(folder / "draw.py"))["pictures"]()
    assert sorted(drawn) == sorted(path.name for path in folder.glob("*.svg"))
    for name, svg in drawn.items():
        assert (folder / name).read_text(encoding="utf-8") == svg, "run python docs/concepts/draw.py"
        assert f"(concepts/{name})" in (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
