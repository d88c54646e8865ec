"""The service, asked over HTTP on this machine: right answers to right pictures, limits, overload, a graceful end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance
from torch import Tensor, nn

import unperturb as up
from digit_nets import digit_net, known
from unperturb.data.pictures import Picture, decode
from unperturb.defenses import create_defense
from unperturb.defenses.base import Protected
from unperturb.serving import Limits, load_protected, running, serve
from unperturb.serving.batching import Batcher, QueueFullError
from unperturb.serving.server import read_token

ROOT = Path(__file__).resolve().parent.parent
SIZE = 16
ANY: dict[str, Any] = {"size": SIZE, "channels": 1, "device": "cpu"}


def protected(defense: str = "median") -> Protected:
    return Protected(digit_net(), create_defense(defense)).eval()


def pixels(n: int = 8) -> list[NDArray[np.uint8]]:
    """Digits that the net gets right, `(16, 16)` of 8 bits."""
    return [(image[0] * 255).round().numpy().astype(np.uint8) for image in known(n)[0]]


def encoded(image: NDArray[Any] | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def decoded(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)))


@torch.no_grad()
def expected(model: Protected, image: NDArray[np.uint8]) -> tuple[Tensor, Tensor, NDArray[np.uint8]]:
    """(probabilities before, after, the restored picture), as the model itself says of one image."""
    x = torch.from_numpy(np.array(image))[None, None].float() / 255
    restored = (model.defense(x)[0, 0] * 255).round().numpy().astype(np.uint8)
    return model.classifier(x).softmax(1)[0], model(x).softmax(1)[0], restored


PNG = encoded(pixels(1)[0])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    limits = Limits(max_bytes=50_000, max_pixels=250_000, wait_ms=0)
    with running(protected(), name="a median", limits=limits, **ANY) as place:
        yield place


def metric(url: str, name: str) -> float:
    return sum(
        float(line.split()[-1]) for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(name)
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it is large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


# Answers --------------------------------------------------------------------------------------------------------------


def test_what_it_is(url: str) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    info = httpx.get(f"{url}/info").json()
    assert info["model"] == "a median"
    assert (info["classifier"], info["purifier"], info["random"]) == ("Sequential", "median", False)
    assert info["input"] == {"channels": 1, "height": SIZE, "width": SIZE}
    assert (info["classes"], info["detectors"], info["formats"]) == (10, 0, ["PNG", "JPEG"])
    assert info["limits"]["max_bytes"] == 50_000
    assert info["versions"]["unperturb"] == up.__version__
    assert len(info["weights_sha256"]) == 64
    assert "swagger" in httpx.get(f"{url}/docs").text
    assert set(httpx.get(f"{url}/openapi.json").json()["paths"]) == {
        "/health", "/info", "/metrics", "/purify", "/classify",
    }  # fmt: skip


def test_a_class_before_and_after(url: str) -> None:
    for image in pixels():
        before, after, restored = expected(protected(), image)
        said = httpx.post(f"{url}/classify", params={"top": 3, "restored": True}, content=encoded(image)).json()
        for part, probabilities in (("before", before), ("after", after)):
            assert said[part]["prediction"] == int(probabilities.argmax())
            assert said[part]["confidence"] == pytest.approx(float(probabilities.max()), abs=1e-5)
            assert [t["label"] for t in said[part]["top"]] == probabilities.topk(3).indices.tolist()
        assert said["changed"] == (before.argmax() != after.argmax())
        # The probability that changed classes: no more is above than is missing below.
        assert said["suspicion"] == pytest.approx(float((before - after).clamp(min=0).sum()), abs=1e-5)
        assert (decoded(base64.b64decode(said["restored_png"])) == restored).all()
        assert (said["detectors"], said["rejected"], said["resized"]) == ([], False, False)


def test_a_restored_picture(url: str) -> None:
    for image in pixels():
        answer = httpx.post(f"{url}/purify", content=encoded(image))
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-received-size"] == "16x16"
        assert (decoded(answer.content) == expected(protected(), image)[2]).all()
        assert (decoded(answer.content) != image).any()


def test_raw_and_in_a_form_it_is_the_same(url: str) -> None:
    raw = httpx.post(f"{url}/classify", content=PNG).json()
    form = {"image": ("digit.png", PNG, "image/png")}
    assert httpx.post(f"{url}/classify", files=form).json() == raw
    assert httpx.post(f"{url}/classify", files=form, data={"note": "of mine"}).json() == raw
    named = {"content-type": "application/x-www-form-urlencoded"}  # what curl says of --data-binary
    assert httpx.post(f"{url}/classify", content=PNG, headers=named).json() == raw
    assert raw["restored_png"] is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_of_another_size_is_resized_as_everywhere(url: str, kind: str) -> None:
    color = np.random.default_rng(0).integers(0, 255, (40, 64, 3), np.uint8)
    data = encoded(color, kind)
    small, _ = decode(Picture(data, 0, "here"), (SIZE, SIZE), grey=True)
    said = httpx.post(f"{url}/classify", params={"restored": True}, content=data).json()
    assert (said["height"], said["width"], said["resized"]) == (40, 64, True)
    before, _, restored = expected(protected(), small)
    assert said["before"]["confidence"] == pytest.approx(float(before.max()), abs=1e-5)
    assert (decoded(base64.b64decode(said["restored_png"])) == restored).all()


def test_a_purifier_that_changes_nothing_raises_no_suspicion() -> None:
    with running(protected("identity"), **ANY) as url:
        said = httpx.post(f"{url}/classify", content=PNG).json()
        assert said["before"] == said["after"]
        assert said["suspicion"] == 0


def test_detectors_and_color() -> None:
    torch.manual_seed(3)
    net = up.create_classifier("convnet", channels=3, size=8, classes=4, mean=[0.3] * 3, std=[0.4] * 3).eval()
    magnet = create_defense(
        "magnet", channels=3, structure=[3, "average", 3], detectors=[{"error": 1, "structure": [2]}]
    )
    images = torch.rand(6, 3, 8, 8).mul(255).round() / 255
    scores = magnet.eval().requires_grad_(False).scores(images, net)
    magnet.limits.fill_(float(scores.median()))
    model = Protected(net, magnet)
    files = [encoded((255 * image).permute(1, 2, 0).round().numpy().astype(np.uint8)) for image in images]
    with running(model, device="cpu") as url:
        said = [httpx.post(f"{url}/classify", content=file).json() for file in files]
        assert decoded(httpx.post(f"{url}/purify", content=files[0]).content).shape == (8, 8, 3)
    rejected = model.rejects(images).tolist()
    assert [s["rejected"] for s in said] == rejected
    assert set(rejected) == {True, False}
    for one, score in zip(said, scores):
        assert one["detectors"][0]["score"] == pytest.approx(float(score[0]), abs=1e-5)
        assert one["detectors"][0]["threshold"] == pytest.approx(float(magnet.limits[0]))


def test_an_answer_waits_for_no_receipt_of_the_one_before(url: str) -> None:
    """Where asyncio does not know that a socket is TCP, headers and body are held back for 40 ms each."""
    took = []
    with httpx.Client() as client:
        for _ in range(30):
            start = time.monotonic()
            assert client.get(f"{url}/health").status_code == 200
            took.append(time.monotonic() - start)
    assert min(took[1:]) < 0.03


# Many at once ---------------------------------------------------------------------------------------------------------


async def posted(
    url: str, files: list[bytes], at_once: int, path: str = "/classify?restored=true"
) -> list[httpx.Response]:
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(
        limits=httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once), timeout=60
    ) as client:

        async def one(file: bytes) -> httpx.Response:
            async with gate:
                return await client.post(f"{url}{path}", content=file)

        return await asyncio.gather(*(one(file) for file in files))


def test_each_answer_goes_to_its_own_question() -> None:
    images = pixels(100)
    model = protected()
    wanted = [expected(model, image) for image in images]
    assert len({restored.tobytes() for _, _, restored in wanted}) == 100
    order = random.Random(0).choices(range(100), k=400)
    with running(model, limits=Limits(batch=16, wait_ms=50, timeout=60), **ANY) as url:
        answers = asyncio.run(posted(url, [encoded(images[k]) for k in order], 64))
        assert metric(url, "unperturb_batch_images_sum") == 400
        assert metric(url, "unperturb_batch_images_count") < 400  # they were answered together
        assert metric(url, "unperturb_queue_requests") == 0
        assert metric(url, 'unperturb_requests_total{path="/classify",status="200"}') == 400
    for k, answer in zip(order, answers, strict=True):
        before, after, restored = wanted[k]
        said = answer.json()
        assert (decoded(base64.b64decode(said["restored_png"])) == restored).all()
        assert said["before"]["confidence"] == pytest.approx(float(before.max()), abs=1e-4)
        assert said["after"]["confidence"] == pytest.approx(float(after.max()), abs=1e-4)


def test_what_there_is_no_room_for_is_sent_away_and_nothing_else() -> None:
    images = pixels(40)
    limits = Limits(batch=64, wait_ms=700, queue=8, timeout=60)
    with running(protected(), limits=limits, **ANY) as url:
        answers = asyncio.run(posted(url, [encoded(image) for image in images], 40))
        assert httpx.get(f"{url}/health").status_code == 200
    taken = [k for k, answer in enumerate(answers) if answer.status_code == 200]
    away = [answer for answer in answers if answer.status_code == 503]
    assert len(taken) + len(away) == 40
    assert len(taken) >= 8
    assert away
    for answer in away:
        assert int(answer.headers["retry-after"]) >= 1
        assert "8 requests are under way" in answer.json()["detail"]
    for k in taken:
        assert (
            decoded(base64.b64decode(answers[k].json()["restored_png"])) == expected(protected(), images[k])[2]
        ).all()


def test_what_waits_too_long_is_told_so_and_holds_up_nobody() -> None:
    with running(protected(), limits=Limits(batch=2, wait_ms=20_000, timeout=0.5), **ANY) as url:
        start = time.monotonic()
        answer = httpx.post(f"{url}/classify", content=PNG)
        assert (answer.status_code, answer.json()["detail"][:38]) == (504, "it could not be answered within 0.5 s;")
        assert 0.4 < time.monotonic() - start < 10
        # The one that gave up is still first in the queue: with it the batch is full.
        assert httpx.post(f"{url}/classify", content=PNG).status_code == 200


class Picky(nn.Module):
    """Fails on a white picture, and says nothing that is a number of a black one."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((1, 2, 3))
        if (means == 1).any():
            raise ArithmeticError("white")
        return torch.stack([means, 1 - means], 1) / (means[:, None] > 0).float()


