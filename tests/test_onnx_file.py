"""Models in ONNX files: the same answers as the net they were exported from, no gradient, and errors that say why."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unperturb.attackers import Attacker
from unperturb.attacks import create_attack
from unperturb.attacks.context import NoGradientError
from unperturb.classifiers import OnnxModel, fused_copy, wrap
from unperturb.defenses import Protected, create_defense
from unperturb.systems import System

IMAGES = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
SQUARE = create_attack("square", eps=1.0, queries=50)


def test_a_file_needs_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what an import of it meets where it is not installed
    (tmp_path / "net.onnx").touch()
    with pytest.raises(ImportError, match=r"onnxruntime, which is not installed: pip install 'unperturb\[onnx\]'"):
        wrap(tmp_path / "net.onnx")


def test_a_file_that_is_not_there_is_said_before_what_would_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FileNotFoundError, match=r"there is no ONNX file .*net\.onnx$"):
        wrap(tmp_path / "net.onnx")


def needs_onnx() -> None:
    for library in ("onnx", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is not installed (pip install 'unperturb[onnx]')")


class TwoOutputs(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.net(x)
        return x.flatten(1), logits, logits.amax(0)


def net(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
    norm.running_var.fill_(0.05)
    made = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, classes)).eval()
    with torch.no_grad():
        made[4].bias -= made(IMAGES).mean(0)  # so that several classes are answered, and can be changed
    return made


def exported(model: nn.Module, path: Path, batch: int | None = None, outputs: tuple[str, ...] = ("logits",)) -> Path:
    """The file of `model`, made by torch's classic exporter; batch: None leaves it free."""
    needs_onnx()
    free = None if batch else {name: {0: "n"} for name in ("images", *outputs)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the other exporter is newer
        torch.onnx.export(
            model,
            (torch.rand(batch or 2, 1, 8, 8),),
            str(path),
            input_names=["images"],
            output_names=list(outputs),
            dynamic_axes=free,
            dynamo=False,
        )
    return path


@pytest.mark.parametrize("batch", [None, 1, 4, 16])
def test_a_file_answers_as_the_net_whatever_batch_it_fixes(batch: int | None, tmp_path: Path) -> None:
    model = net()
    path = exported(model, tmp_path / "net.onnx", batch)
    wrapped = wrap(path, size=8, channels=1, classes=3)
    for count in (7, 4, 1, 0):
        logits = wrapped(IMAGES[:count])
        assert logits.shape == (count, 3)
        torch.testing.assert_close(logits, model(IMAGES[:count]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wrapped(IMAGES.double()).float(), model(IMAGES), rtol=1e-4, atol=1e-5)
    normalized = wrap(str(path), [0.3], [0.5])
    torch.testing.assert_close(normalized(IMAGES), model((IMAGES - 0.3) / 0.5), rtol=1e-4, atol=1e-4)


def test_a_file_gives_no_gradient_and_is_attacked_by_queries(tmp_path: Path) -> None:
    model = net()
    wrapped = wrap(exported(model, tmp_path / "net.onnx", 4))
    labels = model(IMAGES).argmax(1)
    assert not wrapped.differentiable
    protected = Protected(wrapped, create_defense("identity"))
    for seen in (wrapped, fused_copy(wrapped, IMAGES), protected, copy.deepcopy(wrapped)):
        with pytest.raises(NoGradientError, match=r"gives no gradient.*by queries \(square, rays\)"):
            create_attack("pgd", eps=0.3)(seen, IMAGES, labels)
    black_box = Attacker(SQUARE, "black_box").model_for(System("file", wrapped))
    for seen in (wrapped, fused_copy(wrapped, IMAGES), protected, black_box):
        found = SQUARE.run(seen, IMAGES, labels)
        assert bool(found.success.any())
        logits = model(found.images)  # what fools the file fools the net that it was made from
        margin = logits.gather(1, labels[:, None]).squeeze(1) - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        assert bool((margin[found.success] < 1e-4).all())


def test_one_of_several_outputs_is_named(tmp_path: Path) -> None:
    model = TwoOutputs(net()).eval()
    path = exported(model, tmp_path / "net.onnx", 4, ("flat", "logits", "best"))
    logits = wrap(path, logits="logits", size=8, channels=1)(IMAGES)
    torch.testing.assert_close(logits, model(IMAGES)[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"dict of flat \(2, 64\), logits \(2, 3\); say where its logits are"):
        wrap(path, size=8, channels=1)
    one = exported(net(1), tmp_path / "one.onnx")
    torch.testing.assert_close(wrap(one, binary=True)(IMAGES)[:, 1:], net(1)(IMAGES), rtol=1e-4, atol=1e-5)


def broken(path: Path) -> Path:
    needs_onnx()
    path.write_bytes(b"no network")
    return path


def flat(path: Path) -> Path:
    needs_onnx()
    torch.onnx.export(nn.Linear(4, 2), (torch.rand(2, 4),), str(path), input_names=["numbers"], dynamo=False)
    return path


def missing(path: Path) -> Path:
    needs_onnx()
    return path


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (missing, FileNotFoundError, "there is no ONNX file .*net.onnx"),
        (broken, ValueError, "net.onnx is no ONNX file that onnxruntime can run: "),
        (
            flat,
            ValueError,
            r"net.onnx takes numbers: tensor\(float\) \(2, 4\); expected one float input \(N, C, H, W\)",
        ),
    ],
)
def test_a_file_that_cannot_be_used(
    make: Callable[[Path], Path], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        wrap(make(tmp_path / "net.onnx"))


@pytest.mark.parametrize("images", [IMAGES[..., :7], IMAGES.expand(-1, 3, -1, -1), IMAGES[0]])
def test_images_that_a_file_does_not_take(images: Any, tmp_path: Path) -> None:
    model = OnnxModel(exported(net(), tmp_path / "net.onnx"))
    with pytest.raises(ValueError, match=r"net.onnx takes images \(N, 1, 8, 8\); got \("):
        model(images)
