"""ONNX files of a purifier, a classifier or both, each compared with torch before it is kept."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unperturb import runs
from unperturb.classifiers import Classifier, OnnxModel, load_classifier
from unperturb.classifiers.onnx_file import onnxruntime_or_error, open_session
from unperturb.data import ImageSet, load_dataset
from unperturb.defenses import Defense, Protected, load_defense
from unperturb.modules import frozen, modules_of
from unperturb.unsaved import import_object, is_import_path
from unperturb.validation import check_images

OPSET = 17
TOLERANCE = 1e-4
INPUT = "images"
_CALIBRATION = 256  # images that the ranges of an int8 file are read off, where the data is given by name
_WEIGHED = ["Conv", "ConvTranspose", "Gemm", "MatMul"]  # what int8 makes smaller and quicker; the rest stays float32


class ExportError(ValueError):
    """A model that cannot be written as an ONNX file, or whose file does not answer as it does."""


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was written.

    kind: "protected", "classifier" (output `logits`, `(N, K)`) or "purifier" (output `purified`, `(N, C, H, W)`).
    precision: "float32" or "int8". bytes: its size. sha256: of the model's weights, by `unperturb.runs.digest_of`.
    checked_on: the images on which it was compared with torch. difference: the largest between what the two answer, in
    logits or in pixels of [0, 1]. same_class: the fraction of these images to which both give the same class; None for
    a purifier.
    """

    path: Path
    kind: str
    precision: str
    opset: int
    bytes: int
    sha256: str
    checked_on: str
    difference: float
    same_class: float | None

    def __str__(self) -> str:
        what = "pixels of [0, 1]" if self.same_class is None else "logits"
        same = "" if self.same_class is None else f"; {100 * self.same_class:g} % of the classes are the same"
        return (
            f"{self.path}: {self.kind}, {self.precision}, opset {self.opset}, {self.bytes / 1e6:.2f} MB. On "
            f"{self.checked_on} it differs from torch by at most {self.difference:.2g} ({what}){same}"
        )


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    images: Tensor | ImageSet | None = None,
    *,
    int8: Tensor | ImageSet | None = None,
    name: str | None = None,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write `model` as the ONNX file `path`, run it by onnxruntime beside torch, and keep it if the two agree.

    model: a `Protected`, a purifier alone, or a classifier. The file takes float32 `images` `(N, C, H, W)` in [0, 1],
    any N, and does not check their range. images: those that the two are compared on, float `(N, C, H, W)` in [0, 1];
    None: 16 random ones, where the model knows the size that it takes. int8: images of the training split, off which
    the ranges of a static 8-bit file are read: weights and inputs of convolutions and matrix products take 8 bits, all
    else stays float32. Its float32 version is compared first; its own difference is told, not judged. name: for the
    metadata. tolerance: the largest difference that is taken, as a part of torch's largest value where that is above 1.

    Metadata: name, kind, precision, opset, input_range, input_shape, classes, sha256 (`Exported`), parity (JSON).

    Raises `ImportError` without the extra `onnx`; `ExportError` for a model that draws at random, searches, or does
    what ONNX has no operator for, and above the tolerance. Nothing is then written.
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        raise ExportError(f"{path} is to be an ONNX file: give it a name that ends in .onnx")
    onnxruntime_or_error(path)
    onnx = _onnx(path)
    kind = _kind(model)
    _check(model, kind)
    shown, checked_on = _shown(model, images)
    device = next((t.device for m in modules_of(model) for t in m.parameters(recurse=False)), torch.device("cpu"))
    with frozen(model), torch.no_grad():
        data = _traced(model, shown[:2].to(device), kind)
        reference = torch.cat([model(part.to(device)).float().cpu() for part in _parts(shown)])
    difference, same = _compared(data, shown, reference, kind, path)
    limit = tolerance * max(1.0, float(reference.abs().max()))
    if not difference <= limit:
        raise ExportError(
            f"{path} was not written: on {checked_on} it differs from torch by {difference:.2g}, more than "
            f"{limit:.2g}; {_named(model)} does something that its trace has not kept"
        )
    if int8 is not None:
        data = _quantized(data, _tensor(int8), path)
        difference, same = _compared(data, shown, reference, kind, path)
    parity = {"images": checked_on, "largest_difference": difference, "same_class": same}
    metadata = {
        "name": name or _named(model),
        "kind": kind,
        "precision": "float32" if int8 is None else "int8",
        "opset": str(OPSET),
        "input_range": "[0, 1]",
        "input_shape": json.dumps(["N", *shown.shape[1:]]),
        "classes": "" if kind == "purifier" else str(reference.shape[1]),
        "sha256": runs.digest_of(model.state_dict()),
        "parity": json.dumps(parity),
    }
    file = onnx.load_from_string(data)
    onnx.helper.set_model_props(file, metadata)
    onnx.checker.check_model(file, full_check=int8 is None)
    packed = file.SerializeToString()
    runs.write_atomically(path, lambda p: p.write_bytes(packed))
    told = (len(packed), metadata["sha256"], checked_on, difference, same)
    return Exported(path, kind, metadata["precision"], OPSET, *told)