def test_a_picture_that_breaks_the_model_fails_alone() -> None:
    # All black is what a service tries its model on.
    white, middle = np.full((8, 8), 255, np.uint8), np.full((8, 8), 64, np.uint8)
    files = [encoded(white), *[encoded(middle)] * 5, encoded(white), encoded(0 * white)]
    model = Protected(Picky(), create_defense("identity"))
    with running(model, size=8, device="cpu", limits=Limits(wait_ms=300)) as url:
        codes = [(answer.status_code, answer.json()) for answer in asyncio.run(posted(url, files, 8))]
    assert [code for code, _ in codes] == [500, *[200] * 5, 500, 500]
    assert codes[0][1]["detail"].startswith("the model failed (ArithmeticError)")
    assert "white" not in codes[0][1]["detail"]
    assert "no finite numbers" in codes[-1][1]["detail"]


def test_a_batcher_answers_in_order_skips_what_is_cancelled_and_ends_with_all_answered() -> None:
    batches: list[list[int]] = []
    go = threading.Event()

    def double(numbers: list[int]) -> list[int]:
        go.wait(10)
        batches.append(numbers)
        return [2 * n for n in numbers]

    batcher = Batcher(double, batch=4, wait=0, places=10)
    futures = [batcher.ask(n) for n in range(10)]
    assert futures[7].cancel()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # the first four have left the queue, or are about to
        try:
            futures.append(batcher.ask(len(futures)))
        except QueueFullError:
            break
        time.sleep(0.02)
    assert 10 <= len(futures) <= 14
    go.set()
    batcher.close()
    assert [f.result(0) for k, f in enumerate(futures) if k != 7] == [2 * n for n in range(len(futures)) if n != 7]
    assert max(map(len, batches)) <= 4
    assert all(7 not in batch for batch in batches)
    with contextlib.ExitStack() as taken:
        for _ in range(10):
            taken.enter_context(batcher.place())
        with pytest.raises(QueueFullError):
            taken.enter_context(batcher.place())
    with batcher.place():
        pass


