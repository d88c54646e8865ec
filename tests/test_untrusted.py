"""Pickles planted in front of every loader do not go off; and no call in the source could run one."""

from __future__ import annotations

import ast
import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import unperturb as up
from made_runs import make_run
from toy import Linear, toy
from unperturb.config import RecipeError
from unperturb.data import Splits
from unperturb.data.sets import DataError
from unperturb.evaluation.adversarials import AdversarialStore
from unperturb.results.samples import read_samples
from unperturb.runs import RunError
from unperturb.unsaved import import_classifier

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "unperturb"


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def _torch(bomb: Bomb, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": bomb}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _numpy(bomb: Bomb) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([bomb], dtype=object), allow_pickle=True)
    return file.getvalue()


KINDS: dict[str, tuple[Callable[[Bomb], bytes], Callable[[bytes], object]]] = {
    "pickle": (pickle.dumps, pickle.loads),
    "torch": (lambda bomb: _torch(bomb, True), lambda b: torch.load(io.BytesIO(b), weights_only=False)),
    "torch, of old": (lambda bomb: _torch(bomb, False), lambda b: torch.load(io.BytesIO(b), weights_only=False)),
    "numpy": (_numpy, lambda b: np.load(io.BytesIO(b), allow_pickle=True)),
}


@pytest.fixture(params=list(KINDS))
def planted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bytes]:
    """What goes off where it is unpickled; after the test it must not have."""
    yield KINDS[request.param][0](Bomb(tmp_path / "went-off"))
    assert not (tmp_path / "went-off").exists(), "the pickle was run"


