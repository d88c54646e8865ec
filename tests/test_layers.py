"""The layers: imports run down only. The imports are read, not run; an arrow that runs up or across fails by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import unperturb

SOURCE = Path(unperturb.__file__).parent

# A module here is a file or a folder of the package; neighbors on a layer do not know each other.
LAYERS = {
    "per_image_rng": 1,
    "registry": 1,
    "config": 3,
    "recipe_files": 4,
    "validation": 1,
    "threat_models": 2,
    "modules": 5,
    "screen": 1,
    "mistakes": 1,
    "devices": 5,
    "data": 5,
    "runs": 5,
    "zoo": 5,
    "hub": 5,
    "metrics": 5,
    "intervals": 5,
    "attacks": 7,
    "defenses": 7,
    "manifest": 6,
    "classifiers": 6,
    "results": 6,
    "systems": 8,
    "attackers": 9,
    "unsaved": 8,
    "training": 10,
    "evaluation": 11,
    "export": 12,
    "attack_folder": 12,
    "benchmarking": 12,
    "certifying": 12,
    "paper": 12,
    "serving": 12,
    "__init__": 13,
    "app": 13,
    "demo": 13,
    "available": 13,
    "cache": 13,
    "cli": 14,
    "__main__": 15,
}
# Who may be imported across: the package's `__init__` names what stands beside it, and a model that is fetched lies in
# a run folder.
ACROSS = {("__init__", "available"), ("hub", "zoo"), ("hub", "runs")}
# Inside a folder: what siblings may import, or the order of its files from the bottom up.
SHARED = {
    "attacks": {"projections", "base", "kinds", "losses", "context"},
    "defenses": {"base", "gan_losses", "networks"},
    "classifiers": {"base"},
    "cli": {"terminal", "options"},
}
ORDER = {
    "training": ["adversarial_batches", "objectives", "muon", "profiling", "state", "loop", "jobs"],
    "results": [
        *("names", "sheet", "schema", "samples", "results", "robust", "cases", "flags", "tables", "comparison"),
        *("render", "figures", "ladder_figure", "cost_figure", "embedded", "card", "page"),
    ],
    "evaluation": [
        "identity",
        "adversarials",
        "training_cost",
        "checks",
        "ladder",
        "surrogates",
        "trial",
        "plan",
        "measure",
        "grid",
        "cascade",
        "engine",
        "costs",
        "behavior",
        "probe",
        "run",
    ],
    "app": ["choices", "images", "one_image", "says", "handlers", "page", "server"],
    "serving": ["limits", "batching", "inference", "app", "server"],
}
# An arrow from one sibling to another: a cascade is made of its members, and what is wrapped may be a file.
FAMILIES = {
    ("attacks", "autoattack"): {"apgd", "fab", "square"},
    ("attacks", "difgsm"): {"mim"},
    ("attacks", "fab"): {"apgd"},
    ("attacks", "nifgsm"): {"mim"},
    ("attacks", "sinifgsm"): {"nifgsm"},
    ("attacks", "vmifgsm"): {"mim"},
    ("classifiers", "wrapped"): {"onnx_file"},
}
FORBIDDEN = {"results": {"torch"}, "intervals": {"torch"}, "threat_models": {"torch"}}


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imports(text: str, modules: set[str], own: str) -> Iterator[tuple[int, str]]:
    """(line, module under the package) of every import in `text`, also inside functions; `TYPE_CHECKING` blocks too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{own}:{node.lineno}: a relative import"
            for alias in node.names:
                # `from unperturb import runs` names a module, `from unperturb.runs import lock` something in one.
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner.removeprefix("unperturb.") in modules else str(node.module)


def arrows(root: Path) -> list[tuple[str, int, str]]:
    """(importing module, line, imported module), both under the package; `""` is the package itself."""
    files = sorted(root.rglob("*.py"))
    modules = {module_of(f, root).removesuffix(".__init__") for f in files}
    found = []
    for file in files:
        own = module_of(file, root)
        for line, name in imports(file.read_text(encoding="utf-8"), modules, own):
            if name == "unperturb":
                found.append((own, line, ""))
            elif name.startswith("unperturb."):
                found.append((own, line, name.removeprefix("unperturb.")))
    return found


