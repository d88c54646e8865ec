"""Run folders: nothing half written, one writer at a time, and a damaged file is named with what to do about it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from unperturb import runs
from unperturb.results import samples, schema
from unperturb.runs import RunError

full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")


# Files ---------------------------------------------------------------------------------------------------------------


def on_a_full_disk(path: Path) -> Path:
    """In the place of a new file a device without room: what the libraries raise there is theirs to choose. By a link,
    since one of them removes the file that it could not write."""
    temporary = path.with_name(f".{path.name}.0.tmp")
    temporary.symlink_to("/dev/full")
    return temporary


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".tmp"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    runs.write_text(path, "old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise ValueError("power cut")

    with pytest.raises(ValueError, match="power cut"):
        runs.write_atomically(path, half)
    assert path.read_text() == "old"
    assert hidden(path.parent) == []
    runs.write_text(path, "new")
    assert path.read_text() == "new"


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    runs.write_text(path, "old")

    def slow(temporary: Path) -> None:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
        assert path.read_text() == "old"

    runs.write_atomically(path, slow)
    assert path.read_text() == "new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_says_so(there: bool, code: int, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    if there:
        runs.write_text(path, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(code, os.strerror(code))

    kept = "the last whole file.txt is still there" if there else "nothing was there before"
    with pytest.raises(RunError, match=f"the disk is full: could not write .*file.txt; {kept}. Free some space and"):
        runs.write_atomically(path, write)
    assert path.exists() == there
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("place", ["file.txt/run", "/proc/run", "x" * 300])
def test_a_folder_that_cannot_be_made_says_so(place: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").touch()
    out = tmp_path / place
    for use in (
        lambda: runs.write_text(out / "a.txt", "a"),
        lambda: runs.lock(out).__enter__(),
        lambda: runs.open_run(out, RECIPE, resume=False),
    ):
        with pytest.raises(
            RunError, match=r"could not write .* \(.*\); choose another folder, or make this one writable"
        ):
            use()
    with pytest.raises(RunError, match=r"a.txt \(permission denied\)"):
        runs.write_atomically(tmp_path / "a.txt", denied)


def denied(_: Path) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_links_that_somebody_planted_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    out = tmp_path / "run"
    out.mkdir()
    (out / f".recipe.json.{os.getpid()}.tmp").symlink_to(victim)
    (out / ".lock").symlink_to(victim)
    with pytest.raises(RunError, match=r"could not write .*\.lock"), runs.lock(out):
        pass
    (out / ".lock").unlink()
    (out / "recipe.json").symlink_to(victim)
    runs.write_json(out / "recipe.json", RECIPE)  # the link goes, what it points to stays
    assert victim.read_text() == "years of work"
    names = {runs._temporary(out / "a").name for _ in range(5)}
    assert len(names) == 5


def test_what_a_kill_left_is_swept_up_at_the_next_start(tmp_path: Path) -> None:
    runs.open_run(tmp_path, RECIPE, resume=False)
    (tmp_path / "rows" / "cell").mkdir(parents=True)
    left = [tmp_path / ".model.safetensors.0a1b.tmp", tmp_path / "rows" / "cell" / ".0000.parquet.77.tmp"]
    mine = tmp_path / "rows" / "notes.tmp"
    for path in (*left, mine):
        path.touch()
    with runs.lock(tmp_path):
        runs.open_run(tmp_path, RECIPE, resume=True)
    assert not any(path.exists() for path in left)
    assert mine.exists()


def rows(n: int = 5, **changed: Any) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    columns: dict[str, Any] = {}
    for key, kind in schema.ROW_COLUMNS.items():
        if kind == "string":
            columns[key] = f"a {key}"
        elif kind == "bool":
            columns[key] = generator.random(n) < 0.5
        elif kind == "list<float32>":
            columns[key] = [[0.25, 0.5]] * n
        elif kind == "float32":
            columns[key] = generator.random(n).astype(np.float32)
        else:
            columns[key] = np.arange(n)
    return {**columns, **changed}


WRITERS: dict[str, Callable[[Path], None]] = {
    "weights.safetensors": lambda path: runs.save_tensors(path, {"a": torch.zeros(100_000)}),
    "rows.parquet": lambda path: schema.write_rows(path, rows(5000)),
    "recipe.json": lambda path: runs.write_json(path, {"a": "b" * 100_000}),
}


@full_device
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_each_kind_of_file_on_a_disk_that_is_really_full(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_temporary", on_a_full_disk)
    with pytest.raises(RunError, match="the disk is full"):
        WRITERS[name](tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"name": "größe", "numbers": [1, 2.5, None, True]}
    runs.write_json(path, value)
    assert runs.read_json(path) == value
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"a.json is not valid JSON \(.*the run folder is damaged"):
        runs.read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="not valid JSON"):
        runs.read_json(path)
    with pytest.raises(RunError, match=r"b.json is not there: .* holds no finished run"):
        runs.read_json(tmp_path / "b.json")
    with pytest.raises(RunError, match="cannot be read: Is a directory"):
        runs.read_json(tmp_path)
    for text in ("[" * 100_000, "1" * 5000):
        path.write_text(text)
        with pytest.raises(RunError, match="not valid JSON"):
            runs.read_json(path)
    runs.write_json(path, {"pflop": 1.5, "seconds": 2, "validation": {"score": 0.5}})
    assert runs.read_json(path, runs.Outcome) == runs.Outcome(pflop=1.5, seconds=2.0, validation={"score": 0.5})
    runs.write_json(path, {"pflop": 1.5, "seconds": 2, "validation": {"score": float("nan")}})
    with pytest.raises(
        RunError, match=r"a.json is not what was written there: validation.score: .*finite number, not nan"
    ):
        runs.read_json(path, runs.Outcome)


def test_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "weight": torch.randn(3, 4, dtype=torch.float32).to(memory_format=torch.contiguous_format),
        "turned": torch.randn(3, 4).T,
        "count": torch.tensor(3),
        "pixels": torch.arange(256, dtype=torch.uint8),
        "levels": torch.tensor([0, 65_535], dtype=torch.int32).to(torch.uint16),
        "none": torch.zeros(0, 3),
        "learned": torch.nn.Parameter(torch.ones(2)),
    }
    runs.save_tensors(path, tensors)
    again = runs.load_tensors(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in tensors.items())
    whole = path.read_bytes()
    for broken in (whole[:-3], whole[:20], b"", b"not tensors at all"):
        path.write_bytes(broken)
        with pytest.raises(RunError, match=r"a.safetensors is truncated or not a safetensors file .*make it again"):
            runs.load_tensors(path)
    path.unlink()
    with pytest.raises(RunError, match=r"no weights at .*a\.safetensors"):
        runs.load_tensors(path)


def test_the_digest_tells_names_dtypes_shapes_bytes_and_metadata_apart() -> None:
    a = {"a": torch.arange(6, dtype=torch.float32), "b": torch.zeros(0)}
    others: list[tuple[dict[str, torch.Tensor], dict[str, str]]] = [
        ({"a": a["a"]}, {}),
        ({**a, "b": torch.zeros(0, 2)}, {}),
        ({"c": a["a"], "b": a["b"]}, {}),
        ({**a, "a": a["a"].reshape(2, 3)}, {}),
        ({**a, "a": a["a"].view(torch.int32)}, {}),
        ({**a, "a": a["a"] + torch.eye(6)[5] * 1e-6}, {}),
        (a, {"attack": "pgd"}),
        (a, {"attack": "fgsm"}),
    ]
    digests = {runs.digest_of(a), *(runs.digest_of(*other) for other in others)}
    assert len(digests) == 1 + len(others)
    assert runs.digest_of({"b": a["b"], "a": a["a"].repeat(2, 1).T.contiguous().T[0]}) == runs.digest_of(a)


def test_every_damage_to_a_file_of_tensors_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    runs.save_tensors(path, {"w": torch.randn(40, 50), "n": torch.tensor(3)}, {"attack": "pgd"})
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for number in range(60):
        broken = bytearray(whole)
        at = int(generator.integers(0, len(whole)))
        if number % 3 == 0:
            broken[at] ^= 1 << int(generator.integers(8))
        elif number % 3 == 1:
            broken[at : at + 4096] = bytes(len(broken[at : at + 4096]))
        else:
            del broken[at:]
        path.write_bytes(broken)
        if bytes(broken) == whole:
            continue
        with pytest.raises(RunError, match=r"a\.safetensors") as error:
            runs.load_tensors(path, require_digest=True, metadata={"attack": "pgd"})
        assert "\n" not in str(error.value)


def test_tensors_that_are_not_what_is_expected(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    runs.save_tensors(path, {"images": images, "seconds": torch.tensor(0.5)}, {"attack": "pgd"})
    right: Any = {"images": ("uint8", (None, 1, 4, 4)), "seconds": ("float32", ())}
    assert set(runs.load_tensors(path, expect=right, metadata={"attack": "pgd"})) == set(right)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"expect": {"images": right["images"]}}, "holds images, seconds; expected images"),
        ({"expect": {**right, "images": ("uint8", (2, 1, 4, 4))}}, r"images is torch.uint8 \(3, 1, 4, 4\); expected"),
        ({"expect": {**right, "images": ("uint8", (None, 1, 4))}}, "images is torch.uint8"),
        ({"expect": {**right, "seconds": ("float64", ())}}, "seconds is torch.float32"),
        ({"metadata": {"attack": "fgsm"}}, "its attack is 'pgd', not 'fgsm'"),
        ({"metadata": {"seed": "1"}}, "its seed is None, not '1'"),
    ]
    for options, said in wrong:
        with pytest.raises(RunError, match=said):
            runs.load_tensors(path, **options)
    save_file({"w": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(RunError, match="holds no digest of its contents"):
        runs.load_tensors(path, require_digest=True)
    with pytest.raises(RunError, match="w holds NaN or infinity"):
        runs.load_tensors(path)
    assert runs.load_tensors(path, finite=False)["w"].isnan().any()


class Small(torch.nn.Linear):
    """One layer and a threshold that is not set yet."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_buffer("limit", torch.full((2,), float("inf")))


