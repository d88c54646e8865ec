"""What is written is so: each line of the README and of the pages on use and on benchmarks runs, each recipe says what
it is, each file of the tree is there, each table is that of what it speaks of."""

from __future__ import annotations

import functools
import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from unperturb import cli
from unperturb.available import describe, recipes_page, to_toml
from unperturb.classifiers import load_classifier
from unperturb.config import resolve
from unperturb.defenses import defenses, load_defense
from unperturb.devices import Speed
from unperturb.recipe_files import read_recipe, recipe_names
from unperturb.training.profiling import flop_per_image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
BENCHMARK = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
CERTIFY = (ROOT / "docs" / "certify.md").read_text(encoding="utf-8")
# Pages whose code stands by itself: nothing is trained, and what takes long is asked for by these words.
ALONE = ["docs/quickstart.md", "docs/concepts.md", "docs/faq.md", "docs/api/README.md"]
SHORT = {
    'load_dataset("mnist")': 'load_dataset("digits")',
    "steps=40": "steps=2",
    "steps=100": "steps=2",
    "n=200": "n=2",
}


def blocks(language: str, text: str) -> list[str]:
    """The code blocks in `language`."""
    return re.findall(rf"```(?:{language})\n(.*?)```", text, flags=re.S)


def commands() -> list[str]:
    """Every `unperturb ...` line in the code blocks."""
    pages = [README, USAGE, BENCHMARK, CERTIFY, *((ROOT / page).read_text(encoding="utf-8") for page in ALONE)]
    text = "\n".join(blocks("bash|sh|console", "".join(pages)))
    lines = text.replace("\\\n", " ").splitlines()
    found = [line.split("  #")[0].strip() for line in lines if line.strip().startswith("unperturb ")]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone as far as a command sees it: examples and zoo, and nothing trained."""
    place = tmp_path_factory.mktemp("clone")
    (place / "examples").symlink_to(ROOT / "examples")
    (place / "zoo").symlink_to(ROOT / "zoo")
    return place


@pytest.fixture
def clone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; how quick this machine is, and what a step costs, is looked at briefly."""
    speed = Speed({("float32", "contiguous"): 10.0})
    for module in ("training.jobs", "training.loop", "evaluation.costs", "attack_folder"):
        monkeypatch.setattr(f"unperturb.{module}.probe", functools.cache(lambda *_: speed))
    for module in ("training.jobs", "training.loop"):
        monkeypatch.setattr(f"unperturb.{module}.flop_per_image", functools.partial(flop_per_image, steps=1, batch=2))
    monkeypatch.chdir(folder)
    return folder


DIGITS = ["--set", "dataset=digits"]  # as large and as grey as MNIST, and here without a network
TRAINING = ["training.batch=2", "training.precision=float32", "training.memory_format=contiguous"]
# Evaluations that need what the lines before them have trained look at the zoo's instead.
ZOO = [
    'classifiers=["zoo:mnist-lenet5"]',
    'systems=["undefended", "zoo:protect-mnist"]',
    'surrogate="zoo:mnist-convnet"',
    "samples=0",
]


def small(line: str) -> list[str]:
    """The words of a line, and what makes it quick: digits for MNIST, two images, dry runs for trainings and
    benchmarks."""
    _, verb, *words = shlex.split(line)
    if verb == "prepare":
        words[0] = "digits"
    if verb == "demo":
        words += ["--help"]  # its words are read; it would take minutes
    if verb in ("train", "train-classifier"):
        keys = [*TRAINING, *(['adversarial_batches.attacks=[{ name = "fgsm", eps = 0.3 }]'] if verb == "train" else [])]
        words += DIGITS + [word for key in keys for word in ("--set", key)] + ["--threads", "1", "--dry-run"]
    if verb == "evaluate":
        # On MNIST a table leaves "-mnist" out of the names.
        words = [f"{w}-mnist" if before == "--system" else w for before, w in zip(["", *words], words)]
        words += [*DIGITS, "--n", "2", "--threads", "1"]
        words += [] if "--attack" in words else ["--attack", "fgsm", "--out", f"runs/{words[0]}"]
        words += [word for key in ZOO if not words[0].startswith("zoo-") for word in ("--set", key)]
    if verb == "export":
        words += ["--data", "digits", "--n", "2", "--threads", "1"]
    if verb in ("serve", "app"):
        words += ["--help"]  # its words are read; it would not end
    if verb in ("attack", "benchmark"):
        words += ["--data", "digits", "--n", "2", "--threads", "1", *(["--dry-run"] if verb == "benchmark" else [])]
    if verb == "certify":
        words += ["--data", "digits", "--n", "2", "--draws", "5", "--threads", "1"]
    if verb == "compare":
        words = ["runs/zoo-mnist", "runs/zoo-mnist"]  # what it names is a run of another name here, or a dry one
    return [verb, *words]


