"""The site is the repository's own tree: a page lies where its file lies, so that every link is right in both.

MkDocs takes pages from one folder. This hook gives it those of the whole repository, writes a page for each folder of
results and examples, and fills in patterns such as `docs/flags/*.md` in the navigation of mkdocs.yml.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["*.md", "docs/**/*.md", "results/README.md", "zoo/**/README.md"]
# What pages show, and the files that they name.
SHOWN = ["docs/**/*.png", "docs/**/*.svg", "docs/**/*.css", "results/**/*.*", "examples/*.py", "LICENSE"]
FOLDERS = ["examples", "results/*/"]  # each gets a page of all that is in it
UNLISTED = ("zoo/", "results/", "docs/log/")  # in no menu, but in an index that a test holds complete
LINK = re.compile(r"\]\(([^)#\s:]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All pages of the repository, and what they show."""
    kept = [file for file in files if file.src_dir is None or Path(file.src_dir) != Path(config.docs_dir)]
    found = dict.fromkeys(path for pattern in PAGES + SHOWN for path in sorted(ROOT.glob(pattern)) if path.is_file())
    for path in found:
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".md" and path.parent.name == "tables":
            continue  # they are part of their folder's page
        kept.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for folder in (path for pattern in FOLDERS for path in sorted(ROOT.glob(pattern))):
        name = f"{folder.relative_to(ROOT).as_posix()}/README.md"
        kept.append(File.generated(config, name, content=folder_page(folder)))
    made = Files(kept)
    pages = [file.src_uri for file in made.documentation_pages()]
    config.nav = filled(config.nav, pages)
    placed = set(leaves(config.nav))
    for file in made.documentation_pages():
        if file.src_uri not in placed and file.src_uri.startswith(UNLISTED):
            file.inclusion = InclusionLevel.NOT_IN_NAV
    return made


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a folder, or to a table in it, becomes one to the page that shows the folder."""
    here = posixpath.dirname(page.file.src_uri)

    def to_folder(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, match[1]))
        if files.get_file_from_path(path) is not None or not (ROOT / path).exists():
            return match[0]
        while path and files.get_file_from_path(f"{path}/README.md") is None:
            path = posixpath.dirname(path)
        return f"]({posixpath.relpath(f'{path}/README.md', here)})" if path else match[0]

    return LINK.sub(to_folder, markdown)


def folder_page(folder: Path) -> str:
    """Markdown that shows all files of a folder: pictures, tables, code; a link to each of the others."""
    shown, listed = [], []
    files = sorted(
        folder.rglob("*.*"), key=lambda path: (len(path.parts), path)
    )  # its own before those of folders in it
    for path in filter(Path.is_file, files):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".png":
            shown.append(f"![{path.stem}]({name})")
        elif path.suffix == ".md":
            shown.append(f"## {name.removesuffix('.md')}\n\n" + path.read_text(encoding="utf-8"))
        elif path.suffix == ".py":
            shown.append(f"## {name}\n\n```python\n{path.read_text(encoding='utf-8')}```")
        else:
            listed.append(f"- [{name}]({name})")
    shown.sort(key=lambda part: not part.startswith("!["))  # pictures first
    others = ["## Files", "\n".join(listed)] if listed else []
    return "\n\n".join([f"# {folder.name}", *shown, *others]) + "\n"


def leaves(nav: Any) -> list[str]:
    """The paths that a navigation names, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [path for item in (nav.values() if isinstance(nav, dict) else nav) for path in leaves(item)]


def filled(nav: Any, pages: list[str]) -> Any:
    """A navigation with each pattern replaced by the pages that match it and that it names nowhere else."""
    named = set(leaves(nav))

    def fill(item: Any) -> Any:
        if isinstance(item, dict):
            return {title: fill(value) for title, value in item.items()}
        if isinstance(item, list):
            return [page for part in item for page in (matching(part) if "*" in part else [fill(part)])]
        return item

    def matching(pattern: str) -> list[str]:
        shape = re.compile(re.escape(pattern).replace(r"\*", "[^/]*"))
        return sorted(page for page in pages if shape.fullmatch(page) and page not in named)

    return fill(nav)