def fit(folder: Path, digest: str | None = None) -> Small:
    net = Small()
    runs.fit_weights(net, runs.load_tensors(folder / "model.safetensors", finite=False), folder, "net.json", digest)
    return net


def test_weights_fit_or_are_refused(tmp_path: Path) -> None:
    state, path = Small().state_dict(), tmp_path / "model.safetensors"
    digest = runs.save_tensors(path, state)
    assert torch.equal(fit(tmp_path, digest).weight, state["weight"])
    with pytest.raises(RunError, match=r"of another run: its contents do not match the digest in net.json"):
        fit(tmp_path, "0" * 64)
    foreign: list[tuple[dict[str, torch.Tensor], str]] = [
        ({**state, "more": torch.zeros(1)}, "does not hold the weights of .*net.json .1 tensors differ.*: more"),
        ({"weight": state["weight"], "bias": state["bias"]}, "1 tensors differ in name, shape or dtype: limit"),
        ({**state, "bias": state["bias"][:1]}, "shape or dtype: bias"),
        ({**state, "bias": state["bias"].double()}, "shape or dtype: bias"),
        ({k: v.half() for k, v in state.items()}, "3 tensors differ"),
        ({**state, "bias": state["bias"] * torch.nan}, "bias holds NaN or infinity"),
        ({**state, "weight": state["weight"] / 0}, "weight holds NaN or infinity"),
        ({**state, "limit": torch.tensor([torch.inf, torch.nan])}, "limit holds NaN or infinity"),
    ]
    for tensors, said in foreign:
        runs.save_tensors(path, tensors)
        with pytest.raises(RunError, match=said):
            fit(tmp_path)