def export_named(
    model: str,
    path: str | os.PathLike[str],
    *,
    classifier: str | None = None,
    data: str | None = None,
    size: int | None = None,
    n: int = 64,
    int8: bool = False,
) -> Exported:
    """`export_onnx` of what is named: a run folder, `zoo:NAME`, the name of a purifier that is not trained, or
    `module:object`.

    classifier: what stands behind the purifier `model`, named likewise. data, size: the data set whose first `n` test
    images are shown, and whose training images int8 needs; by default the one that the model was trained on, or random
    images where that is not here.
    """
    first = _load(model)
    whole = first if classifier is None else Protected(_load(classifier), _purifier(first, model))
    name = model if classifier is None else f"{model} before {classifier}"
    splits, source = None, data or _trained_on(model) or (classifier and _trained_on(classifier))
    if source is not None:
        try:
            splits = load_dataset(source, size=size)
        except (ValueError, OSError) as error:
            if data is not None or int8:
                raise
            warnings.warn(f"compared on random images, as {source} is not here: {error}", stacklevel=2)
    if int8 and splits is None:
        raise ExportError("int8 needs training images to read its ranges off: name their data set with --data")
    shown = None if splits is None else splits.test.take(torch.arange(min(n, len(splits.test))))
    ranges = splits.train.subset(_CALIBRATION) if int8 and splits is not None else None
    return export_onnx(whole, path, shown, int8=ranges, name=name)


# What is exported ---------------------------------------------------------------------------------------------------


def _load(entry: str) -> nn.Module:
    if is_import_path(entry):
        made: nn.Module = import_object(entry)
        return made
    try:
        return load_classifier(entry)
    except runs.RunError as no_classifier:
        try:
            return load_defense(entry)
        except runs.RunError as no_defense:
            described = [file for file in ("classifier.json", "defense.json") if (Path(entry) / file).exists()]
            raise no_classifier if described == ["classifier.json"] else no_defense from None


def _purifier(model: nn.Module, entry: str) -> Defense:
    if not isinstance(model, Defense):
        raise ExportError(f"{entry} is a classifier; the purifier comes first: export PURIFIER --classifier {entry}")
    return model


def _trained_on(entry: str) -> str | None:
    """The data set that a run folder says it was trained on."""
    from unperturb import zoo

    folder = Path(zoo.find(entry))
    for file, key in (("classifier.json", "extra"), ("defense.json", "about")):
        if (folder / file).exists():
            about = runs.read_json(folder / file, dict[str, Any]).get(key)
            found = about.get("dataset") if isinstance(about, dict) else None
            return found if isinstance(found, str) else None
    return None


def _kind(model: nn.Module) -> str:
    if not isinstance(model, nn.Module):
        raise ExportError(f"export takes a Protected, a purifier or a classifier, not {type(model).__name__}")
    if isinstance(model, Defense):
        return "purifier"
    return "protected" if isinstance(model, Protected) else "classifier"


def _check(model: nn.Module, kind: str) -> None:
    """Raise for what no fixed graph can say."""
    purifier = model if isinstance(model, Defense) else getattr(model, "defense", None)
    if isinstance(purifier, Defense) and purifier.random:
        raise ExportError(
            f"{_named(purifier)} draws at random in each call, and a file's answers could not be compared with torch's:"
            " export a purifier that does not"
        )
    if any(isinstance(m, OnnxModel) for m in modules_of(model)):
        alone = ": export the purifier alone" if kind == "protected" else ""
        raise ExportError(f"the classifier is an ONNX file already{alone}")


def _named(model: nn.Module) -> str:
    if isinstance(model, Protected):
        return f"{_named(model.defense)} before {_named(model.classifier)}"
    spec = getattr(model, "spec", None)
    return str(spec["name"]) if isinstance(spec, dict) else type(model).__name__


def _tensor(images: Tensor | ImageSet) -> Tensor:
    if isinstance(images, ImageSet):
        images = images.batch(torch.arange(len(images)))[0]
    return check_images(images).detach().float().cpu()


