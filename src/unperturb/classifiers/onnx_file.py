"""The network of an ONNX file, by its outputs only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


class OnnxModel(nn.Module):
    """What an ONNX file computes, run by onnxruntime. It gives no gradient: who attacks it sees outputs only
    (knowledge `black_box`).

    forward: images `(N, C, H, W)` on any device -> the file's output as one tensor `(N, ...)`; where it has several, a
    dict of them by name. A batch size that the file fixes is met by splitting the images and filling up the last part.

    Raises `ImportError` without onnxruntime, `FileNotFoundError`, and `ValueError` where onnxruntime cannot read the
    file, where its input is not one batch of images, and for images of another shape than it takes.
    """

    differentiable = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = str(path)
        self.session = _open(Path(path))
        inputs = self.session.get_inputs()
        sizes = [tuple(i.shape or ()) for i in inputs]
        if len(inputs) != 1 or len(sizes[0]) != 4 or inputs[0].type not in _DTYPES:
            has = ", ".join(f"{i.name}: {i.type} {shape}" for i, shape in zip(inputs, sizes))
            raise ValueError(f"{self.path} takes {has or 'nothing'}; expected one float input (N, C, H, W)")
        self.input, self.dtype = inputs[0].name, _DTYPES[inputs[0].type]
        # A dimension that is free has a name there, or none.
        self.batch, *self.shape = (d if isinstance(d, int) and d > 0 else None for d in sizes[0])
        self.outputs = [o.name for o in self.session.get_outputs() if o.type.startswith("tensor(")]

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModel:
        # A session can be neither copied nor changed: both may ask the same one.
        copy = OnnxModel.__new__(OnnxModel)
        nn.Module.__init__(copy)
        for name in ("path", "session", "input", "dtype", "batch", "shape", "outputs"):
            setattr(copy, name, getattr(self, name))
        return copy.train(self.training)

    def extra_repr(self) -> str:
        return self.path

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        fits = images.dim() == 4 and all(d in (None, has) for d, has in zip(self.shape, images.shape[1:]))
        if not fits:
            wanted = ", ".join(str(d or "any") for d in self.shape)
            raise ValueError(f"{self.path} takes images (N, {wanted}); got {tuple(images.shape)}")
        size = self.batch or max(len(images), 1)
        parts = [self._run(part, size) for part in images.detach().to("cpu", self.dtype).split(size)]
        answers = {name: torch.cat([part[name] for part in parts]).to(images.device) for name in parts[0]}
        return next(iter(answers.values())) if len(answers) == 1 else answers

    def _run(self, images: Tensor, size: int) -> dict[str, Tensor]:
        """The outputs for at most `size` images, of which `size` are shown; those without a batch are left out."""
        shown = torch.cat([images, images.new_zeros(size - len(images), *images.shape[1:])])
        values = self.session.run(self.outputs, {self.input: shown.numpy()})
        return {
            name: torch.from_numpy(value)[: len(images)]
            for name, value in zip(self.outputs, values)
            if value.ndim and len(value) == size
        }


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no ONNX file {path}")
    runtime = onnxruntime_or_error(path)
    here = runtime.get_available_providers()
    return open_session(str(path), path, [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in here])


def onnxruntime_or_error(path: object) -> Any:
    """onnxruntime, to read or write `path`; raises `ImportError` that says how to install it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"{path} is read by onnxruntime, which is not installed: pip install 'unperturb[onnx]'"
        ) from error
    return onnxruntime


def open_session(model: str | bytes, path: object, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Any:
    """An onnxruntime session of a file, or of its bytes, that `path` names to the user, with as many threads as torch
    has; raises `ValueError` where onnxruntime cannot run it."""
    runtime = onnxruntime_or_error(path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # its default is every core, whatever torch was told
    try:
        return runtime.InferenceSession(model, options, providers=list(providers))
    except Exception as error:  # onnxruntime has a dozen kinds, which are no kinds of one
        raise ValueError(f"{path} is no ONNX file that onnxruntime can run: {error}") from error