def test_half_precision_on_purpose_is_said_in_the_file(tmp_path: Path) -> None:
    state = Small().state_dict()
    digest = runs.save_tensors(
        tmp_path / "model.safetensors", {k: v.half() for k, v in state.items()}, {"stored_as": "float16"}
    )
    net = fit(tmp_path, digest)
    assert {v.dtype for v in net.state_dict().values()} == {torch.float32}
    assert torch.equal(net.weight, state["weight"].half().float())


# Folders -------------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from unperturb.runs import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError) as error, runs.lock(tmp_path):
            pytest.fail("two writers")
        assert f"{tmp_path} is being written by process {holder.pid} since 20" in str(error.value)
        assert "wait for it, stop it, or choose another folder" in str(error.value)
    finally:
        holder.kill()  # a process that is killed leaves no lock behind
        holder.wait()
    for _ in range(100):
        try:
            with runs.lock(tmp_path):
                assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
            break
        except RunError:
            time.sleep(0.05)
    else:
        pytest.fail("the lock outlived its process")
    with runs.lock(tmp_path):  # and one that is done gives it back
        pass


RECIPE = {"kind": "classifier", "training": {"lr": 0.1, "betas": (0.9, 0.99)}, "attacks": [{"name": "fgsm"}], "seed": 0}