def breaches(root: Path) -> list[str]:
    """What is wrong with the imports under `root`, a sentence each."""
    wrong = []
    for own, line, name in arrows(root):
        here, there = own.split("."), name.split(".")
        module, other = here[0], there[0]
        where = f"{own.replace('.', '/')}.py:{line} imports {name or 'the package'}"
        if module not in LAYERS or (other and other not in LAYERS):
            wrong.append(f"{where}: {module if module not in LAYERS else other} has no layer")
        elif not name:
            # The command line calls what is public; nobody below may know its `__init__`.
            if LAYERS[module] <= LAYERS["__init__"]:
                wrong.append(f"{where}: nobody imports its `__init__` from inside")
        elif module != other:
            if (module, other) in ACROSS:
                continue
            if LAYERS[other] > LAYERS[module]:
                wrong.append(f"{where}: up, from layer {LAYERS[module]} to {LAYERS[other]}")
            elif LAYERS[other] == LAYERS[module]:
                wrong.append(f"{where}: across layer {LAYERS[module]}")
        else:
            wrong += [f"{where}: {said}" for said in inside(module, here[1], there[1:])]
    return wrong


def inside(module: str, mine: str, there: list[str]) -> list[str]:
    if not there:
        return ["its own `__init__`"]
    theirs = there[0]
    if mine == "__init__" or theirs == mine:
        return []
    if module in SHARED:
        shared = SHARED[module] | FAMILIES.get((module, mine), set())
        if theirs not in shared:
            return [f"{module}/ shares {', '.join(sorted(SHARED[module]))} only"]
        return []
    if module in ORDER:
        order = ORDER[module]
        unknown = [name for name in (mine, theirs) if name not in order]
        if unknown:
            return [f"{unknown[0]} has no place in {module}/"]
        return [] if order.index(theirs) < order.index(mine) else [f"up in {module}/: {' < '.join(order)}"]
    return []


def of_types(text: str) -> set[int]:
    """The lines that only who checks types reads."""
    blocks = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    return {line for block in blocks for line in range(block.lineno, (block.end_lineno or block.lineno) + 1)}


def outside(root: Path) -> list[str]:
    """Libraries where they must not be at run time."""
    wrong = []
    for file in sorted(root.rglob("*.py")):
        own, text = module_of(file, root), file.read_text(encoding="utf-8")
        unread = of_types(text)
        for line, name in imports(text, set(), own):
            if name.split(".")[0] in FORBIDDEN.get(own.split(".")[0], set()) and line not in unread:
                wrong.append(f"{own.replace('.', '/')}.py:{line} imports {name}")
    return wrong


def test_every_arrow_runs_down() -> None:
    assert not breaches(SOURCE), "\n" + "\n".join(breaches(SOURCE))


def test_libraries_stay_where_they_belong() -> None:
    assert not outside(SOURCE), "\n" + "\n".join(outside(SOURCE))


def test_every_module_has_a_layer() -> None:
    modules = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert not modules - set(LAYERS), f"no layer for {sorted(modules - set(LAYERS))}"
    assert not {p.stem for p in SOURCE.rglob("*.py")} & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("module", ["attacks", "classifiers", "defenses"])
def test_every_file_is_imported_by_its_init(module: str) -> None:
    reached, waiting = set[str](), ["__init__"]
    found = [(o.split("."), n.split(".")) for o, _, n in arrows(SOURCE) if o.startswith(f"{module}.") and "." in n]
    while waiting:
        file = waiting.pop()
        reached.add(file)
        waiting += [n[1] for o, n in found if o[1] == file and n[0] == module and n[1] not in reached]
    missing = {f.stem for f in (SOURCE / module).glob("*.py")} - reached
    assert not missing, f"{module}/__init__.py does not import {sorted(missing)}: nobody would find what is in there"


# What importing the package costs -------------------------------------------------------------------------------------

HEAVY = {"torch", "numpy", "pandas", "kornia", "datasets", "lightning_fabric", "matplotlib", "sklearn", "scipy", "ray"}
# Imported when they are needed, inside the functions that need them: seconds each.
LAZY = {"kornia", "datasets", "lightning_fabric", "matplotlib", "sklearn", "pandas", "pyarrow", "ray", "gradio"}
LAZY |= {"onnx", "onnxruntime", "fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart"}


def at_the_top(text: str) -> Iterator[tuple[int, str]]:
    """(line, library) of what importing a module imports."""

    def walk(nodes: list[ast.stmt]) -> Iterator[tuple[int, str]]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.lineno, str(node.module)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from walk([*node.body, *node.orelse])
            elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
                yield from walk(node.body)

    yield from walk(ast.parse(text).body)