# Limits and what is malformed -----------------------------------------------------------------------------------------

DIGIT = pixels(1)[0]
REFUSED: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "the body is empty"),
    "text": (b"hello", 415, "neither a PNG nor a JPEG"),
    "a GIF": (encoded(DIGIT, "GIF"), 415, "convert the picture"),
    "a BMP": (encoded(DIGIT, "BMP"), 415, "convert the picture"),
    "a WebP": (encoded(DIGIT, "WEBP"), 415, "convert the picture"),
    "a PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", 415, "convert the picture"),
    "a PNG by name": (b"\x89PNG\r\n\x1a\n", 400, "not a whole picture"),
    "half a PNG": (PNG[: len(PNG) // 2], 400, "not a whole picture"),
    "half a JPEG": (encoded(DIGIT, "JPEG")[:300], 400, "not a whole picture"),
    "a wide bomb": (bomb(600, 600), 413, "600x600 pixels, more than 250,000"),
    "a bomb": (bomb(60_000, 60_000), 413, "pixels"),
    "no pixels": (bomb(0, 0), 400, "not a whole picture"),
    "a strip": (encoded(np.zeros((1, 4000), np.uint8)), 400, "too thin a strip"),
    "10 bits in 16": (encoded(np.full((9, 9), 1000, np.uint16)), 400, "export it as 8 bits"),
    "too many bytes": (PNG + b"\0" * 60_000, 413, "more than 50,000 bytes"),
}  # fmt: skip
TAKEN: dict[str, bytes] = {
    "animated": encoded(Image.fromarray(DIGIT), save_all=True, append_images=[Image.fromarray(255 - DIGIT)]),
    "16 bits": encoded(DIGIT.astype(np.uint16) * 257),
    "a palette": encoded(Image.fromarray(DIGIT).convert("P")),
    "one bit": encoded(Image.fromarray(DIGIT).convert("1")),
    "alpha": encoded(Image.fromarray(DIGIT).convert("LA")),
    "CMYK": encoded(Image.fromarray(DIGIT).convert("CMYK"), "JPEG"),
    "progressive": encoded(DIGIT, "JPEG", progressive=True),
}


@pytest.mark.parametrize("path", ["/classify", "/purify"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_told_why(url: str, case: str, path: str) -> None:
    data, code, said = REFUSED[case]
    for sent in ({"content": data}, {"files": {"image": data}}) if data else ({"content": data},):
        answer = httpx.post(f"{url}{path}", **sent)  # type: ignore[arg-type]
        assert answer.status_code == code, answer.text
        assert said in answer.json()["detail"]


@pytest.mark.parametrize("case", TAKEN)
def test_what_cameras_and_programs_make_is_taken(url: str, case: str) -> None:
    small, _ = decode(Picture(TAKEN[case], 0, "here"), (SIZE, SIZE), grey=True)
    said = httpx.post(f"{url}/classify", content=TAKEN[case]).json()
    assert said["before"]["confidence"] == pytest.approx(float(expected(protected(), small)[0].max()), abs=1e-5)


def test_a_body_without_a_length_is_counted_as_it_comes(url: str) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1000)

    answer = httpx.post(f"{url}/classify", content=pieces())
    assert (answer.status_code, "more than 50,000 bytes" in answer.text) == (413, True)
    assert httpx.post(f"{url}/classify", content=iter([PNG[:50], PNG[50:]])).status_code == 200


@pytest.mark.parametrize(
    ("headers", "body", "code"),
    [
        ({"content-type": "multipart/form-data"}, PNG, 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--y\r\nno form", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n\r\n\r\n--x--", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"", 422),
        ({"content-type": "multipart/form-data; boundary=" + "x" * 5000}, b"--x--", 422),
        ({"content-type": "multipart/mixed; boundary=x"}, b"--x--", 422),
        ({"content-type": 'multipart/form-data; boundary=x; charset="\\"'}, b"--x--\r\n", 422),
    ],
)
def test_a_form_that_is_none(url: str, headers: dict[str, str], body: bytes, code: int) -> None:
    answer = httpx.post(f"{url}/classify", content=body, headers=headers)
    assert answer.status_code in {code, 400, 422}, answer.text
    assert "curl -F image=@FILE" in answer.json()["detail"]


def test_a_form_of_no_file_or_of_two(url: str) -> None:
    two = [("image", ("a.png", PNG)), ("image", ("b.png", PNG))]
    assert httpx.post(f"{url}/classify", files=two).status_code == 400
    words = {"image": (None, "no file")}
    answer = httpx.post(f"{url}/classify", files=words)
    assert (answer.status_code, "holds no file" in answer.text) == (422, True)


@pytest.mark.parametrize("query", ["top=a", "top=0", "top=9999", "top=", "restored=perhaps", "top=1&top=b"])
def test_a_wrong_parameter_is_named(url: str, query: str) -> None:
    answer = httpx.post(f"{url}/classify?{query}", content=PNG)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(query.partition("=")[0])


def test_ways_and_paths_that_are_none(url: str) -> None:
    assert httpx.get(f"{url}/classify").status_code == 405
    assert httpx.get(f"{url}/secret%1b%5b31m").status_code == 404
    assert 'path="other",status="404"' in httpx.get(f"{url}/metrics").text
    assert "secret" not in httpx.get(f"{url}/metrics").text


def test_damaged_pictures_are_never_the_services_fault(url: str) -> None:
    draw = random.Random(0)
    originals = [PNG, encoded(DIGIT, "JPEG"), *TAKEN.values()]
    with httpx.Client() as client:
        for _ in range(200):
            data = bytearray(draw.choice(originals))
            for _ in range(draw.choice([0, 1, 3, 30])):
                data[draw.randrange(len(data))] = draw.randrange(256)
            cut = data[: draw.randrange(len(data) + 1)] if draw.random() < 0.3 else data
            answer = client.post(f"{url}/classify", content=bytes(cut))
            assert answer.status_code in (200, 400, 413, 415), answer.text
            assert answer.status_code == 200 or len(answer.json()["detail"]) > 20
        assert client.post(f"{url}/classify", content=PNG).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with running(protected(), limits=Limits(timeout=0.5, queue=1), **ANY) as url:
        place = ("127.0.0.1", int(url.rpartition(":")[2]))
        head = b"POST /classify HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n"
        with socket.create_connection(place, 10) as slow:
            slow.sendall(head + b"a few")
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        with socket.create_connection(place, 10) as gone:
            gone.sendall(head)
        deadline = time.monotonic() + 10
        while httpx.post(f"{url}/classify", content=PNG).status_code != 200:  # until the place is free again
            assert time.monotonic() < deadline
        assert metric(url, 'unperturb_requests_total{path="/classify",status="5') == 0 or "503" in str(
            httpx.get(f"{url}/metrics").text
        )


def test_requests_made_up_from_the_schema_are_answered_as_it_says(url: str) -> None:
    pictures = st.sampled_from([PNG, *TAKEN.values()])
    for kind in ("image/png", "image/jpeg"):
        schemathesis.openapi.media_type(kind, st.one_of(pictures, st.binary(max_size=200)))
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 5
    quick = settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    start = time.monotonic()
    for operation in operations:

        @quick
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            if time.monotonic() - start < 60:
                # That bytes are a picture, no schema can say.
                case.validate_response(case.call(timeout=20), excluded_checks=[positive_data_acceptance])

        check()


# The token ------------------------------------------------------------------------------------------------------------


def test_who_does_not_know_the_token_gets_nothing() -> None:
    with running(protected(), token="a-b_c", **ANY) as url:
        for path in ("/classify", "/purify"):
            for headers in ({}, {"authorization": "Bearer a-b_d"}, {"authorization": "Basic a-b_c"},
                            {"authorization": "Bearer"}, {"authorization": "Bearer \xe4"}):  # fmt: skip
                answer = httpx.post(
                    f"{url}{path}?top=a", content=PNG, headers={k: v.encode("latin-1") for k, v in headers.items()}
                )  # type: ignore[misc]
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "a-b_c" not in answer.text
        for path, code in {"/info": 401, "/metrics": 401, "/health": 200, "/openapi.json": 200}.items():
            assert httpx.get(f"{url}{path}").status_code == code
        known = {"authorization": "bearer a-b_c"}
        assert httpx.post(f"{url}/classify", content=PNG, headers=known).status_code == 200
        assert httpx.get(f"{url}/info", headers=known).status_code == 200


def test_a_token_is_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNPERTURB_TOKEN", raising=False)
    assert read_token(None) is None
    (tmp_path / "token").write_text("of-a-file\n")
    monkeypatch.setenv("UNPERTURB_TOKEN", "of-all")
    assert (read_token(None), read_token(tmp_path / "token")) == ("of-all", "of-a-file")
    for wrong in ("", " \n", "two words", "\xe4"):
        (tmp_path / "token").write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match="token holds no token: expected one word"):
            read_token(tmp_path / "token")
    with pytest.raises(ValueError, match="holds no token"), running(protected(), token="", **ANY):
        pass


# By name, and as a program --------------------------------------------------------------------------------------------


def test_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    images = torch.rand(2, 1, 28, 28)
    both = load_protected("zoo:protect-mnist", "zoo:mnist-lenet5")
    both.save_pretrained(tmp_path / "both")
    for model in (both, load_protected(str(tmp_path / "both"))):
        net, defense = up.load_classifier("zoo:mnist-lenet5"), up.load_defense("zoo:protect-mnist")
        assert torch.equal(model(images), Protected(net, defense)(images))
    assert isinstance(load_protected("median+jpeg", "zoo:mnist-lenet5"), Protected)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nimport unperturb as up\nnet = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3))\n"
        "whole = up.Protected(net, up.create_defense('median'))\n"
    )
    assert load_protected("mine.py:whole")(torch.rand(1, 3, 8, 8)).shape == (1, 3)
    assert load_protected("median", "mine.py:net", size=8)(torch.rand(1, 3, 8, 8)).shape == (1, 3)


