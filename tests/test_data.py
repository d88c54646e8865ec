"""Image sets: what comes out is what went in, splits do not touch, decoding happens once, errors say what to do."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unperturb import per_image_rng
from unperturb.data import (
    DataError,
    ImageSet,
    augment,
    known_copy_note,
    load_dataset,
    prepare,
    sets,
    sources,
    store,
    tables,
)
from unperturb.registry import UnknownNameError

Pixels = NDArray[np.uint8]
PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNPERTURB_DATA", str(tmp_path / "data"))


def pixels_of(n: int, channels: int = 3, side: int = 8, seed: int = 0) -> Pixels:
    """(n, side, side[, 3]) uint8."""
    shape = (n, side, side, 3) if channels == 3 else (n, side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_parquet(path: Path, pixels: Pixels, labels: list[int], names: list[str], **columns: str) -> None:
    """A Parquet file in the hub's schema, as `datasets` writes it."""
    image, label = columns.get("image", "image"), columns.get("label", "label")
    features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    rows = {image: [{"bytes": png(one), "path": None} for one in pixels], label: labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({image: pa.array(rows[image], PICTURE), label: pa.array(labels, pa.int64())})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tiny(folder: Path, n: int = 40, test: str = "test") -> tuple[Pixels, Pixels]:
    """A data set of `n` train pictures in two shards and 6 test pictures, two classes in turn."""
    train, held_out = pixels_of(n), pixels_of(6, seed=1)
    half = n // 2
    names = ["cat", "dog"]
    write_parquet(folder / "train-00000-of-00002.parquet", train[:half], [i % 2 for i in range(half)], names)
    write_parquet(folder / "train-00001-of-00002.parquet", train[half:], [i % 2 for i in range(n - half)], names)
    write_parquet(folder / f"{test}-00000-of-00001.parquet", held_out, [i % 2 for i in range(6)], names)
    return train, held_out


def image_set(n: int = 50, **options: Any) -> ImageSet:
    images = torch.from_numpy(pixels_of(n).transpose(0, 3, 1, 2).copy())
    labels = torch.arange(n) % 2
    return ImageSet(
        images=images,
        labels=labels,
        index=torch.arange(n),
        class_names=["cat", "dog"],
        source="x",
        split="test",
        **options,
    )


# Sets ---------------------------------------------------------------------------------------------------------------


def test_a_batch_is_the_bytes_over_255() -> None:
    data = image_set()
    rows = torch.tensor([7, 3, 7])
    images, labels = data.batch(rows)
    assert images.dtype == torch.float32
    assert torch.equal(images, data.images[[7, 3, 7]].float() / 255)
    assert labels.tolist() == [1, 1, 1]


@pytest.mark.parametrize("rows", [[50], [-1]])
def test_rows_outside_a_set_are_refused(rows: list[int]) -> None:
    with pytest.raises(IndexError, match="50 images"):
        image_set().batch(torch.tensor(rows))


def test_a_subset_is_fixed_named_ordered_and_within_larger_ones() -> None:
    data = image_set().take(torch.arange(10, 50), name="test")
    small, large = data.subset(5, seed=3), data.subset(20, seed=3)
    assert small.name == "test:5@3"
    assert small.index.tolist() == sorted(small.index.tolist())
    assert set(small.index.tolist()) < set(large.index.tolist())
    assert small.index.min() >= 10  # numbers in the official split, not in the set
    assert torch.equal(small.images, image_set().images[small.index])
    assert small.fingerprint == data.subset(5, seed=3).fingerprint != data.subset(5, seed=4).fingerprint
    assert data.subset(None) is data.subset(40) is data


def test_the_fingerprint_is_of_pixels_and_labels() -> None:
    data = image_set()
    assert data.fingerprint == image_set().fingerprint
    changed = data.images.clone()
    changed[49, 2, 7, 7] ^= 1
    assert image_set().fingerprint != ImageSet(**{**vars_of(data), "images": changed}).fingerprint
    assert image_set().fingerprint != ImageSet(**{**vars_of(data), "labels": 1 - data.labels}).fingerprint


def vars_of(data: ImageSet) -> dict[str, Any]:
    return {k: getattr(data, k) for k in ("images", "labels", "index", "class_names", "source", "split")}


def test_a_set_too_large_for_memory_behaves_as_one_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny(tmp_path / "data" / "tiny")
    small = load_dataset("hub:tiny", val=8)
    monkeypatch.setattr(sets, "IN_MEMORY", 20 * 3 * 8 * 8)
    monkeypatch.setattr("unperturb.data.load.IN_MEMORY", 20 * 3 * 8 * 8)
    large = load_dataset("hub:tiny", val=8)
    assert large.train.mapped is not None
    assert large.train.shape == (3, 8, 8)
    rows = torch.tensor([30, 0, 11])
    assert torch.equal(large.train.batch(rows)[0], small.train.batch(rows)[0])
    assert torch.equal(large.train.batch(rows)[1], small.train.batch(rows)[1])
    with pytest.raises(IndexError):  # never somebody else's pixels in silence
        large.train.images[rows]
    few = large.train.subset(12)
    assert few.mapped is None
    assert few.fingerprint == small.train.subset(12).fingerprint


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0]])
def test_labels_out_of_range_are_refused(labels: list[int]) -> None:
    data = image_set(2)
    with pytest.raises(DataError, match="expected 0 to 1"):
        ImageSet(**{**vars_of(data), "labels": torch.tensor(labels)})


