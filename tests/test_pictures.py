"""Pictures and Parquet files as people, cameras and attackers make them: the right pixels, or one sentence."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shlex
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import EpsImagePlugin, Image
from typer.main import get_command

import unperturb
from unperturb import cli
from unperturb.data import DataError, load_dataset, pictures, tables
from unperturb.data.pictures import Picture, decode, picture_size
from unperturb.recipe_files import read_recipe

PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
UPRIGHT = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20, np.ones((8, 8), np.uint8))  # 24 x 32
# How a picture lies in the file for each orientation: what undoes the turn that a viewer makes.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNPERTURB_DATA", str(tmp_path / "data"))


def encoded(pixels: NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def picture(data: bytes | Path) -> Picture:
    return Picture(data, 0, "here")


def grey(data: bytes, size: tuple[int, int] = (8, 8)) -> NDArray[np.uint8]:
    return decode(picture(data), size, grey=True)[0]


def parquet(file: Path, columns: dict[str, Any], types: dict[str, Any] | None = None, features: Any = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({k: pa.array(v, (types or {}).get(k)) for k, v in columns.items()})
    said = {"huggingface": features if isinstance(features, str) else json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(said if features is not None else None), file)
    return file


def rows(n: int = 20) -> list[dict[str, Any]]:
    """`n` grey pictures, each of one value, as a column of Parquet."""
    return [{"bytes": encoded(np.full((8, 8), i, np.uint8)), "path": None} for i in range(n)]


# The right pixels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
def test_every_format_is_turned_as_its_exif_says(kind: str, options: dict[str, Any], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(STORED[orientation], kind, exif=exif, **options)
    assert picture_size(picture(data)) == (24, 32)
    found = grey(data, (24, 32))
    assert np.abs(found.astype(int) - UPRIGHT).max() <= (3 if kind == "JPEG" else 0)


def test_exif_that_is_damaged_turns_nothing() -> None:
    data = encoded(UPRIGHT, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert picture_size(picture(data)) == (24, 32)
    assert grey(data, (24, 32)).shape == (24, 32)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_those_of_the_full_range(kind: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    assert np.array_equal(grey(encoded(values, kind)), np.rint(values / 257).astype(np.uint8))


def test_floats_from_0_to_1_are_scaled_to_8_bits() -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert np.array_equal(grey(encoded(values, "TIFF")), np.rint(values * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((8, 8), 200, np.uint16), "no value above 200 of 65535"),
        (np.full((8, 8), 4095, np.uint16), "no value above 4095 of 65535"),
        (np.full((8, 8), 200, np.int32), "32-bit integers"),
        (np.full((8, 8), 200, np.float32), "floats from 200 to 200, expected 0 to 1"),
        (np.full((8, 8), -0.5, np.float32), "expected 0 to 1"),
        (np.full((8, 8), np.nan, np.float32), "expected 0 to 1"),
    ],
)
def test_pixels_whose_white_is_not_known_are_refused_not_loaded_black(values: NDArray[Any], said: str) -> None:
    with pytest.raises(DataError, match=f"here: not a whole picture .*{said}"):
        grey(encoded(values, "TIFF"))


def test_a_black_picture_of_16_bits_is_black() -> None:
    assert not grey(encoded(np.zeros((8, 8), np.uint16))).any()


@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_every_format_of_the_list_is_read(kind: str) -> None:
    assert np.abs(grey(encoded(UPRIGHT, kind), (24, 32)).astype(int) - UPRIGHT).max() <= 6


# What is no picture -------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"


def test_no_program_is_handed_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript ran")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ran)
    with Image.open(io.BytesIO(EPS)) as opened, pytest.raises(AssertionError, match="Ghostscript ran"):
        opened.load()  # as it would be without a list of formats
    with pytest.raises(DataError, match=r"here: not a whole picture \(of no format"):
        grey(EPS)
    file = tmp_path / "eps.png"
    file.write_bytes(EPS)
    with pytest.raises(DataError, match=r"here: not a whole picture \(of no format"):
        picture_size(picture(file))
    parquet(
        tmp_path / "data" / "eps" / "train.parquet", {"image": [{"bytes": EPS, "path": None}] * 4, "label": [0] * 4}
    )
    with pytest.raises(DataError, match=r"4 of 4 pictures of hub:eps .*row 0: not a whole picture"):
        load_dataset("hub:eps")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, and ends."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunks + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [13_000, 50_000])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(DataError, match=r"not a whole picture \(.*pixels"):
        grey(png_header(side, side))


def test_a_large_photograph_is_decoded_small_and_a_large_png_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1_000)
    large = np.kron(UPRIGHT, np.ones((8, 8), np.uint8))  # 192 x 256
    assert grey(encoded(large, "JPEG")).shape == (8, 8)
    for data in (encoded(large), encoded(large, "JPEG", progressive=True)):
        with pytest.raises(DataError, match="256x192 pixels, more than the 1,000 that are decoded"):
            grey(data)


def test_a_strip_does_not_grow_without_end() -> None:
    with pytest.raises(DataError, match="4000x1 pixels: too thin a strip for 100x100"):
        grey(encoded(np.zeros((1, 4000), np.uint8)), (100, 100))
    assert grey(encoded(np.zeros((8, 100), np.uint8)), (8, 8)).shape == (8, 8)


def test_pixels_decoded_at_once_stay_under_their_limit() -> None:
    budget = pictures._Budget()
    together, most = [0], [0]
    guard = threading.Lock()

    def work(pixels: int) -> None:
        for _ in range(20):
            with budget.take(pixels):
                with guard:
                    together[0] += pixels
                    most[0] = max(most[0], together[0])
                with guard:
                    together[0] -= pixels

    threads = [threading.Thread(target=work, args=(pictures.MAX_PIXELS // k,)) for k in (1, 2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most[0] <= pictures.MAX_PIXELS
    assert budget.free == pictures.MAX_PIXELS


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: file.symlink_to("nowhere.png"), "No such file"),
        (lambda file: file.symlink_to(file), "Too many levels of symbolic links"),
        (lambda file: file.symlink_to("/dev/zero"), "not a regular file"),
        (os.mkfifo, "not a regular file"),
        (lambda file: file.write_bytes(b""), "empty"),
        (lambda file: file.write_bytes(encoded(UPRIGHT)[:-50]), "truncated"),
        (lambda file: file.mkdir(), "not a regular file"),
    ],
    ids=["broken link", "loop", "device", "pipe", "empty", "truncated", "folder"],
)
def test_a_file_that_is_no_whole_picture_is_named(tmp_path: Path, make: Any, said: str) -> None:
    file = tmp_path / "cat.png"
    make(file)
    with pytest.raises(DataError, match=f"here: not a whole picture .*{said}"):
        decode(picture(file), (8, 8), grey=True)


# Parquet ------------------------------------------------------------------------------------------------------------


def test_the_column_called_image_is_taken_not_the_mask_before_it(tmp_path: Path) -> None:
    black = [{"bytes": encoded(np.zeros((8, 8), np.uint8)), "path": None}] * 20
    columns = {"mask": black, "image": rows(), "label": [0, 1] * 10}
    parquet(tmp_path / "data" / "masks" / "train.parquet", columns)
    data = load_dataset("hub:masks")
    assert torch.equal(data.train.images[:, 0, 0, 0], data.train.index.byte())
    parquet(tmp_path / "data" / "two" / "train.parquet", {"left": black, "right": rows(), "label": [0, 1] * 10})
    with pytest.raises(DataError, match=r"several columns of pictures: left \(image\), right \(image\)"):
        load_dataset("hub:two")


def test_labels_that_are_names_become_classes_in_sorted_order(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "named"
    parquet(folder / "train.parquet", {"image": rows(), "label": ["dog", "cat"] * 10})
    parquet(folder / "test.parquet", {"image": rows(2), "label": ["cat", "dog"]})
    data = load_dataset("hub:named")
    assert data.class_names == ["cat", "dog"]
    assert data.test.labels.tolist() == [0, 1]
    parquet(folder / "test.parquet", {"image": rows(3), "label": ["cat", "cow", None]})
    with pytest.raises(DataError, match=r"test\.parquet, row 1: .*'cow', which train does not have \(cat, dog\)"):
        load_dataset("hub:named")
    parquet(folder / "train.parquet", {"image": rows(), "label": [f"a picture of number {i}" for i in range(20)]})
    with pytest.raises(DataError, match="column label holds 20 texts in 20 rows"):
        load_dataset("hub:named")


def test_labels_with_gaps_as_pandas_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "data" / "gaps" / "train.parquet"
    parquet(file, {"image": rows(), "label": [1.0, float("nan")] + [0.0, 1.0] * 9})
    with pytest.raises(DataError, match=r"1 of 20 .*train\.parquet, row 1: .*no label"):
        load_dataset("hub:gaps")
    with pytest.warns(UserWarning, match="1 of 20 pictures left out"):
        data = load_dataset("hub:gaps", skip_damaged=True)
    assert (len(data.train) + len(data.val) + len(data.test), data.left_out) == (19, 1)
    assert data.class_names == ["0", "1"]


def test_a_first_label_that_is_none_does_not_drop_the_test_split(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "kept"
    parquet(folder / "train.parquet", {"image": rows(), "label": [0, 1] * 10})
    parquet(folder / "test.parquet", {"image": rows(4), "label": [None, 0, 1, 0]}, {"label": pa.int64()})
    with pytest.raises(DataError, match=r"1 of 24 .*test\.parquet, row 0: .*no label"):
        load_dataset("hub:kept")
    parquet(folder / "test.parquet", {"image": rows(4), "label": [-1] * 4}, {"label": pa.int64()})
    with pytest.warns(UserWarning, match="the labels of its test split are kept back"):
        assert len(load_dataset("hub:kept").test) == 2  # of the 20 in train


def test_numbers_that_are_no_classes_are_named(tmp_path: Path) -> None:
    parquet(tmp_path / "data" / "floats" / "train.parquet", {"image": rows(), "label": [0.0, 2.5] * 10})
    with pytest.raises(DataError, match=r"train\.parquet, row 1: label 2\.5; expected whole numbers, or names"):
        load_dataset("hub:floats")


def test_a_set_of_few_pictures_and_a_folder_without_its_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "data" / "few" / "train.parquet", {"image": rows(4), "label": [0, 1] * 2})
    few = load_dataset("hub:few")
    assert (len(few.train), len(few.val), len(few.test)) == (2, 1, 1)
    parquet(tmp_path / "data" / "two" / "train.parquet", {"image": rows(2), "label": [0, 1]})
    with pytest.raises(DataError, match="hub:two has too few images to split"):
        load_dataset("hub:two")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="Say folder:photos"):
        load_dataset("photos")


@pytest.mark.parametrize("bands", [2, 4])
def test_what_is_drawn_in_transparency_alone_is_seen_on_white(bands: int) -> None:
    pixels = np.zeros((8, 8, bands), np.uint8)
    pixels[:4, :, -1] = 255  # black where it is opaque
    found = grey(encoded(pixels))
    assert (found[:4].max(), found[4:].min()) == (0, 255)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (2**40, "row 7: label 1099511627776; .*count from 0 to 99,999"),
        (-1, "row 7: .*label -1"),
        (0.5, "row 7: label 0.5; expected whole"),
    ],
)
def test_a_label_that_is_none_is_named_by_its_row(tmp_path: Path, label: Any, said: str) -> None:
    labels: list[Any] = [0, 1] * 10
    labels[7] = label
    parquet(tmp_path / "data" / "odd" / "train.parquet", {"image": rows(), "label": labels})
    with pytest.raises(DataError, match=said):
        load_dataset("hub:odd")


def test_splits_whose_classes_stand_in_another_order_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "order"
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        parquet(folder / f"{split}.parquet", {"image": rows(), "label": [0, 1] * 10}, features=features)
    with pytest.raises(DataError, match=r"test\.parquet: its labels .*\(label dog, cat; label cat, dog\)"):
        load_dataset("hub:order")


def test_a_path_in_a_row_is_followed_inside_the_data_set_only(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "paths"
    inside = rows()
    inside[3] = {"bytes": None, "path": "more/three.png"}
    parquet(folder / "train.parquet", {"image": inside, "label": [0, 1] * 10}, {"image": PICTURE})
    (folder / "more").mkdir()
    (folder / "more" / "three.png").write_bytes(encoded(np.full((8, 8), 3, np.uint8)))
    everything = load_dataset("hub:paths")
    assert torch.equal(everything.train.images[:, 0, 0, 0], everything.train.index.byte())
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(UPRIGHT))
    (folder / "more" / "link.png").symlink_to(secret)
    outside = [
        "/dev/zero",
        str(secret),
        "../../secret.png",
        "more/link.png",
        "http://127.0.0.1:9/a.png",
        "\0",
        "",
        None,
    ]
    for n, path in enumerate(outside):
        inside[n] = {"bytes": None, "path": path}
    parquet(folder / "train.parquet", {"image": inside, "label": [0, 1] * 10}, {"image": PICTURE})
    with pytest.raises(DataError, match=r"8 of 20 .*row 0: .*/dev/zero, outside the data set.*and 3 more"):
        load_dataset("hub:paths")


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("hf://datasets/me/pets@abc/a.png", True),
        ("zip://a/b.png::hf://datasets/me/pets@abc/a.zip", True),
        ("hf://datasets/me/pets@abc/../../you/pets@abc/a.png", False),
        ("hf://datasets/me/pets2@abc/a.png", False),
        ("hf://datasets/you/pets@abc/a.png", False),
        ("zip://a.png::http://127.0.0.1/a.zip", False),
        ("filecache::hf://datasets/me/pets@abc/a.png", False),
        ("http://169.254.169.254/hf://datasets/me/pets@abc/", False),
        ("/etc/passwd", False),
        ("me/pets/a.png", False),
    ],
)
def test_a_path_in_a_row_of_the_hub_stays_in_its_data_set(path: str, inside: bool) -> None:
    assert tables._is_of(path, "me/pets") is inside


@pytest.mark.parametrize("said", ["{", "[]", "[1]", '{"info": 3}', '{"info": {"features": {"label": {"names": 5}}}}'])
def test_metadata_that_is_none_is_a_sentence(tmp_path: Path, said: str) -> None:
    parquet(tmp_path / "data" / "meta" / "train.parquet", {"image": rows(), "label": [0, 1] * 10}, features=said)
    with pytest.raises(DataError, match=r"train\.parquet"):
        load_dataset("hub:meta")


# The guide ----------------------------------------------------------------------------------------------------------


def test_the_guides_lines_parse() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "own-photos.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```bash\n(.*?)```", guide, flags=re.S)).replace("\\\n", " ").splitlines()
    for line in lines:
        _, verb, *arguments = shlex.split(line)
        context = get_command(cli.app).commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]
        if "recipe" in context.params:
            recipe = read_recipe(context.params["recipe"], context.params["overrides"])
            assert (recipe.dataset, recipe.size) == ("folder:photos", 96)
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.S)
    assert lines
    assert blocks
    for block in blocks:
        compile(block, "own-photos.md", "exec")
        assert all(hasattr(unperturb, name) for name in re.findall(r"\bup\.(\w+)", block))


# Mutations ----------------------------------------------------------------------------------------------------------


def mutations(data: bytes, seed: int, n: int) -> Iterator[bytes]:
    """`data` with bits flipped, parts cut, doubled, zeroed, or moved."""
    rng = random.Random(seed)
    for _ in range(n):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            a, b = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
            b = min(b, a + rng.randint(1, 16))
            kind = rng.randrange(6)
            if kind == 0:
                changed[a:b] = bytes(rng.randrange(256) for _ in range(b - a))
            elif kind == 1:
                changed[a:b] = bytes(b - a)
            elif kind == 2:
                changed[a:b] = b"\xff" * (b - a)
            elif kind == 3:
                del changed[a:b]
            elif kind == 4:
                changed[a:a] = changed[a:b]
            elif len(changed) > 1 and rng.random() < 0.3:
                del changed[rng.randrange(1, len(changed)) :]
        yield bytes(changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_a_mutated_picture_is_pixels_or_a_sentence(kind: str) -> None:
    good = encoded(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8), kind)
    said = []
    for data in mutations(good, seed=len(kind), n=40):
        for use in (lambda p: decode(p, (8, 8), grey=False)[0].shape == (8, 8, 3), picture_size):
            try:
                assert use(picture(data))
            except DataError as error:
                said.append(str(error))
    assert said
    assert not [one for one in said if not one.startswith("here: not a whole picture (") or "\n" in one]


@pytest.mark.filterwarnings("ignore")
def test_a_mutated_parquet_file_is_pictures_or_a_sentence(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    small = [{"bytes": encoded(np.zeros((1, 1), np.uint8)), "path": None}] * 4
    file = parquet(tmp_path / "train.parquet", {"image": small, "label": [0, 1] * 2}, features=features)
    said = []
    for data in mutations(file.read_bytes(), seed=1, n=200):
        file.write_bytes(data)
        try:
            found = tables.find_parquet("x", {"train": [file]}, None)
            found.class_names()
            assert all(isinstance(one, Picture) for one in found.splits["train"]())
        except DataError as error:
            said.append(str(error))
    assert said
    assert not [one for one in said if "train.parquet" not in one or "\n" in one]