@pytest.mark.parametrize(
    ("model", "classifier", "said"),
    [
        ("zoo:protect-mnist", None, "is a purifier: name the classifier behind it with --classifier"),
        ("median+jpeg", None, "is a purifier: name the classifier"),
        ("median", None, "A purifier alone needs --classifier"),
        ("zoo:mnist-lenet5", None, "zoo:mnist-lenet5 is a classifier, not a purifier"),
        ("zoo:mnist-lenet5", "zoo:mnist-lenet5", "is a classifier, not a purifier"),
        ("zoo:protect-mnist", "zoo:protect-mnist", "is a purifier, not a classifier"),
        ("zoo:protect-mnits", "zoo:mnist-lenet5", "Did you mean"),
        ("examples/own_net.py:net", None, "not a Protected; a purifier alone needs --classifier"),
    ],
)
def test_names_that_are_none(model: str, classifier: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=re.escape(said)):
        load_protected(model, classifier)


def test_models_that_cannot_be_served() -> None:
    def failing(model: Any, said: str, **options: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=said), running(model, device="cpu", **options):
            pass

    failing(digit_net(), "serve takes a unperturb.Protected")
    failing(protected(), "say which pictures are resized to, such as --size 32")
    net = up.create_classifier("convnet", channels=1, size=8, classes=4, mean=[0.3], std=[0.4])
    failing(Protected(net, create_defense("median")), "1 channel, 8x8 pixels: leave out --size", size=9)
    failing(protected(), "fails on images of 3 channels, 16x16 pixels: .* choose --size and --channels", size=SIZE)
    five = up.create_classifier("convnet", channels=5, size=8, classes=4, mean=[0.3] * 5, std=[0.4] * 5)
    failing(Protected(five, create_defense("median")), "5 channels, and pictures have 1")
    for wrong in ({"batch": 0}, {"queue": 0}, {"timeout": 0}, {"wait_ms": -1}, {"max_pixels": 10**9}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)  # type: ignore[arg-type]


