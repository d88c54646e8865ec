"""Figure 2: the networks, drawn from the modules themselves, with the shapes that they pass on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unperturb.results.figures import DPI, fitting
from unperturb.results.names import in_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Shape = tuple[int, ...]  # of one image's features: (C, H, W), or (F,)
CONTAINERS = (nn.Sequential, nn.ModuleList)
WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
BOX, GAP, LEVEL = 1.3, 0.42, 0.98  # inches
SAID = {name: name.replace("_", " ") for name in ("pixel_shuffle", "pixel_unshuffle", "tanh", "sigmoid", "clamp")}
NAMES = {
    nn.BatchNorm2d: "batch norm",
    nn.LeakyReLU: "leaky ReLU",
    nn.AdaptiveAvgPool2d: "average pool",
    nn.Flatten: "flatten",
}
COLORS = {"down": "#9ecae1", "up": "#a1d99b", "keep": "#fdd0a2", "end": "#eeeeee"}


@dataclass
class Box:
    """One box of a drawing. lines: what was done before it without a module, if anything, what it is, and what follows
    it; shape: of what it passes on; sources: the boxes that what it is given was computed from."""

    lines: list[str]
    shape: Shape
    kind: str
    sources: set[int] = field(default_factory=set)


class _Origins(TorchFunctionMode):
    """Of every tensor, the boxes that it was computed from since: whatever torch computes hands them on."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, set[int]] = {}
        self.by: dict[int, list[str]] = {}  # of every tensor, what `SAID` of was done to it since
        self.alive: list[Tensor] = []  # an id is given again once its owner is gone

    def mark(self, tensor: Tensor, boxes: set[int], by: Iterable[str] = ()) -> None:
        self.of[id(tensor)], self.by[id(tensor)] = boxes, list(dict.fromkeys(by))
        self.alive.append(tensor)

    def behind(self, value: Any) -> tuple[set[int], list[str]]:
        """The boxes behind all tensors in `value`, and what was done since."""
        ids = [id(tensor) for tensor in _tensors(value)]
        boxes: set[int] = set().union(*(self.of.get(i, set()) for i in ids))
        return boxes, [name for i in ids for name in self.by.get(i, [])]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and id(out) not in self.of:
            boxes, by = self.behind([args, kwargs or {}])
            name = getattr(func, "__name__", "")
            self.mark(out, boxes, [*by, SAID[name]] if name in SAID else by)
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