@pytest.mark.parametrize("kind", KINDS)
def test_the_bombs_are_real(kind: str, tmp_path: Path) -> None:
    make, unpickle = KINDS[kind]
    unpickle(make(Bomb(tmp_path / "went-off")))
    assert (tmp_path / "went-off").is_dir()


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "load"),
    [("mnist-lenet5", up.load_classifier), ("protect-mnist", up.load_defense)],
    ids=["net", "purifier"],
)
def test_run_folders_and_the_zoo(
    name: str, load: Callable[[str], object], planted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "zoo" / name
    kind = up.Classifier if load is up.load_classifier else up.Defense
    for file in ("model.safetensors", "classifier.json", "defense.json", "training.json"):
        shutil.copytree(ROOT / "zoo" / name, folder, dirs_exist_ok=True)
        if not (folder / file).exists() or (file, load) == ("training.json", up.load_classifier):
            continue
        (folder / file).write_bytes(planted)
        for use in (lambda: load(str(folder)), lambda: load(f"zoo:{name}"), lambda: kind.from_pretrained(folder)):
            with pytest.raises(RunError, match=file):
                use()


def test_a_protected_model_in_a_folder(planted: bytes, tmp_path: Path) -> None:
    for part, name in (("classifier", "mnist-lenet5"), ("defense", "protect-mnist")):
        shutil.copytree(ROOT / "zoo" / name, tmp_path / "both" / part)
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(planted)
    up.Protected.from_pretrained(tmp_path / "both")  # a stranger beside it is not looked at
    (tmp_path / "both" / "defense" / "model.safetensors").write_bytes(planted)
    with pytest.raises(RunError, match="truncated or not a safetensors file"):
        up.Protected.from_pretrained(tmp_path / "both")


@pytest.mark.parametrize("file", ["weights.pt", "weights.pth", "pytorch_model.bin", "weights.safetensors", "weights"])
def test_weights_of_ones_own_model(
    file: str, planted: bytes, tmp_path: Path, tiny_digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("from torch import nn\nnet = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    Path(file).write_bytes(planted)
    with pytest.raises(ValueError, match="a whole pickled model is never opened"):
        import_classifier("own.py:net", tiny_digits.train, weights=file)


def test_state_dicts_wait_for_a_torch_that_reads_them_safely(
    tmp_path: Path, tiny_digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("from torch import nn\nnet = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).state_dict(), "weights.pt")
    import_classifier("own.py:net", tiny_digits.train, weights="weights.pt")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    with pytest.raises(ValueError, match=r"CVE-2025-32434.*torch 2\.5\.1.*safetensors"):
        import_classifier("own.py:net", tiny_digits.train, weights="weights.pt")


def test_an_onnx_file(planted: bytes, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'unperturb[onnx]')")
    (tmp_path / "net.onnx").write_bytes(planted)
    with pytest.raises(ValueError, match="no ONNX file that onnxruntime can run"):
        up.wrap(tmp_path / "net.onnx")


def test_a_recipe(planted: bytes, tmp_path: Path) -> None:
    from unperturb.recipe_files import read_recipe

    (tmp_path / "mine.toml").write_bytes(planted)
    with pytest.raises(RecipeError, match=r"mine\.toml"):
        read_recipe(str(tmp_path / "mine.toml"))


# Data ----------------------------------------------------------------------------------------------------------------


def photos(folder: Path) -> Path:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for k in range(4):
                pixels = np.full((8, 8, 3), 20 * k + (label == "dog") * 100, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{k}.png")
    return folder


def test_pictures(planted: bytes, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    (folder / "train" / "cat" / "0.png").write_bytes(planted)
    with pytest.raises(DataError, match=r"0\.png"):
        up.load_dataset(f"folder:{folder}", size=8, cache=tmp_path / "cache", quiet=True)


def test_the_cache_of_decoded_pictures(planted: bytes, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")

    def load() -> Splits:
        return up.load_dataset(f"folder:{folder}", size=8, cache=tmp_path / "cache", quiet=True)

    before = load().train.fingerprint
    kept = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix in (".pixels", ".labels", ".json")]
    assert len(kept) >= 5
    for path in kept:
        whole = path.read_bytes()
        path.write_bytes(planted[: len(whole)].ljust(len(whole), b"\0"))  # of the right length too
        assert load().train.fingerprint == before


def parquet(path: Path, planted: bytes) -> None:
    """A column of a type that older pyarrow unpickled to know it (CVE-2023-47248)."""
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": planted}
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "PNG")
    fields = [pa.field("image", pa.binary(), metadata=extension), pa.field("label", pa.int64(), metadata=extension)]
    pq.write_table(pa.table([[file.getvalue()] * 4, [0, 1, 0, 1]], schema=pa.schema(fields)), path)


def answer(use: Callable[[], object], kinds: type[Exception] | tuple[type[Exception], ...]) -> str:
    try:
        use()
    except kinds as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:pyarrow.PyExtensionType")
def test_local_parquet(planted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "mine" / "own").mkdir(parents=True)
    for split in ("train", "test"):
        parquet(tmp_path / "data" / "mine" / "own" / f"{split}.parquet", planted)
    answer(lambda: up.load_dataset("hub:mine/own", cache=tmp_path / "cache", quiet=True), DataError)  # read or refused
    (tmp_path / "data" / "mine" / "own" / "train.parquet").write_bytes(planted)
    with pytest.raises(DataError, match="truncated or not a Parquet file"):
        up.load_dataset("hub:mine/own", cache=tmp_path / "other", quiet=True)


# Results -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:pyarrow.PyExtensionType")
def test_rows_and_samples(planted: bytes, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n=4, samples=1, attacks=[("fgsm", "FGSM", 0.3, ("oblivious",))])
    shard, sample = next(run.glob("rows/*/*.parquet")), next(run.glob("samples/*.safetensors"))
    whole = shard.read_bytes()
    table = pq.read_table(shard, partitioning=None)
    mark = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": planted}
    marked = pa.schema([field.with_metadata(mark) for field in table.schema])
    pq.write_table(table.cast(marked), shard)
    answer(lambda: up.read_rows(run), RunError)
    shard.write_bytes(planted)
    with pytest.raises(RunError, match="truncated or not Parquet"):
        up.read_rows(run)
    shard.write_bytes(whole)
    for name in ("systems.json", "probe.json"):
        (run / name).write_bytes(planted)
        with pytest.raises(RunError, match=name):
            up.read_rows(run)
        (run / name).unlink()
    sample.write_bytes(planted)
    with pytest.raises(RunError, match="truncated or not a safetensors file"):
        read_samples(run)


def test_adversarial_images_that_were_kept(planted: bytes, tmp_path: Path) -> None:
    store, data, attack = AdversarialStore(tmp_path / "kept"), toy(), up.create_attack("fgsm", eps=0.1)

    def get() -> torch.Tensor:
        rows = torch.arange(len(data))
        return store.get(attack, Linear(), "k", data, rows, seed=0, batch=5, device=torch.device("cpu")).images

    before = get()
    (path,) = (tmp_path / "kept").rglob("*.safetensors")
    path.write_bytes(planted)
    assert torch.equal(get(), before)
    assert path.read_bytes() != planted


# The source ----------------------------------------------------------------------------------------------------------

UNPICKLERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "yaml",
    "jsonpickle",
}


def faults(text: str) -> list[str]:
    """The calls in a source that may run what a file says."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {name}" for name in names if name.split(".")[0] in UNPICKLERS]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "compile", "__import__"):
            found.append(called)
        if called.endswith(("torch.load", "jit.load")) and given.get("weights_only") != "True":
            found.append(f"{called} without weights_only=True")
        if called.endswith((".read_pickle", "hub.load")) or given.get("allow_pickle") == "True":
            found.append(called)
        if "trust_remote_code" in given:
            found.append(f"{called}(trust_remote_code)")
    return found


def test_no_source_unpickles() -> None:
    wrong = [f"{f.relative_to(SOURCE)}: {said}" for f in sorted(SOURCE.rglob("*.py")) for said in faults(f.read_text())]
    assert wrong == []


def test_an_unpickling_source_would_be_found() -> None:
    for text in (
        *("import pickle", "from joblib import load", "torch.load(p)", "torch.load(p, weights_only=False)", "eval(s)"),
        *("np.load(p, allow_pickle=True)", "pd.read_pickle(p)", "load_dataset(n, trust_remote_code=True)"),
    ):
        assert len(faults(text)) == 1, text
    assert faults("torch.load(p, weights_only=True)\nmodel.eval()\nspec.loader.exec_module(m)") == []


def test_bounds_of_what_reads_files_are_those_without_known_holes() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = dict(entry.split(">=") for entry in project["dependencies"])
    assert int(least["pyarrow"].split(".")[0]) >= 15  # 14.0.0 and older unpickle extension types
    assert int(least["pillow"].split(".")[0]) >= 10  # older ones have the WebP hole