def test_opening_a_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    runs.open_run(out, RECIPE, resume=False)
    assert runs.read_json(out / "recipe.json")["training"] == {"lr": 0.1, "betas": [0.9, 0.99]}
    there = runs.read_json(out / "environment.json")
    assert (
        there["versions"]["torch"] == torch.__version__.split("+")[0] or there["versions"]["torch"] == torch.__version__
    )
    assert {"date", "python", "device", "threads", "commit"} <= set(there)
    runs.open_run(out, RECIPE, resume=True)
    (out / "environment.json").unlink()  # killed before it was written, by a version that wrote it last
    runs.open_run(out, RECIPE, resume=True)
    assert runs.read_json(out / "environment.json")["versions"] == there["versions"]
    with pytest.raises(RunError, match="already holds this run; go on with --resume, or choose another folder"):
        runs.open_run(out, RECIPE, resume=False)
    for resume in (True, False):
        said = "extra was not set and is 1 now; seed was 0 and is 1 now; training.lr was 0.1 and is 0.2 now"
        with pytest.raises(RunError, match=rf"already holds another run: {said}\. .* choose another folder \(--out\)"):
            runs.open_run(
                out, {**RECIPE, "seed": 1, "extra": 1, "training": {**RECIPE["training"], "lr": 0.2}}, resume=resume
            )
    with pytest.raises(RunError, match=r"run: attacks was \[\{.*\}\] and is \[\] now"):
        runs.open_run(out, {**RECIPE, "attacks": []}, resume=True)
    slower = {**RECIPE, "training": {**RECIPE["training"], "lr": 0.2}}
    runs.open_run(out, slower, resume=True, free={"training.lr"})
    with pytest.raises(RunError, match=r"run: seed was 0 and is 2 now\."):
        runs.open_run(out, {**slower, "seed": 2}, resume=True, free={"training.lr"})
    assert runs.read_json(out / "recipe.json")["seed"] == 0