def test_importing_the_package_or_its_verbs_imports_nothing_heavy() -> None:
    wrong = []
    verbs = sorted((SOURCE / "cli").glob("*.py"))
    assert len(verbs) > 1
    for file in [SOURCE / "__init__.py", SOURCE / "available.py", SOURCE / "demo.py", *verbs]:
        for line, library in at_the_top(file.read_text(encoding="utf-8")):
            ours = library.startswith("unperturb") and not (file in verbs and library.startswith("unperturb.cli."))
            if library.split(".")[0] in HEAVY or ours:
                wrong.append(f"{file.relative_to(SOURCE)}:{line} imports {library}")
    assert not wrong, wrong


def test_heavy_libraries_wait_until_they_are_needed() -> None:
    wrong = [
        f"{file.relative_to(SOURCE)}:{line} imports {library}"
        for file in sorted(SOURCE.rglob("*.py"))
        for line, library in at_the_top(file.read_text(encoding="utf-8"))
        if library.split(".")[0] in LAZY
    ]
    assert not wrong, wrong


# That all this can fail ----------------------------------------------------------------------------------------------

PACKAGE = {
    "__init__.py": "",
    "per_image_rng.py": "",
    "registry.py": "",
    "runs.py": "",
    "metrics.py": "",
    "systems.py": "from unperturb.defenses import base",
    "attacks/__init__.py": "from unperturb.attacks import base, pgd",
    "attacks/base.py": "from unperturb import per_image_rng\nfrom unperturb.registry import Registry",
    "attacks/pgd.py": "from unperturb.attacks.base import Attack",
    "defenses/__init__.py": "from unperturb.defenses.base import Defense",
    "defenses/base.py": "",
    "training/__init__.py": "",
    "training/adversarial_batches.py": "from unperturb.attacks.base import attacks",
    "training/loop.py": "from unperturb import runs",
    "training/jobs.py": "from unperturb.training.loop import train",
    "results/__init__.py": "",
    "cli/__init__.py": "from unperturb.cli.stock import verb",
    "cli/options.py": "",
    "cli/stock.py": "from unperturb.cli import options\ndef verb():\n    from unperturb import table",
    "cli/training.py": "def verb():\n    from unperturb.training import jobs",
}


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("metrics.py", "from unperturb.runs import lock", r"metrics.py:1 imports runs: across layer 5"),
        (
            "runs.py",
            "def f():\n    from unperturb.attacks import base",
            "runs.py:2 imports attacks.base: up, from layer 5",
        ),
        ("runs.py", "import unperturb.training.loop", "runs.py:1 imports training.loop: up, from layer 5 to 10"),
        ("defenses/base.py", "from unperturb import attacks", "defenses/base.py:1 imports attacks: across layer 7"),
        ("per_image_rng.py", "from unperturb import registry", "per_image_rng.py:1 imports registry: across layer 1"),
        ("attacks/pgd.py", "from unperturb.attacks import Attack", "imports attacks: its own `__init__`"),
        ("attacks/pgd.py", "from unperturb import Attack", "imports the package: nobody imports its `__init__`"),
        (
            "attacks/base.py",
            "from unperturb.attacks import pgd",
            "imports attacks.pgd: attacks/ shares base, context, kinds, losses, projections only",
        ),
        (
            "training/adversarial_batches.py",
            "from unperturb.training.loop import train",
            "up in training/: adversarial_batches < objectives < muon < profiling < state < loop",
        ),
        (
            "training/adversarial_batches.py",
            "from unperturb.evaluation import grid",
            "imports evaluation: up, from layer 10 to 11",
        ),
        (
            "cli/stock.py",
            "from unperturb.cli import training",
            "imports cli.training: cli/ shares options, terminal only",
        ),
        ("utils.py", "from unperturb import per_image_rng", "utils has no layer"),
    ],
)
def test_a_bad_arrow_is_named(file: str, text: str, said: str, tmp_path: Path) -> None:
    for name, content in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    if "evaluation" in text:
        (tmp_path / "evaluation").mkdir()
        (tmp_path / "evaluation" / "__init__.py").touch()
    assert breaches(tmp_path) == []
    (tmp_path / file).write_text(text)
    (found,) = breaches(tmp_path)
    assert said in found


def test_a_library_out_of_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    typed = "\nif TYPE_CHECKING:\n    from torch import Tensor"
    (tmp_path / "results" / "tables.py").write_text(f"def f():\n    from torch import nn{typed}")
    assert outside(tmp_path) == ["results/tables.py:2 imports torch"]
    assert list(at_the_top("import kornia\ndef f():\n    import torch\nif True:\n    import ray")) == [
        (1, "kornia"),
        (5, "ray"),
    ]