def _shown(model: nn.Module, images: Tensor | ImageSet | None) -> tuple[Tensor, str]:
    """The images on which file and torch are compared, and what they are."""
    if images is not None:
        shown = _tensor(images)
        if not len(shown):
            raise ExportError("there is no image to compare the file on; pass at least one")
        of = f" of {images.source} {images.split}" if isinstance(images, ImageSet) else ""
        return shown, f"{len(shown)} given images" if not of else f"{len(shown)} images{of}"
    shape = _shape_of(model)
    if shape is None:
        raise ExportError(f"{_named(model)} takes images of any size: pass some, export_onnx(model, path, images)")
    return torch.rand(16, *shape, generator=torch.Generator().manual_seed(0)), "16 random images"


def _shape_of(model: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) of the only images that `model` says it takes."""
    if isinstance(model, Protected):
        return _shape_of(model.classifier) or _shape_of(model.defense)
    if isinstance(model, Classifier) and model.spec is not None:
        return model.spec["channels"], model.spec["size"], model.spec["size"]
    if isinstance(model, Defense) and model.size is not None and model.channels is not None:
        return model.channels, model.size, model.size
    return None


# The file -----------------------------------------------------------------------------------------------------------


def _onnx(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            f"{path} is written by onnx, which is not installed: pip install 'unperturb[onnx]'"
        ) from error
    return onnx


def _traced(model: nn.Module, images: Tensor, kind: str) -> bytes:
    """The bytes of an ONNX file of `model`, its batch free, by torch's exporter from traces: it needs no onnxscript."""
    output = "purified" if kind == "purifier" else "logits"
    example = images if len(images) == 2 else torch.cat([images, images])
    # Before torch 2.5 there was no other exporter to choose.
    classic: dict[str, Any] = {"dynamo": False} if "dynamo" in signature(torch.onnx.export).parameters else {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _quiet_stdout():
        warnings.simplefilter("ignore")  # that another exporter is newer, and of checks on images, which it leaves out
        file = Path(folder) / "traced.onnx"
        axes = {INPUT: {0: "N"}, output: {0: "N"}}
        try:
            torch.onnx.export(
                model,
                (example,),
                str(file),
                input_names=[INPUT],
                output_names=[output],
                dynamic_axes=axes,
                opset_version=OPSET,
                **classic,
            )
        except Exception as error:  # the exporter's own kinds, and whatever a model says to a traced tensor
            said = runs.shortened(str(error) or type(error).__name__, 200)
            raise ExportError(
                f"{_named(model)} cannot be written as ONNX, which holds a fixed sequence of tensor operations; torch's"
                f" exporter said: {said}"
            ) from error
        return file.read_bytes()


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """torch prints the whole graph, from C++, where an operator is missing."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)


def _parts(images: Tensor) -> Sequence[Tensor]:
    """`images` in batches of one, of three and of the rest: none of the size that was traced, where there are more."""
    return [part for part in (images[:1], images[1:4], images[4:]) if len(part)]


def _compared(data: bytes, images: Tensor, reference: Tensor, kind: str, path: Path) -> tuple[float, float | None]:
    """(largest difference between the file's answers and torch's `reference`, fraction of equal classes)."""
    session = open_session(data, path)
    if [i.name for i in session.get_inputs()] != [INPUT]:
        raise ExportError(
            f"{path} was not written: its answers would not depend on the images, as what the model does with them "
            "leaves torch (NumPy, pillow, a file)"
        )
    try:
        answers = [torch.from_numpy(session.run(None, {INPUT: part.numpy()})[0]) for part in _parts(images)]
    except Exception as error:  # onnxruntime's own kinds
        said = runs.shortened(str(error), 200)
        raise ExportError(f"{path} was not written: onnxruntime cannot run it for any batch: {said}") from error
    if [len(a) for a in answers] != [len(p) for p in _parts(images)]:
        raise ExportError(f"{path} was not written: it does not give an answer for each image of a batch")
    found = torch.cat(answers)
    difference = float((found - reference).abs().nan_to_num(float("inf")).max())
    if kind == "purifier":
        return difference, None
    return difference, float((found.argmax(1) == reference.argmax(1)).float().mean())


def _quantized(data: bytes, images: Tensor, path: Path) -> bytes:
    """The file with 8-bit weights (a scale per output channel) and 8-bit inputs of convolutions and matrix products.

    images: off which the range of each input is read.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images.split(32))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.left, None)
            return None if part is None else {INPUT: part.numpy()}

    if not len(images):
        raise ExportError("int8 reads its ranges off images; pass at least one")
    with tempfile.TemporaryDirectory() as folder, _quiet_log():
        plain, folded, small = (Path(folder) / f"{name}.onnx" for name in ("plain", "folded", "int8"))
        plain.write_bytes(data)
        quant_pre_process(str(plain), str(folded))  # batch norms go into their convolutions first
        quantize_static(
            str(folded),
            str(small),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_WEIGHED,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return small.read_bytes()


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """onnxruntime's quantization advises, by the root logger, what is done here already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