@pytest.mark.parametrize("line", commands())
@pytest.mark.usefixtures("clone")
def test_each_command_of_the_readme_runs(line: str) -> None:
    words = small(line)
    for run in words if words[0] in ("report", "compare") else ():
        if run.startswith("runs/") and not Path(run).exists():
            CliRunner().invoke(cli.app, small(f"unperturb evaluate {Path(run).name}"))
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    if " evaluate " in line or "--dry-run" in words:
        assert "clean" in done.output or "PFLOP" in done.output


def test_the_python_of_the_readme_runs(clone: Path) -> None:
    code = "".join(blocks("python", README + USAGE))
    tiny = '["training.epochs=0.001", "training.memory_format=contiguous", "training.batch=2"]'
    changes = {
        'load_dataset("mnist")': 'load_dataset("digits", val=8)',
        "steps=40": "steps=2",
        "n=200": "n=2",
        "own, data,": f"own, data, overrides={tiny},",
    }
    for whole, part in changes.items():
        assert whole in code
        code = code.replace(whole, part)
    known: dict[str, Any] = {}
    exec(code, known)
    images = known["images"]
    assert torch.equal(known["again"].purify(images), known["purifier"].purify(images))
    assert (clone / "report" / "first-look" / "report.html").exists()


@pytest.mark.usefixtures("clone")
def test_the_python_of_the_page_on_benchmarks_runs() -> None:
    for library in ("foolbox", "torchattacks"):
        pytest.importorskip(library)
    code = "".join(blocks("python", BENCHMARK))
    for whole, part in {'load_dataset("mnist")': 'load_dataset("digits")', "n=200": "n=2"}.items():
        assert whole in code
        code = code.replace(whole, part)
    known: dict[str, Any] = {}
    exec(code, known)
    assert 0 <= known["found"].robust.accuracy <= known["found"].clean <= 1
    assert set(known["rows"]["attack"]) == {"torchattacks", "foolbox"}
    assert Path("report/finetune-quick/card.html").exists()


@pytest.mark.usefixtures("clone")
def test_the_python_of_the_page_on_certificates_runs() -> None:
    code = "".join(blocks("python", CERTIFY))
    for whole, part in {
        'load_dataset("mnist")': 'load_dataset("digits")',
        "n=100": "n=2",
        "draws=1000": "draws=9",
    }.items():
        assert whole in code
        code = code.replace(whole, part)
    exec(code, {})
    assert Path("report/certify/certificates.md").exists()


@pytest.mark.parametrize("page", [page for page in ALONE if "```python" in (ROOT / page).read_text(encoding="utf-8")])
@pytest.mark.usefixtures("clone")
def test_the_python_of_a_page_runs_by_itself(page: str) -> None:
    code = "".join(blocks("python", (ROOT / page).read_text(encoding="utf-8")))
    for whole, part in SHORT.items():
        code = code.replace(whole, part)
    exec(code, {})


def test_the_readme_shows_every_verb() -> None:
    assert commands()
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")  # type: ignore[union-attr]
        assert f"`{name}`" in README, name
        assert f"`{name}`" in USAGE, name


def test_the_readme_tree_names_every_room() -> None:
    for path in (ROOT / "src" / "unperturb").iterdir():
        if not path.name.startswith(("__pycache__", "py.typed")):
            assert path.name in README, path.name


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_loads_and_overrides(name: str) -> None:
    recipe = read_recipe(name)
    again = read_recipe(name, ["seed=5"]) if hasattr(recipe, "seed") else recipe
    assert again == recipe or again.seed == 5
    assert describe(name), "a recipe begins with a comment that says what it is"
    assert resolve(tomllib.loads(to_toml(recipe))) == recipe  # what `show` prints is that recipe