def test_what_another_run_differs_in_is_what_was_asked_for(tmp_path: Path) -> None:
    """Not what follows from it, unless that is all there is."""

    def benchmark(eps: str, code: str = "a1", alpha: float = 0.1, **more: Any) -> dict[str, Any]:
        attacks = {"pgd": {"white_box": {"attack": f"PGD(norm='linf', eps={eps}, alpha={alpha})"}}}
        return {"n": 100, "eps": eps, "attacks": attacks, "fingerprints": {"classifiers": {"net": code}}, **more}

    runs.open_run(tmp_path, benchmark("8/255"), resume=False)
    for asked, said in (
        (benchmark("0.3", "b2"), "eps was 8/255 and is 0.3 now"),
        (
            benchmark("0.3", n=200, budget="quick"),
            "budget was not set and is quick now; eps .*; n was 100 and is 200 now",
        ),
        (benchmark("8/255", "b2"), "the fingerprint of classifiers.net was a1 and is b2 now"),
        (benchmark("8/255", alpha=0.2), r"attacks.pgd.white_box.attack was alpha=0.1\) and is alpha=0.2\) now"),
        (benchmark("1", a=1, b=1, c=1, d=1, e=1, f=1), "a was .*; e was not set and is 1 now; and 2 more"),
    ):
        with pytest.raises(RunError, match=rf"another run: {said}\. Ask for that one, or"):
            runs.open_run(tmp_path, asked, resume=True)
    other = tmp_path / "recipe"
    runs.open_run(other, {"attacks": [{"attack": {"name": "pgd", "eps": 0.1}}], "systems": ["a", "b"]}, resume=False)
    with pytest.raises(RunError, match=r"attacks.0.attack.eps was 0.1 and is 0.2 now\."):
        runs.open_run(other, {"attacks": [{"attack": {"name": "pgd", "eps": 0.2}}], "systems": ["a", "b"]}, resume=True)
    with pytest.raises(RunError, match=r'systems was \["a", "b"\] and is \["a"\] now\.'):
        runs.open_run(other, {"attacks": [{"attack": {"name": "pgd", "eps": 0.1}}], "systems": ["a"]}, resume=True)


def test_what_else_the_numbers_depend_on_lies_beside_the_environment(tmp_path: Path) -> None:
    runs.open_run(tmp_path / "run", RECIPE, resume=False, about={"data mnist": "a JPEG copy"})
    kept = runs.read_json(tmp_path / "run" / "environment.json")
    assert kept["data mnist"] == "a JPEG copy"
    assert kept["versions"] == runs.environment()["versions"]


def test_a_run_killed_before_its_recipe_was_written_is_begun_again(tmp_path: Path) -> None:
    runs.write_json(tmp_path / "environment.json", runs.environment())
    runs.open_run(tmp_path, RECIPE, resume=False)
    assert runs.read_json(tmp_path / "recipe.json")["seed"] == 0


def test_going_on_under_other_conditions_is_said_and_kept(tmp_path: Path) -> None:
    def goes_on_quietly() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runs.open_run(tmp_path, RECIPE, resume=True)

    runs.open_run(tmp_path, RECIPE, resume=False)
    goes_on_quietly()
    path = tmp_path / "environment.json"
    began = runs.read_json(path)
    runs.write_json(path, {**began, "threads": 7})
    with pytest.warns(
        UserWarning, match=r"other conditions than it began with \(threads was 7, is 1\): the last digits"
    ):
        runs.open_run(tmp_path, RECIPE, resume=True)
    assert runs.read_json(path) == {**began, "threads": 7, "resumed": [runs.environment()]}
    goes_on_quietly()  # said once


def test_a_folder_with_strangers_is_refused(tmp_path: Path) -> None:
    for name in ("thesis.txt", "b", "c", "d"):
        (tmp_path / name).touch()
    with pytest.raises(RunError, match=r"already holds something else \(b, c, d\); choose another folder"):
        runs.open_run(tmp_path, RECIPE, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c", "d", "thesis.txt"]


def test_a_locked_folder_may_be_opened_even_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / ".recipe.json.123.tmp").write_text("{")
    with runs.lock(tmp_path):
        runs.open_run(tmp_path, RECIPE, resume=False)


# Rows and samples ----------------------------------------------------------------------------------------------------