# Digits -------------------------------------------------------------------------------------------------------------


def test_digits_are_always_the_same() -> None:
    data = load_dataset("digits")
    assert data.fingerprints == {"train": "7b46e8a134ade0dc", "test": "7932264fcc11545a"}
    assert (len(data.train), len(data.val), len(data.test)) == (1294, 143, 360)
    assert data.train.shape == (1, 28, 28)
    assert torch.bincount(data.test.labels).tolist() == [36] * 10
    assert data.test.fingerprint == load_dataset("digits", seed=5).test.fingerprint
    assert data.val.fingerprint != load_dataset("digits", seed=5).val.fingerprint


def test_digits_are_scikit_learns_enlarged_bilinearly() -> None:
    from sklearn.datasets import load_digits

    data = load_dataset("digits")
    original = torch.from_numpy(load_digits().images).float()[:, None] * (255 / 16)
    enlarged = torch.nn.functional.interpolate(original, (20, 20), mode="bilinear")
    whole = torch.cat([data.train.images, data.val.images, data.test.images])
    assert not whole[:, :, :4].any()
    assert not whole[:, :, :, 24:].any()
    inner = whole[:, 0, 4:24, 4:24].float()
    nearest = torch.cdist(inner.flatten(1), enlarged.flatten(1)).argmin(1)
    assert (inner - enlarged[nearest][:, 0]).abs().max() <= 0.51
    assert len(nearest.unique()) == 1797


def test_splits_are_disjoint_and_leave_nothing_out(tmp_path: Path) -> None:
    train, _ = tiny(tmp_path / "data" / "tiny")
    data = load_dataset("hub:tiny", val=7, seed=2)
    both = torch.cat([data.train.index, data.val.index])
    assert len(data.val) == 7
    assert sorted(both.tolist()) == list(range(len(train)))
    for part in (data.train, data.val):
        assert np.array_equal(part.images.numpy().transpose(0, 2, 3, 1), train[part.index.numpy()])
        assert torch.equal(part.labels, part.index % 2)
    assert torch.equal(load_dataset("hub:tiny", val=7, seed=2).val.index, data.val.index)
    with pytest.raises(DataError, match=r"val 40 .* expected 1 to 39"):
        load_dataset("hub:tiny", val=40)


# Parquet ------------------------------------------------------------------------------------------------------------


def test_parquet_pixels_labels_and_names_come_through_exactly(tmp_path: Path) -> None:
    train, held_out = tiny(tmp_path / "data" / "tiny")
    data = load_dataset("hub:tiny")
    assert data.class_names == ["cat", "dog"]
    assert np.array_equal(data.test.images.numpy().transpose(0, 2, 3, 1), held_out)
    assert data.test.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert len(data.train) + len(data.val) == len(train)
    assert len(data.val) == 4