def test_a_port_that_is_taken_and_an_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on 127.0.0.1, port {port} .*port 0 takes a free one"):
            serve(protected(), port=port, **ANY)
    with pytest.raises(ValueError, match=r"cannot listen on no\.such\.host\.invalid"):
        serve(protected(), host="no.such.host.invalid", **ANY)
    for missing in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(ImportError, match=rf'{missing} is not installed; .*pip install "unperturb\[serve\]"'):
                serve(protected(), **ANY)


def started(*options: str) -> tuple[subprocess.Popen[str], str, list[str]]:
    """(the program, its URL, its log as it grows)."""
    words = [
        "serve",
        "zoo:protect-mnist",
        "--classifier",
        "zoo:mnist-lenet5",
        "--port",
        "0",
        "--threads",
        "1",
        *options,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "unperturb", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    log: list[str] = []
    threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True).start()
    found = next((re.search(r"at (http://127.0.0.1:\d+);", line) for line in process.stdout), None)
    assert found is not None, log
    return process, found[1], log


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_answers_all_that_was_taken(number: int, code: int) -> None:
    images = [
        np.roll(np.kron(image, np.ones((2, 2), np.uint8))[2:30, 2:30], k % 3, 1) for k, image in enumerate(pixels(24))
    ]
    model = load_protected(str(ROOT / "zoo/protect-mnist"), str(ROOT / "zoo/mnist-lenet5"))
    process, url, log = started("--wait-ms", "3000", "--batch", "64", "--timeout", "60")
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.extend(asyncio.run(posted(url, [encoded(image) for image in images], 24)))

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 60
    while metric(url, "unperturb_queue_requests") < 24:
        assert time.monotonic() < deadline
    process.send_signal(number)
    asking.join(60)
    assert process.wait(60) == code
    assert [answer.status_code for answer in answers] == [200] * 24
    for image, answer in zip(images, answers):
        _, after, restored = expected(model, image)
        assert answer.json()["after"]["confidence"] == pytest.approx(float(after.max()), abs=1e-4)
        off = decoded(base64.b64decode(answer.json()["restored_png"])).astype(int) - restored
        assert abs(off).max() <= 1  # a batch of another size may differ in last bits
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    lines = [line for line in log if line.strip()]
    requests = [line for line in lines if " /classify " in line]
    assert len(requests) == 24
    assert all(re.fullmatch(r"[\d-]+ [\d:,]+ /\w+ \d{3} [\d.]+ ms\n", line) for line in lines[:-1]), lines
    assert lines[-1].startswith("stopped. Go on with: unperturb serve")