def test_rows_round_trip(tmp_path: Path) -> None:
    columns = rows(5, psnr_adv=[np.inf, 1, 2, 3, 4], eps=float("nan"), scores_adv=[[]] * 5, seconds_attack=0.5)
    schema.write_rows(tmp_path / "run" / "rows" / "cell-a" / "0000.parquet", columns)
    schema.write_rows(tmp_path / "run" / "rows" / "cell-a" / "0001.parquet", rows(2, index=[8, 9]))
    schema.write_rows(tmp_path / "other" / "rows" / "cell-b" / "0000.parquet", rows(1, system="ours"))
    found = schema.read_rows(tmp_path / "run", str(tmp_path / "other"))
    assert list(found.columns) == list(schema.ROW_COLUMNS)
    assert found["index"].tolist() == [0, 1, 2, 3, 4, 8, 9, 0]
    assert found["system"].tolist() == ["a system"] * 7 + ["ours"]
    assert found["schema"].tolist() == [schema.SCHEMA_VERSION] * 8
    assert np.isinf(found["psnr_adv"][0])
    assert found["eps"][:5].isna().all()
    assert [list(s) for s in found["scores_adv"][:5]] == [[]] * 5
    assert [list(s) for s in found["scores_clean"]] == [[0.25, 0.5]] * 8
    for key, kind in schema.ROW_COLUMNS.items():
        if not (kind.startswith("list") or kind == "string"):
            assert str(found[key].dtype) == kind, key
    np.testing.assert_array_equal(found["l2"][:5], columns["l2"])
    assert found["rejected_adv"][:5].tolist() == columns["rejected_adv"].tolist()


def test_a_missing_column_or_a_wrong_length(tmp_path: Path) -> None:
    path = tmp_path / "0000.parquet"
    short = rows()
    del short["psnr_adv"]
    with pytest.raises(KeyError, match="psnr_adv"):
        schema.write_rows(path, short)
    with pytest.raises(ValueError, match="length"):
        schema.write_rows(path, rows(5, label=[1, 2]))
    assert not path.exists()


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no rows under .*rows; make them with: unperturb evaluate RECIPE --out"):
        schema.read_rows(tmp_path)
    path = tmp_path / "rows" / "cell" / "0000.parquet"
    schema.write_rows(path, rows())
    whole = path.read_bytes()
    for broken in (whole[:-10], whole[:100], b""):
        path.write_bytes(broken)
        with pytest.raises(RunError, match=r"0000.parquet is truncated or not Parquet .*delete it and run again"):
            schema.read_rows(tmp_path)
    path.write_bytes(whole)
    frame = pd.read_parquet(path)
    frame["schema"] = np.int16(schema.SCHEMA_VERSION + 1)
    frame.to_parquet(path)
    with pytest.raises(RunError, match=rf"written by a newer unperturb \(row schema {schema.SCHEMA_VERSION + 1}\)"):
        schema.read_rows(tmp_path)


def test_samples_round_trip(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    tensors = {
        "clean": images,
        "adversarial": 255 - images,
        "restored": images // 2,
        "restored_clean": images // 3,
        "index": torch.tensor([5, 6, 7]),
        "label": torch.tensor([0, 1, 2]),
        "confidence": torch.rand(3, 4),
        "prediction": torch.arange(12).reshape(3, 4),
    }
    cell = dict.fromkeys(schema.CELL_KEYS, "") | {"classifier": "convnet", "eps": 0.1, "class_names": ["a", "b", "ç"]}
    assert samples.read_samples(tmp_path) == []
    samples.write_samples(tmp_path / "samples" / "b.safetensors", {**tensors, "extra": images}, cell)
    samples.write_samples(tmp_path / "samples" / "a.safetensors", tensors, {**cell, "classifier": "lenet"})
    found = samples.read_samples(tmp_path)
    assert [c["classifier"] for c, _ in found] == ["lenet", "convnet"]
    assert found[1][0] == cell
    for _, again in found:
        assert set(again) == set(samples.SAMPLE_TENSORS)
        assert all(torch.equal(again[k], v) for k, v in tensors.items())
    (tmp_path / "samples" / "a.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match="truncated or not a safetensors file"):
        samples.read_samples(tmp_path)