def test_parquet_without_the_hubs_metadata_and_with_other_column_names(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "plain"
    grey = pixels_of(20, channels=1)
    for split in ("train", "validation"):
        file = folder / f"{split}.parquet"
        write_parquet(file, grey, [i % 3 for i in range(20)], ["a", "b", "c"], image="img", label="fine_label")
        pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    data = load_dataset("hub:plain")
    assert data.class_names == ["0", "1", "2"]
    assert data.test.shape == (1, 8, 8)  # all of them are grey
    assert np.array_equal(data.test.images[:, 0].numpy(), grey)


def test_pictures_of_another_size_cover_the_asked_one(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "wide"
    picture = np.zeros((20, 12, 24, 3), np.uint8)
    picture[:, :, :6], picture[:, :, 18:] = 255, 255  # what the center crop cuts off
    for split in ("train", "test"):
        write_parquet(folder / f"{split}.parquet", picture, [0, 1] * 10, ["a", "b"])
    data = load_dataset("hub:wide", size=6)
    assert data.test.shape == (3, 6, 6)
    assert int(data.test.images[:, :, :, 1:5].max()) <= 10  # beside the cut, resampling lets a little in
    assert load_dataset("hub:wide").test.shape == (3, 12, 24)


def test_decoding_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "tiny"
    tiny(folder)
    first = load_dataset("hub:tiny")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)  # so not even imported again
        second = load_dataset("hub:tiny")
    assert second.train.fingerprint == first.train.fingerprint
    write_parquet(folder / "test-00000-of-00001.parquet", pixels_of(6, seed=9), [0, 1] * 3, ["cat", "dog"])
    assert load_dataset("hub:tiny").test.fingerprint != first.test.fingerprint


def test_damaged_caches_are_made_again(tmp_path: Path) -> None:
    tiny(tmp_path / "data" / "tiny")
    whole = prepare("hub:tiny")
    file = whole.folder / "test.pixels"
    file.write_bytes(file.read_bytes()[:-1])
    assert load_dataset("hub:tiny").test.fingerprint == whole.fingerprints["test"]
    file.write_bytes(bytes(file.stat().st_size))
    assert prepare("hub:tiny").fingerprints == whole.fingerprints
    assert load_dataset("hub:tiny").test.fingerprint == whole.fingerprints["test"]


def test_a_decoding_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path / "data" / "tiny")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store, "fingerprint", full)
        with pytest.raises(DataError, match=r"disk is full.*UNPERTURB_CACHE"):
            load_dataset("hub:tiny")
    left = [p.name for p in (tmp_path / "cache" / "data").iterdir() if p.name != "hub" and p.suffix != ".lock"]
    assert left == []
    assert len(load_dataset("hub:tiny").test) == 6


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The decoded pixels of a tiny set, in the cache."""
    tiny(tmp_path / "data" / "tiny")
    return prepare("hub:tiny").folder


@pytest.mark.parametrize("name", ["train.pixels", "train.labels", "test.pixels", "meta.json"])
@pytest.mark.parametrize("spoil", [lambda b: bytes(len(b)), lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]])
def test_decoded_pixels_that_changed_are_noticed_and_made_again(
    kept: Path, name: str, spoil: Callable[[bytes], bytes]
) -> None:
    file = kept / name
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    assert store.read(kept) is None
    load_dataset("hub:tiny")
    assert store.read(kept)
    assert name == "meta.json" or file.read_bytes() == whole


def test_of_a_large_file_other_blocks_are_read_each_time(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BLOCK", 64)
    monkeypatch.setattr(store, "WHOLE", 100)
    file = kept / "test.pixels"
    seal = store._seal(file)
    assert len(seal["digests"]) == 18  # of 6 * 3 * 8 * 8 bytes
    written = file.stat()

    def spoil() -> None:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    spoil()
    assert not store._is_whole(file, seal, False)  # it was written to, so all of it is read
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))  # as where a disk forgets
    found = [store._is_whole(file, seal, False) for _ in range(100)]  # misses the last of 18 blocks twice in 18
    assert 0 < found.count(False) < 100
    assert not store._is_whole(file, seal, True)
    spoil()
    os.utime(file, ns=(0, 0))  # as after a copy
    assert store._is_whole(file, seal, False)
    assert file.stat().st_mtime_ns == seal["written"]


def test_damage_that_a_look_would_miss_is_mended(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = (kept / "meta.json").read_text(encoding="utf-8")
    monkeypatch.setattr(store, "_is_whole", lambda file, seal, whole: not whole)  # only who reads all of it sees it
    made: list[str] = []

    def about() -> dict[str, Any]:
        made.append("again")
        return {"source": "toy"}

    store.write(kept, {"train": [(np.zeros((2, 1, 8, 8), np.uint8), [0, 1], True)]}, about)
    assert made == ["again"]
    assert (kept / "meta.json").read_text(encoding="utf-8") != meta


def test_mutated_meta_data_is_made_again(kept: Path) -> None:
    file = kept / "meta.json"
    whole = file.read_text(encoding="utf-8")
    for spoiled in (
        "",
        "[]",
        "null",
        whole.replace('"cat"', '"cow"'),
        whole.replace("40", "39"),
        whole + whole,
        "\n\n",
    ):
        file.write_text(spoiled, encoding="utf-8")
        assert store.read(kept) is None
    assert load_dataset("hub:tiny").class_names == ["cat", "dog"]


def test_many_that_decode_one_set_at_once_all_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path / "data" / "tiny")
    writes = []
    seal = store._seal
    monkeypatch.setattr(store, "_seal", lambda file: writes.append(file) or seal(file))
    with ThreadPoolExecutor(6) as pool:  # each takes the lock by a file of its own, as processes do
        prints = list(pool.map(lambda _: prepare("hub:tiny", cache=tmp_path / "one").fingerprints["test"], range(6)))
    assert len(set(prints)) == 1
    assert len(writes) == 4  # decoded once: pixels and labels of two splits


def test_what_a_kill_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    root = tmp_path / "cache" / "data"
    for name in (".old-0123456789ab-k1lled00", ".busy-0123456789ab-writ1ng0"):
        (root / name).mkdir(parents=True)
        (root / name / "train.pixels").write_bytes(b"half")
    sheet = tmp_path / "sheets" / f".hub-tiny.png.{'0' * 16}.tmp"
    sheet.parent.mkdir()
    sheet.write_bytes(b"half")
    os.utime(sheet, (0, 0))
    tiny(tmp_path / "data" / "tiny")
    with store._lock(root / "busy-0123456789ab"):
        prepare("hub:tiny", out=tmp_path / "sheets")
    assert [p.name for p in root.iterdir() if p.name[0] == "."] == [".busy-0123456789ab-writ1ng0"]
    assert [p.name for p in (tmp_path / "sheets").iterdir()] == ["hub-tiny.png"]


def test_no_link_that_somebody_planted_is_followed(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda n: "guessed")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hub-tiny.png.guessed.tmp").symlink_to(precious)
    with pytest.raises(DataError, match="File exists"):
        prepare("hub:tiny", out=tmp_path / "out")
    lock = kept.with_name(f"{kept.name}.lock")
    lock.unlink()
    lock.symlink_to(precious)
    (kept / "meta.json").unlink()
    with pytest.raises(DataError, match="could not be written: Too many levels of symbolic links"):
        load_dataset("hub:tiny")
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_sheet_that_cannot_be_written_is_a_sentence(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(DataError, match=r"sheets/hub-tiny\.png could not be written: .*hoose another folder"):
        prepare("hub:tiny", out=tmp_path / "sheets")
    assert list((tmp_path / "sheets").iterdir()) == []


def test_a_place_that_is_no_folder_is_a_sentence(tmp_path: Path) -> None:
    tiny(tmp_path / "data" / "tiny")
    (tmp_path / "file").write_text("")
    for options in ({"cache": tmp_path / "file"}, {"out": tmp_path / "file"}, {"out": tmp_path / ("x" * 300)}):
        with pytest.raises(DataError, match=r"could not be written|cannot be read"):
            prepare("hub:tiny", **options)
    for name in ("folder:a\0b", "folder:" + "x" * 5000, "hub:" + "x" * 300, "folder:~nobody-of-that-name/x"):
        with pytest.raises(DataError):
            load_dataset(name)


def test_a_set_larger_than_the_disk_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path / "data" / "tiny")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=46 * 3 * 8 * 8 - 1))
    with pytest.raises(DataError, match=r"decoded takes 0\.0 GB.*take a smaller size"):
        load_dataset("hub:tiny")


@pytest.mark.parametrize("options", [{"size": "8"}, {"size": 0}, {"size": (8, 8)}, {"size": 10**5}, {"val": 0.1}])
def test_numbers_that_are_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(options))} .*expected a"):
        load_dataset("digits", **options)


def test_large_pictures_are_decoded_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path / "data" / "tiny")
    monkeypatch.setattr(store, "CHUNK_BYTES", 10 * 3 * 8 * 8)
    steps: list[int] = []
    load_dataset("hub:tiny", progress=lambda done, total, what: steps.append(done))
    assert steps == [10, 20, 30, 40, 46]


# The order of classes -----------------------------------------------------------------------------------------------


def test_labels_are_renumbered_by_name(tmp_path: Path) -> None:
    tiny(tmp_path / "data" / "tiny")
    plain = load_dataset("hub:tiny")
    for data in (
        load_dataset("hub:tiny", class_names=["dog", "cow", "cat"]),
        plain.with_class_names(["dog", "cow", "cat"]),
    ):
        assert data.class_names == data.test.class_names == ["dog", "cow", "cat"]
        assert data.test.labels.tolist() == [2, 0, 2, 0, 2, 0]
        assert data.test.fingerprint != plain.test.fingerprint
        assert data.fingerprints == plain.fingerprints  # of the copy as it was read
    assert plain.test.with_class_names(["cat", "dog"]) is plain.test


def test_a_mapped_set_with_other_labels_is_another_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sets, "IN_MEMORY", 0)
    monkeypatch.setattr("unperturb.data.load.IN_MEMORY", 0)
    tiny(tmp_path / "data" / "tiny")
    one = load_dataset("hub:tiny").test
    other = one.with_class_names(["dog", "cat"])
    assert other.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert other.fingerprint != one.fingerprint


def test_names_that_do_not_meet_are_listed() -> None:
    data = image_set()
    with pytest.raises(DataError, match=r"class_names lacks: cat; class_names has, and x lacks: Cat, cow\."):
        data.with_class_names(["Cat", "dog", "cow"])
    with pytest.raises(DataError, match="names twice: dog"):
        data.with_class_names(["dog", "cat", "dog"])
    for wrong in ("cat", [0, 1]):
        with pytest.raises(DataError, match="expected a list of names"):
            data.with_class_names(wrong)  # type: ignore[arg-type]


# Errors -------------------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_choices_and_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'cifar10'\? Choices: .*folder:PATH"):
        load_dataset("cifar-10")


def test_a_missing_source_says_where_it_looked_and_what_prepares_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset("mnist")
    message = str(caught.value)
    assert str(tmp_path / "data" / "mnist") in message
    assert "ylecun/mnist" in message
    assert "unperturb prepare mnist" in message


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "tiny"
    tiny(folder)
    file = folder / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet is truncated"):
        load_dataset("hub:tiny")


def test_a_picture_broken_inside_is_named_with_its_row(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "tiny"
    tiny(folder)
    file = folder / "test-00000-of-00001.parquet"
    table = pq.read_table(file)
    rows = table["image"].to_pylist()
    rows[4]["bytes"] = rows[4]["bytes"][:60]
    broken = table.set_column(0, table.schema.field("image"), pa.array(rows, table.schema.field("image").type))
    pq.write_table(broken, file)
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet, row 4: not a whole picture"):
        load_dataset("hub:tiny")


def test_wrong_counts_say_expected_and_found(tmp_path: Path) -> None:
    tiny(tmp_path / "data" / "cifar10")
    with pytest.raises(DataError, match=r"40 train \+ 6 test images; cifar10 has 50,000 \+ 10,000"):
        load_dataset("cifar10")


def test_a_source_without_pictures_or_train_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "odd"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), folder / "test.parquet")
    with pytest.raises(DataError, match="no train split; it has: test"):
        load_dataset("hub:odd")
    (folder / "test.parquet").rename(folder / "train.parquet")
    with pytest.raises(DataError, match=r"no column of pictures: text \(text\), label \(number\)\. Expected an Image"):
        load_dataset("hub:odd")


# Folders and the hub ------------------------------------------------------------------------------------------------


def write_pictures(root: Path, counts: dict[str, int], **options: Any) -> None:
    for k, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i, one in enumerate(pixels_of(n, seed=k, **options)):
            Image.fromarray(one).save(root / name / f"{i:03}.png")


def test_class_folders_are_split_80_10_10(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pets", {"cat": 30, "dog": 20}, channels=1)
    data = load_dataset(f"folder:{tmp_path / 'pets'}")
    assert (len(data.train), len(data.val), len(data.test)) == (40, 5, 5)
    assert data.class_names == ["cat", "dog"]
    assert data.train.shape == (1, 8, 8)
    index = torch.cat([data.train.index, data.val.index, data.test.index])
    assert sorted(index.tolist()) == list(range(50))
    everything = np.concatenate([pixels_of(30, 1), pixels_of(20, 1, seed=1)])
    assert np.array_equal(data.test.images[:, 0].numpy(), everything[data.test.index.numpy()])
    assert torch.equal(data.test.labels, (data.test.index >= 30).long())
    assert torch.equal(load_dataset(f"folder:{tmp_path / 'pets'}", seed=7).test.index, data.test.index)


def test_folders_with_their_own_splits_sizes_and_one_color_picture(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    for split, n in (("train", 12), ("validation", 3), ("test", 4)):
        write_pictures(root / split, {"cat": n, "dog": n}, channels=1)
    Image.fromarray(pixels_of(1, side=16)[0]).save(root / "train" / "cat" / "color.png")
    with pytest.warns(UserWarning, match="24 of 25 pictures"):
        data = load_dataset(f"folder:{root}")
    assert (len(data.train), len(data.val), len(data.test)) == (25, 6, 8)
    assert data.train.shape == (3, 8, 8)
    assert load_dataset(f"folder:{root}", size=5).train.shape == (3, 5, 5)


def test_folder_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        load_dataset(f"folder:{tmp_path / 'nowhere'}")
    write_pictures(tmp_path / "one", {"cat": 3})
    with pytest.raises(DataError, match="1 classes; expected two or more class folders"):
        load_dataset(f"folder:{tmp_path / 'one'}")
    write_pictures(tmp_path / "two" / "train", {"cat": 3, "dog": 3})
    write_pictures(tmp_path / "two" / "test", {"cow": 3})
    with pytest.raises(DataError, match=r"cow.*does not have \(cat, dog\)"):
        load_dataset(f"folder:{tmp_path / 'two'}")
    write_pictures(tmp_path / "three", {"cat": 12, "dog": 12})
    (tmp_path / "three" / "cat" / "003.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"003\.png: not a whole picture"):
        load_dataset(f"folder:{tmp_path / 'three'}")


def counts(root: Path) -> tuple[int, int, int]:
    data = load_dataset(f"folder:{root}")
    return len(data.train), len(data.val), len(data.test)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Valid", "Test"),
        ("training", "dev", "testing"),
        ("TRAIN", "validation", "test"),
        ("train", "Val", "TEST"),
    ],
)
def test_splits_go_by_any_of_their_names(tmp_path: Path, train: str, val: str, test: str) -> None:
    for split, n in ((train, 6), (val, 2), (test, 3)):
        write_pictures(tmp_path / "pets" / split, {"cat": n, "dog": n})
    assert counts(tmp_path / "pets") == (12, 4, 6)
    there = {train: 1, val: 2, test: 3}
    assert sources.choose_splits(there, "x") == {"train": 1, "val": 2, "test": 3}
    with pytest.raises(DataError, match=rf"x has two train splits, {train} and train2?"):
        sources.choose_splits({**there, "training" if train != "training" else "train": 4}, "x")


def test_splits_without_class_folders_are_no_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "flat", {"Train": 3, "Test": 3})
    with pytest.raises(DataError, match=r"Test holds no class folders; expected one folder per class"):
        load_dataset(f"folder:{tmp_path / 'flat'}")
    write_pictures(tmp_path / "half" / "Test", {"cat": 3, "dog": 3})
    with pytest.raises(DataError, match="no train split; it has: Test"):
        load_dataset(f"folder:{tmp_path / 'half'}")
    write_pictures(tmp_path / "vehicles", {"bus": 12, "train": 12})
    assert load_dataset(f"folder:{tmp_path / 'vehicles'}").class_names == ["bus", "train"]


def test_what_is_hidden_is_no_class_and_what_is_left_aside_is_said(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write_pictures(root, {"cat": 12, "dog": 12, ".ipynb_checkpoints": 3, "cat/.cache": 2, "dog/more": 4})
    (root / "dog" / "notes.txt").write_text("")
    (root / "dog" / "phone.HEIC").write_bytes(b"x")
    (root / "empty").mkdir()
    Image.fromarray(pixels_of(1)[0]).save(root / "loose.png")
    with pytest.warns(UserWarning, match=r"left aside|no classes") as warned:
        data = load_dataset(f"folder:{root}")
    assert data.class_names == ["cat", "dog"]
    assert len(data.train) + len(data.val) + len(data.test) == 28
    said = " ".join(str(one.message) for one in warned)
    assert "1 .txt" in said
    assert "1 .heic" in said
    assert "1 pictures outside the class folders" in said
    assert "which are no classes: empty" in said
    assert all(note in str(prepare(f"folder:{root}")) for note in data.notes)
    write_pictures(tmp_path / "phone", {"cat": 1, "dog": 0})
    (tmp_path / "phone" / "dog" / "1.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"1 classes; .*\(found 1 \.heic\)"):
        load_dataset(f"folder:{tmp_path / 'phone'}")


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    write_pictures(tmp_path / "store", {"cat": 12, "dog": 12})
    root = tmp_path / "pets"
    root.mkdir()
    (root / "dog").symlink_to(tmp_path / "store" / "dog")
    (root / "cat").symlink_to(tmp_path / "store" / "cat")
    assert sum(counts(root)) == 24
    (tmp_path / "store" / "cat" / "again").symlink_to(root)
    with pytest.raises(DataError, match=r"again(/cat|/dog|) is a link to .*, which is read already"):
        counts(root)
    (tmp_path / "store" / "cat" / "again").unlink()
    (root / "cow").symlink_to("nowhere")
    with pytest.raises(DataError, match="cow is a broken link"):
        counts(root)


def test_all_damaged_pictures_are_listed_or_left_out(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write_pictures(root, {"cat": 12, "dog": 12})
    (root / "cat" / "000.png").write_bytes(b"")
    (root / "cat" / "003.png").write_bytes(b"no picture")
    (root / "dog" / "004.png").write_bytes((root / "dog" / "004.png").read_bytes()[:60])
    os.mkfifo(root / "dog" / "pipe.png")
    (root / "dog" / "link.png").symlink_to("nowhere.png")
    name = f"folder:{root}"
    with pytest.raises(DataError, match=r"5 of 26 pictures .*--skip-damaged") as caught:
        load_dataset(name)
    for file in ("000.png: ", "003.png: ", "004.png: ", "pipe.png: ", "link.png: "):
        assert file in str(caught.value)
    with pytest.warns(UserWarning, match=r"5 of 26 pictures left out: .*000\.png: .* and 2 more"):
        data = load_dataset(name, skip_damaged=True)
    everything = torch.cat([data.train.labels, data.val.labels, data.test.labels])
    assert torch.bincount(everything).tolist() == [10, 11]
    assert data.left_out == 5
    assert known_copy_note(data) == "5 pictures that cannot be used left out"
    with pytest.raises(DataError, match="5 of 26"):  # what was decoded without them is not taken for the whole
        load_dataset(name)
    for file in (root / "dog").iterdir():
        file.unlink()
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"16 of 26 .* and 11 more"):
        load_dataset(name)


def test_the_size_that_was_chosen_is_stated_with_its_reason(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write_pictures(root, {"cat": 12, "dog": 12})
    assert prepare(f"folder:{root}").size == "8x8, that of all 24 pictures looked at"
    assert prepare(f"folder:{root}", size=6).size == "6x6, as asked"
    Image.fromarray(np.zeros((9, 16, 3), np.uint8)).save(root / "cat" / "wide.png")
    with pytest.warns(
        UserWarning, match="8x8, that of 24 of 25 pictures looked at; the others were resized and cropped"
    ):
        load_dataset(f"folder:{root}")
    assert "8x8, that of 24 of 25" in str(prepare(f"folder:{root}"))


def test_metadata_that_the_hubs_library_wrote_is_read_as_it_reads_it(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"img": ImageFeature(), "fine_label": ClassLabel(names=["cat", "dog"])})
    made = Dataset.from_dict(
        {"img": [Image.fromarray(one) for one in pixels_of(20)], "fine_label": [0, 1] * 10}, features
    )
    folder = tmp_path / "data" / "theirs"
    folder.mkdir(parents=True)
    made.to_parquet(str(folder / "train.parquet"))
    ours = load_dataset("hub:theirs")
    assert ours.class_names == ["cat", "dog"]
    assert np.array_equal(ours.train.images.numpy().transpose(0, 2, 3, 1), pixels_of(20)[ours.train.index.numpy()])
    streamed = load_dataset(f"hub:{folder}")
    assert streamed.train.fingerprint == ours.train.fingerprint


def test_pictures_of_a_repository_on_disk_stay_in_it(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    rows = [{"bytes": None, "path": str(root / "a.png")}, {"bytes": None, "path": str(tmp_path / "secret.png")}] * 10
    for file in ("repository/a.png", "secret.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(png(pixels_of(1)[0]))
    pq.write_table(pa.table({"image": pa.array(rows, PICTURE), "label": [0, 1] * 10}), root / "train.parquet")
    with pytest.raises(DataError, match=r"10 of 20 .*row 1: .*secret\.png, outside the data set"):
        load_dataset(f"hub:{root}")


def test_a_hub_data_set_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `datasets` reads a folder laid out as a hub repository by the same call as the hub's own.
    monkeypatch.delenv("UNPERTURB_DATA")
    train, held_out = tiny(tmp_path / "repository" / "data", test="validation")
    data = load_dataset(f"hub:{tmp_path / 'repository'}")
    assert np.array_equal(data.test.images.numpy().transpose(0, 2, 3, 1), held_out)
    assert len(data.train) + len(data.val) == len(train)


def test_a_test_split_without_labels_gives_way_to_validation(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "withheld"
    _, held_out = tiny(folder, test="validation")
    write_parquet(folder / "test.parquet", pixels_of(5, seed=3), [-1] * 5, ["cat", "dog"])
    data = load_dataset("hub:withheld")
    assert np.array_equal(data.test.images.numpy().transpose(0, 2, 3, 1), held_out)


def test_a_repository_that_is_a_program_is_read_from_the_hubs_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[dict[str, Any]] = []

    def load(name: str, *args: object, **options: Any) -> str:
        calls.append({"name": name, "args": args, **options})
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found imagenette.py")
        return "streams"

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert tables._open_hub("frgfm/imagenette", "160px", Path("cache")) == "streams"
    assert calls[1]["revision"] == "refs/convert/parquet"
    assert calls[1]["data_dir"] == "160px"


# Prepare ------------------------------------------------------------------------------------------------------------


def test_prepare_reports_and_draws_what_is_there(tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    tiny(tmp_path / "data" / "tiny")
    report = prepare("hub:tiny", out=tmp_path / "sheets", progress=lambda *step: steps.append(step))
    assert steps == [(40, 46, "train"), (46, 46, "test")]
    assert report.counts == {"train": 36, "val": 4, "test": 6}
    assert report.fingerprints == load_dataset("hub:tiny").fingerprints
    assert not report.known
    assert report.fingerprints["train"] in str(report)
    sheet = np.asarray(Image.open(report.sheet))
    data = load_dataset("hub:tiny").train
    first = data.images[data.labels == 0][0].numpy().transpose(1, 2, 0)
    side = 72  # 8 pixels, each 9 wide
    column = sheet.shape[1] - 12 - 10 * (side + 4) + 4
    assert np.array_equal(sheet[12 : 12 + side : 9, column : column + side : 9], first)


def test_known_copies_are_told_from_others() -> None:
    digits = load_dataset("digits")
    assert prepare("digits").known
    assert known_copy_note(digits) == ""
    resized = load_dataset("digits", size=20)
    assert resized.train.shape == (1, 20, 20)
    assert "not a copy known here" in known_copy_note(resized)


# Augmentation -------------------------------------------------------------------------------------------------------


def naive(images: Tensor, index: Tensor, seed: int, step: int, pad: int, flip: bool, cutout: int) -> Tensor:
    """One image at a time, by padding, cropping, mirroring and blackening."""
    _, _, h, w = images.shape
    u = per_image_rng.uniform(seed ^ sets._AUGMENT, index, step, (5,))
    out = []
    for image, (uy, ux, uf, cy, cx) in zip(images.numpy(), u.tolist()):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        top, left = int(uy * (2 * pad + 1)), int(ux * (2 * pad + 1))
        one = padded[:, top : top + h, left : left + w].copy()
        if flip and uf < 0.5:
            one = one[:, :, ::-1].copy()
        y, x = int(cy * h) - cutout // 2, int(cx * w) - cutout // 2
        one[:, max(y, 0) : max(y + cutout, 0), max(x, 0) : max(x + cutout, 0)] = 0
        out.append(torch.from_numpy(one))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("pad", "flip", "cutout"), [(2, True, 0), (0, True, 0), (3, False, 3), (4, True, 4), (0, False, 5)]
)
@pytest.mark.parametrize("make", [lambda: torch.rand(64, 3, 8, 10), lambda: torch.randint(256, (64, 1, 9, 8)).byte()])
def test_augmentation_is_what_a_loop_over_images_does(
    make: Callable[[], Tensor], pad: int, flip: bool, cutout: int
) -> None:
    images, index = make(), torch.arange(100, 164)
    done = augment(images, index, seed=3, step=5, pad=pad, flip=flip, cutout=cutout)
    assert torch.equal(done, naive(images, index, 3, 5, pad, flip, cutout))


def test_augmentation_belongs_to_the_image_not_to_its_batch() -> None:
    images, index = torch.rand(10, 1, 8, 8), torch.arange(10)
    whole = augment(images, index, seed=0, step=1, pad=2, flip=True)
    assert torch.equal(whole[4:7], augment(images[4:7], index[4:7], seed=0, step=1, pad=2, flip=True))
    assert not torch.equal(whole, augment(images, index, seed=0, step=2, pad=2, flip=True))
    assert augment(images, index, seed=0, step=1) is images


def test_every_shift_comes_about_equally_often() -> None:
    n = 9000
    place = torch.zeros(1, 1, 7, 7)
    place[0, 0, 3, 3] = 1
    moved = augment(place.expand(n, 1, 7, 7), torch.arange(n), seed=0, step=0, pad=1).mean(0)[0]
    assert moved[2:5, 2:5].sum() == pytest.approx(1, abs=1e-4)
    assert (moved[2:5, 2:5] - 1 / 9).abs().max() < 4 * (1 / 9 * 8 / 9 / n) ** 0.5  # four standard deviations


def test_too_wide_a_shift_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 to 7"):
        augment(torch.rand(1, 1, 8, 8), torch.arange(1), seed=0, step=0, pad=8)


# Real data ----------------------------------------------------------------------------------------------------------

REAL = os.environ.get("UNPERTURB_DATA", "")


@pytest.mark.data
@pytest.mark.skipif(not (Path(REAL) / "mnist").is_dir(), reason="no mnist under $UNPERTURB_DATA")
def test_real_mnist_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_DATA", REAL)
    report = prepare("mnist")
    assert report.counts == {"train": 55_000, "val": 5_000, "test": 10_000}
    assert report.fingerprints == {"train": "17e018a699dc8e4c", "test": "c7ea42a72a37a449"}
    assert report.copy == "exact, in the official order"
    # The first ten labels of the official test file.
    assert load_dataset("mnist").test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
