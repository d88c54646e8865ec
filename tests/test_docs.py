"""What is written is so: each recipe is named, each command of the README parses, each file of the tree is there."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from unperturb import cli
from unperturb.config import read_recipe, recipe_names

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every `unperturb ...` line in the README's code blocks."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", README, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip().startswith("unperturb ")]


@pytest.mark.parametrize("line", commands())
def test_each_command_of_the_readme_parses(line: str) -> None:
    _, verb, *arguments = shlex.split(line)
    command = get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
    context = command.make_context(verb, list(arguments))
    recipe = context.params.get("recipe")
    if recipe:
        read_recipe(recipe, context.params.get("overrides") or [])


def test_the_readme_shows_every_verb() -> None:
    assert commands()
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")  # type: ignore[union-attr]
        assert f"`{name}`" in README or f"unperturb {name}" in README, name


def test_the_readme_tree_names_every_room() -> None:
    for path in (ROOT / "src" / "unperturb").iterdir():
        if not path.name.startswith(("__pycache__", "py.typed")):
            assert path.name in README, path.name


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_loads_and_overrides(name: str) -> None:
    recipe = read_recipe(name)
    again = read_recipe(name, ["seed=5"]) if hasattr(recipe, "seed") else recipe
    assert again == recipe or again.seed == 5


@pytest.mark.parametrize("page", ["README.md", "docs/table2.md"])
def test_the_tables_on_a_page_are_those_of_the_results(page: str) -> None:
    filled = runpy.run_path(str(ROOT / "benchmarks" / "table2.py"))["filled"]
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert filled(text) == text, "run python benchmarks/table2.py"