def test_the_verb_says_what_is_wrong(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "unperturb", "serve", "median", "--classifier", "zoo:mnist-lenet5"]
    done = subprocess.run(
        [*words, "--token-file", tmp_path / "none"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "No such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_page_says_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("digit.png").write_bytes(PNG)
    lines = [line for line in page.splitlines() if line.startswith("curl ")]
    assert len(lines) == 4
    with running(protected(), **ANY) as url:
        (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
        known: dict[str, Any] = {}
        exec(code.replace("http://127.0.0.1:8000", url), known)
        restored = Path("restored.png").read_bytes()
        (shown,) = re.findall(r"```json\n(.*?)```", page, flags=re.S)
        assert set(json.loads(shown)) == set(known["said"])
        if shutil.which("curl") is None:
            pytest.skip("there is no curl here")
        Path("restored.png").unlink()
        for line in lines:
            words = [word.replace("http://127.0.0.1:8000", url) for word in shlex.split(line)]
            done = subprocess.run([*words, "-sS", "--fail"], capture_output=True, timeout=60)
            assert done.returncode == 0, done.stderr
        assert Path("restored.png").read_bytes() == restored


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    words = [sys.executable, ROOT / "benchmarks" / "serving.py", "--quick", "--threads", "1", "--out", out]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert {row["system"] for row in record["rows"]} == {"bare", "protected"}
    for row in record["rows"]:
        assert row["wrong"] == 0
        assert row["latency_ms"]["p50"] <= row["latency_ms"]["p95"] <= row["latency_ms"]["p99"]
    over = record["overload"]
    assert over["answered"] + over["sent_away"] == over["sent"]
    assert over["other"] == over["wrong"] == 0