def test_the_page_of_recipes_is_that_of_the_program() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == recipes_page(), "run python -m unperturb.available > docs/recipes.md"
    cells = [len(re.split(r"(?<!\\)\|", line)) for line in page.splitlines() if line.startswith("|")]
    assert set(cells) <= {5, 6}  # no `|` of a text has opened a column


CARDS = [card for card in sorted((ROOT / "docs" / "defenses").glob("*.md")) if card.name != "README.md"]


@functools.cache
def table2() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "table2.py"))


@pytest.mark.parametrize("page", ["README.md", "docs/faq.md", "docs/results.md", "docs/table2.md"])
def test_the_tables_on_a_page_are_those_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert table2()["filled"](text) == text, "run python benchmarks/table2.py"


def test_every_system_of_table_2_has_its_table_on_one_card() -> None:
    texts = [card.read_text(encoding="utf-8") for card in CARDS]
    for text in texts:
        assert table2()["filled"](text) == text, "run python benchmarks/table2.py"
    named = re.findall(r"<!-- table: measured-(\w+) -->\n.*?<!-- end -->", "".join(texts), flags=re.S)
    assert sorted(named) == sorted(set(table2()["SYSTEMS"]) - {"undefended"})


def test_the_page_of_what_went_wrong_names_tests_that_are_there() -> None:
    named = re.findall(r"`(\w+)::(test_\w+)`", (ROOT / "docs" / "soundness.md").read_text(encoding="utf-8"))
    assert len(named) > 80
    source = {file: (ROOT / "tests" / f"test_{file}.py").read_text(encoding="utf-8") for file, _ in named}
    assert [f"{file}::{test}" for file, test in named if f"def {test}(" not in source[file]] == []


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) >= 160] == []


LINKED = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "zoo" / "README.md",
    ROOT / "results" / "README.md",
]
LINKED += sorted((ROOT / "docs").glob("**/*.md"))


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_leads_to_a_file(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def lines_of(page: str) -> list[list[str]]:
    """The cells of a page's table whose first cell is a link."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| [")]


def test_the_table_of_the_zoo_is_that_of_its_folders() -> None:
    folders = {path.name: path for path in (ROOT / "zoo").iterdir() if path.is_dir()}
    table = {cells[0]: cells for cells in lines_of("zoo/README.md")}
    assert list(table) == [f"[{name}]({name}/README.md)" for name in sorted(folders)]
    for name, path in folders.items():
        _, kind, dataset, _, parameters, size, pflop, made_by = table[f"[{name}]({name}/README.md)"]
        file = path / ("classifier.json" if kind == "classifier" else "defense.json")
        record = json.loads(file.read_text(encoding="utf-8"))
        model = load_classifier(path) if kind == "classifier" else load_defense(path)
        assert dataset == record["extra" if kind == "classifier" else "about"]["dataset"]
        assert parameters == f"{sum(weight.numel() for weight in model.parameters()):,}"
        assert size == f"{(path / 'model.safetensors').stat().st_size:,}"
        training = path / "training.json"
        assert pflop == (str(json.loads(training.read_text())["pflop"]) if training.exists() else "not counted")
        assert made_by.startswith(("`unperturb train", "`python benchmarks/"))


def test_the_index_of_the_results_names_every_folder() -> None:
    folders = sorted(path.name for path in (ROOT / "results").iterdir() if path.is_dir())
    assert [cells[0] for cells in lines_of("results/README.md")] == [f"[{name}]({name})" for name in folders]
    assert [path.name for path in (ROOT / "results").iterdir() if path.is_file()] == ["README.md"]
    for _, command, date, shows, status in lines_of("results/README.md"):
        assert command.startswith("`")
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", date)
        assert shows
        assert status


def test_every_defense_stands_in_the_table_of_defenses() -> None:
    table = (ROOT / "docs" / "defenses" / "README.md").read_text(encoding="utf-8")
    for name in defenses:
        assert f"`{name}`" in table or f"({name}.md)" in table, name
    for card in CARDS:
        assert f"({card.name})" in table, card.name