@torch.no_grad()
def boxes(network: nn.Module, shape: Shape) -> list[Box]:
    """The boxes of `network`, in the order in which it calls them, for one image of `shape` (C, H, W): the image first,
    what comes out last.

    A box is a convolution or a linear layer with the norms and activations behind it, or a module that leaves the shape
    as it is, such as a residual block.
    """
    origins, found = _Origins(), [Box(["", "image"], shape, "end")]
    modes = [(module, module.training) for module in network.modules()]
    given: dict[nn.Module, tuple[set[int], list[str]]] = {}

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given[module] = origins.behind(inputs)

    def after(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        shown = tuple(out.shape[1:]) or (1,)
        sources, by = given[module]
        if not isinstance(module, WEIGHTED) and not _opaque(module):
            last = found[-1]  # a norm, an activation, a pooling: a line of the box before
            last.lines, last.shape = [*last.lines, _called(module)], shown
            origins.mark(out, sources, by)
            return
        kind = _direction(found[max(sources, default=0)].shape, shown)
        found.append(Box([", ".join(by), _called(module)], shown, kind, sources))
        origins.mark(out, {len(found) - 1})

    handles = []
    for module in _drawn(network):
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        network.eval()
        parameter = next(network.parameters())
        with origins:
            image = torch.zeros(1, *shape, device=parameter.device)
            origins.mark(image, {0})
            out = network(image)
        ends, by = origins.behind(out)
        found.append(Box([", ".join(by), "output"], tuple(out.shape[1:]) or (1,), "end", ends))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return found


def _drawn(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below `module` that are drawn: containers are opened, and so is what is made of other shapes."""
    for child in module.children():
        if not list(child.children()) or _opaque(child):
            yield child
        else:
            yield from _drawn(child)


def _opaque(module: nn.Module) -> bool:
    """Whether a module is one box though it has parts: its own code, not a container's, says how they are put
    together."""
    return bool(list(module.children())) and not isinstance(module, CONTAINERS)


def _called(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        kind = "conv" if isinstance(module, nn.Conv2d) else "deconv"
        step = f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
        return f"{kind} {module.kernel_size[0]}x{module.kernel_size[1]}{step}"
    if isinstance(module, nn.Linear):
        return "linear"
    if _opaque(module):
        inner = [_called(part) for part in module.modules() if isinstance(part, WEIGHTED)]
        same = len(set(inner)) == 1
        return f"block\n{len(inner)} x {inner[0]}" if same else f"block of {len(inner)}"
    names = {
        nn.BatchNorm2d: "batch norm",
        nn.LeakyReLU: "leaky ReLU",
        nn.AdaptiveAvgPool2d: "average pool",
        nn.Flatten: "flatten",
    }
    return names.get(type(module), type(module).__name__)


def _direction(before: Shape, after: Shape) -> str:
    """Whether a box makes pictures smaller, larger, or leaves their size."""
    sizes = [shape[-1] if len(shape) > 1 else 1 for shape in (before, after)]
    return "down" if sizes[1] < sizes[0] else "up" if sizes[1] > sizes[0] else "keep"


# Drawing ------------------------------------------------------------------------------------------------------------


@in_figure
def architecture_figure(title: str, shape: Shape, networks: dict[str, nn.Module]) -> Figure:
    """Each of `networks` (by its name) for images of `shape` as a line of boxes, from left to right in the order in
    which they are computed: the fewer pixels, the lower. Under each box the shape of what it passes on; arcs are skips.

    Source: the paper, Fig. 2.
    """
    from matplotlib.figure import Figure

    drawn = {name: boxes(network, shape) for name, network in networks.items()}
    talls = [LEVEL * len(_levels(of)) + 1.1 for of in drawn.values()]
    width = max(len(of) for of in drawn.values()) * (BOX + GAP) + 0.5
    width, height = max(width, 7.5), sum(talls) + 0.45
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    axes.text(0.2, 0.12, title, fontsize=fitting(title, width - 0.4, 13, "bold"), fontweight="bold", va="top")
    top = 0.45
    for (name, of), tall in zip(drawn.items(), talls):
        count = sum(parameter.numel() for parameter in networks[name].parameters())
        axes.text(0.2, top + 0.1, f"{name}, {count:,} parameters", fontsize=11.5, va="top", color="#333333")
        _line(axes, of, top + 0.55)
        top += tall
    return figure


def _levels(of: Iterable[Box]) -> list[int]:
    """The heights of feature maps that occur, the largest first; vectors are a level of their own."""
    return sorted({_level(box) for box in of}, reverse=True)


def _level(box: Box) -> int:
    return box.shape[-1] if len(box.shape) > 1 else 0


def _line(axes: Any, of: list[Box], top: float) -> None:
    levels = _levels(of)
    x = [0.25 + i * (BOX + GAP) for i in range(len(of))]
    y = [top + 0.35 + LEVEL * levels.index(_level(box)) for box in of]
    tall = 0.62
    arrow = {"arrowstyle": "-|>", "color": "#444444", "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    for i, box in enumerate(of):
        for source in sorted(box.sources):
            near = source == i - 1
            start, end = (x[source] + BOX, y[source] + tall / 2), (x[i], y[i] + tall / 2)
            if near:
                axes.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=1)
            else:
                over = min(y[source : i + 1]) - 0.22
                points = [
                    (x[source] + BOX * 0.75, y[source]),
                    (x[source] + BOX * 0.75, over),
                    (x[i] + BOX * 0.25, over),
                ]
                axes.plot(*zip(*points), color="#888888", lw=1.4, linestyle=(0, (4, 2)), zorder=0)
                down = {**arrow, "color": "#888888"}
                axes.annotate("", xy=(x[i] + BOX * 0.25, y[i]), xytext=points[-1], arrowprops=down, zorder=0)
        _box(axes, box, x[i], y[i], tall)


def _box(axes: Any, box: Box, x: float, y: float, tall: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), BOX, tall, boxstyle=style, facecolor=COLORS[box.kind], edgecolor="#555555"))
    text = "\n".join(filter(None, [*box.lines[:2], ", ".join(box.lines[2:])]))
    lines = "\n".join(_folded(text, 21))
    size = fitting(lines, BOX - 0.1, 9.5)
    axes.text(x + BOX / 2, y + tall / 2, lines, fontsize=size, ha="center", va="center", linespacing=1.1, zorder=3)
    shape = " x ".join(map(str, box.shape))
    put = {"ha": "center", "va": "top", "color": "#333333"}
    axes.text(x + BOX / 2, y + tall + 0.04, shape, fontsize=fitting(shape, BOX + GAP - 0.05, 9.5), **put)


def _folded(text: str, width: int) -> list[str]:
    import textwrap

    return [part for line in text.splitlines() for part in textwrap.wrap(line, width)]
