"""Figures from results and samples: what the images look like, what a system makes of them, and what it keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.results.names import (
    LONGEST,
    attack_name,
    attacker_name,
    budget_name,
    columns,
    first,
    in_figure,
    norm_name,
    one_line,
    split_name,
)
from unperturb.results.results import Block, Results
from unperturb.results.robust import ADAPTIVE, Judged, RobustAccuracy, proportion
from unperturb.runs import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which white paper swallows: told apart by color-blind readers too. Signs,
# hatches and marks repeat what color says.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # as many as have no factor in common with the colors
RIGHT, WRONG, BARE = "#0072B2", "#C44E00", "#8A8A8A"
BARS = {"clean": (BARE, "..."), "oblivious": (RIGHT, ""), "adaptive": ("#E69F00", "///")}
DPI = 120
SLOT = 1.0  # inches that the bars of a system and its name take
WIDEST = 15.0  # inches; a page shows a wider figure too small to read
# Where each view of an image stands in a sample's `confidence` and `prediction`.
CLEAN, ADVERSARIAL, RESTORED = 0, 1, 3


# Samples ------------------------------------------------------------------------------------------------------------


@in_figure
def restored_figure(cell: Mapping[str, Any], tensors: Mapping[str, Any]) -> Figure:
    """Rows "Normal", "Adv" and the system's name: at most ten sampled images clean, attacked, attacked and purified.

    Under each its predicted class, blue with a tick where right, orange with a cross where wrong. cell, tensors: one
    entry of `unperturb.results.samples.read_samples`. Source: the paper, Figs. 3-7.
    """
    count, side, margin = min(len(tensors["label"]), 10), 0.95, 0.9
    axes = _sheet(max(margin + count * side, 7.1), 0.66 + 3 * 1.26)
    views = (("Normal", "clean", CLEAN), ("Adv", "adversarial", ADVERSARIAL), (cell["system"], "restored", RESTORED))
    answers = [[class_name(cell, int(n)) for n in tensors["prediction"][:count, view]] for _, _, view in views]
    size = fitting("\n".join(f"{name} ✓" for line in answers for name in line), side - 0.06, 10.5)
    for line, (label, key, view) in enumerate(views):
        top = 0.66 + 1.26 * line
        _text(axes, margin - 0.1, top + side / 2, wrapped(label, 11), margin - 0.15, 12, ha="right", va="center")
        for i in range(count):
            left = margin + i * side
            _show(axes, tensors[key][i], left, top, side - 0.06)
            right = int(tensors["prediction"][i, view]) == int(tensors["label"][i])
            text, color = f"{answers[line][i]} {'✓' if right else '✗'}", RIGHT if right else WRONG
            middle = left + side / 2 - 0.03
            axes.text(middle, top + side, text, fontsize=size, color=color, ha="center", va="top")
    _title(axes, cell, "Under each image, the class predicted: ✓ right, ✗ wrong.")
    return axes.figure


@in_figure
def confidence_figure(cell: Mapping[str, Any], tensors: Mapping[str, Any], examples: int = 3) -> Figure:
    """Clean -> adversarial -> restored, with the confidence in the true label under each image.

    Shown are the first `examples` sampled images that are right when clean and wrong in the model that was attacked
    (the base classifier for an attacker who knows no more, whether or not the system then saves them; else the system),
    or the first of all where there are none. cell, tensors: one entry of `unperturb.results.samples.read_samples`.
    Source: the paper, Fig. 1.
    """
    label, predicted = tensors["label"].numpy(), tensors["prediction"].numpy()
    attacked = RESTORED if cell["knowledge"] in ADAPTIVE else ADVERSARIAL
    turned = (predicted[:, CLEAN] == label) & (predicted[:, attacked] != label)
    chosen = [int(i) for i in (turned.nonzero()[0] if turned.any() else range(len(label)))][:examples]
    side, step = 1.5, 2.25
    axes = _sheet(0.7 + 2 * step + side, 0.95 + 2.1 * len(chosen))
    views = (("clean", "clean", CLEAN), ("adversarial", "adversarial", ADVERSARIAL), ("restored", "restored", RESTORED))
    for column, (title, key, view) in enumerate(views):
        left = 0.35 + column * step
        _text(axes, left + side / 2, 0.88, title, side, 12, ha="center", va="bottom")
        for line, i in enumerate(chosen):
            top = 0.95 + 2.1 * line
            _show(axes, tensors[key][i], left, top, side)
            sure = float(tensors["confidence"][i, view])
            right = predicted[i, view] == label[i]
            taken = "✓" if right else f"✗ {class_name(cell, int(predicted[i, view]))}"
            text = f"{class_name(cell, int(label[i]))}: {confidence(sure)}\n{taken}"
            color = RIGHT if right else WRONG
            _text(axes, left + side / 2, top + side + 0.06, text, step - 0.1, 11.5, color=color, ha="center", va="top")
            if column:
                arrow = {"arrowstyle": "-|>", "color": "#444444", "lw": 1.6}
                y = top + side / 2
                axes.annotate("", xy=(left - 0.12, y), xytext=(left - step + side + 0.12, y), arrowprops=arrow)
    _title(axes, cell, "Under each image, the confidence in its true class; ✗: what it is taken for instead.")
    return axes.figure


def class_name(cell: Mapping[str, Any], number: int) -> str:
    """What people call a class; a number below 0 is the answer of a model whose logits were not finite."""
    if number < 0:
        return "no answer"
    names = cell.get("class_names") or []
    return one_line(names[number], 12) if number < len(names) else str(number)


def confidence(value: float) -> str:
    """A confidence as people read it: `98.3 %`; empty where there is none."""
    return f"{100 * value:.1f} %" if value == value else ""


# Accuracies ---------------------------------------------------------------------------------------------------------


@in_figure
def accuracy_figure(results: Results) -> Figure:
    """What each system keeps, with 95 % Wilson intervals: a panel per block and budget, in it a group per system, in
    that a bar clean, under the oblivious attacks, and under everything that was tried (`robust_accuracy` of the whole
    knowledge). What was not tried has no bar.
    """
    from matplotlib.figure import Figure

    results = results.readable()
    panels = [(block, *budget) for block in results.blocks for budget in results.budgets(block)]
    panels = panels or [(block, "linf", 1.0) for block in results.blocks]  # where no attack had a budget
    most = max(len(results.systems[block]) for block, _, _ in panels)
    width = max(4.3, SLOT * most + 0.8)
    across = min(len(panels), max(1, int(WIDEST / width)))
    down = -(-len(panels) // across)
    said = {"clean": "clean", "oblivious": "oblivious attackers", "adaptive": "every attacker tried"}
    beside = sum(text_width(text, 11) + 0.75 for text in said.values()) < width * across
    head = 0.4 if beside else 0.8  # inches of the legend, on one line or three
    total = 3.3 * down + 0.5 + head
    figure = Figure(figsize=(width * across + 0.3, total), dpi=DPI)
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    judged = {block: [Judged.of(results, block, system) for system in results.systems[block]] for block, _, _ in panels}
    for axes, (block, norm, eps) in zip(grid, panels):
        _bars(axes, judged[block], norm, eps)
        title = f"{block_name(block)}\n{norm_name(norm)} {budget_name(eps)}"
        axes.set_title(title, fontsize=fitting(title, width - 0.5, 11.5), loc="left")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("accuracy, %", fontsize=11)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=color, hatch=hatch, edgecolor="white", linewidth=0, label=said[key])
        for key, (color, hatch) in BARS.items()
    ]
    figure.legend(handles=handles, loc="upper left", ncols=3 if beside else 1, frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 1 - head / total), h_pad=1.2, w_pad=1.5)
    return figure


def _bars(axes: Any, systems: Sequence[Judged], norm: Any, eps: float) -> None:
    """The bars of one panel."""
    wide = 0.84 / len(BARS)
    for place, judged in enumerate(systems):
        bars = {"clean": clean_of(judged)} | {key: interval(of) for key, of in judged.left(norm, eps).items()}
        for i, (key, (color, hatch)) in enumerate(BARS.items()):
            at = place + (i - (len(BARS) - 1) / 2) * wide
            found = bars[key]
            if found is None:
                axes.text(at, 1.5, "not tried", fontsize=8.5, color="#444444", rotation=90, ha="center", va="bottom")
                continue
            value, low, high = (100 * v for v in found)
            axes.bar(at, value, wide * 0.92, color=color, edgecolor="white", hatch=hatch, linewidth=0)
            spread = [[max(value - low, 0)], [max(high - value, 0)]]
            axes.errorbar(at, value, spread, fmt="none", ecolor="#222222", elinewidth=1.2, capsize=2.5)
            said = f"{value:.1f}" if value < 99.95 else "100"  # its neighbors are near
            axes.text(at, high + 1.5, said, fontsize=8, color="#222222", ha="center", va="bottom")
    sizes = own_sizes(systems)
    labels = ["\n".join(filter(None, (wrapped(one.system, 12), sizes[one.system]))) for one in systems]
    axes.set_xticks(range(len(systems)), labels, fontsize=fitting("\n".join(labels), SLOT - 0.06, 10))
    axes.set_xlim(-0.6, len(systems) - 0.4)
    percent_axis(axes)
    axes.set_ylim(0, 109)
    axes.tick_params(axis="x", length=0)


def interval(found: RobustAccuracy | None) -> tuple[float, float, float] | None:
    """Accuracy and the ends of its interval, in [0, 1]; None where nothing was tried."""
    return None if found is None else (found.accuracy, found.low, found.high)


def own_sizes(systems: Sequence[Judged]) -> dict[str, str]:
    """`n 100` of each system by its name, where those side by side were judged on other numbers of images; else ""."""
    differ = len({len(one.index) for one in systems if len(one.index)}) > 1
    return {one.system: f"n {len(one.index):,}" if differ else "" for one in systems}


def clean_of(judged: Judged) -> tuple[float, float, float] | None:
    """The accuracy that nobody attacks, on the same images as `Judged.under` counts."""
    if not len(judged.index):
        return None
    of = proportion(judged.clean.mean(axis=0))
    return of["accuracy"], of["low"], of["high"]


# Drawing ------------------------------------------------------------------------------------------------------------


@in_figure
def save(figure: Figure, path: Path) -> Path:
    """Write `figure` to `path` as PNG, atomically; returns `path`."""
    # The version of matplotlib would otherwise be in the file: the same rows give the same bytes.
    write_atomically(path, lambda p: figure.savefig(p, format="png", metadata={"Software": None}))
    return path


def looks(systems: Sequence[str], undefended: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """How each system is drawn: color, mark and line. What is undefended is gray and dashed; no two others are alike
    in both color and mark."""
    found: dict[str, dict[str, Any]] = {}
    for name in systems:
        number = len(found) - sum(n in undefended for n in found)
        bare = name in undefended
        color, mark = (BARE if bare else PALETTE[number % len(PALETTE)]), MARKS[number % len(MARKS)]
        found[name] = {"color": color, "marker": "*" if bare else mark, "linestyle": (0, (4, 2)) if bare else "-"}
    return found


def percent_axis(axes: Any, size: float = 10) -> None:
    """An upright axis of percent, with a grid and no frame."""
    axes.set_ylim(0, 104)
    axes.set_yticks(range(0, 101, 25))
    axes.tick_params(axis="y", labelsize=size, length=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def spread_out(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Middles for labels of these heights, each as near to where it is wanted as the others allow, all of them, if they
    fit, between `low` and `high`; in the order that was given."""
    stacks: list[tuple[list[int], float]] = []  # those that touch, and the middle of all of them

    def tall(stack: list[int]) -> float:
        return sum(heights[i] for i in stack)

    for number in sorted(range(len(wanted)), key=lambda i: (wanted[i], i)):
        stack, at = [number], wanted[number]
        while True:
            at = max(min(at, high - tall(stack) / 2), low + tall(stack) / 2)
            if not stacks or stacks[-1][1] + tall(stacks[-1][0]) / 2 <= at - tall(stack) / 2 + 1e-9:
                break
            stack = [*stacks.pop()[0], *stack]
            at = sum(wanted[i] for i in stack) / len(stack)
        stacks.append((stack, at))
    places = [0.0] * len(wanted)
    for stack, at in stacks:
        bottom = at - tall(stack) / 2
        for i in stack:
            places[i] = bottom + heights[i] / 2
            bottom += heights[i]
    return places


def attacker_title(knowledge: str, *, defended: bool) -> str:
    """What the attacker knows; of what is undefended there is nothing to know: it is attacked directly."""
    return "direct" if knowledge == "oblivious" and not defended else attacker_name(knowledge)


def block_name(block: Block) -> str:
    """A block as titles say it: `conv on digits (100 of test)`."""
    return one_line(f"{block.classifier} on {block.dataset} ({split_name(block.split)})")


def fitting(text: str, width: float, size: float, weight: str = "normal") -> float:
    """`size` points, or as much less as the lines of `text` need to fit `width` inches."""
    longest = text_width(text, size, weight)
    return size * min(1.0, width / longest) if longest else size


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """How many inches the longest line of `text` takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    lines = (line for line in text.split("\n") if line)
    return max((text_to_path.get_text_width_height_descent(line, font, False)[0] for line in lines), default=0) / 72


def wrapped(text: str, width: int = 10) -> str:
    """`text` on at most three lines of `width` columns, broken behind a joint where it has one."""
    lines = [""]
    for part in re.findall(r"[^ _-]*[ _-]*", one_line(text)):
        while part:
            piece = first(part, width)
            part = part[len(piece) :]
            if lines[-1] and columns(lines[-1] + piece.rstrip()) > width:
                lines.append("")
            lines[-1] += piece
    lines = [line.rstrip() for line in lines]
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], f"{first(lines[2], width - 1)}…"])


def _sheet(width: float, height: float) -> Any:
    """Axes over the whole of a new figure, in inches from its top left: one for all images draws in a fifth of the time
    that one for each takes."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(width, height), dpi=DPI).add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return axes


def _show(axes: Any, image: Any, left: float, top: float, side: float) -> None:
    """One uint8 `(C, H, W)` image, framed, its longer side `side` inches."""
    from matplotlib.patches import Rectangle

    pixels = image.numpy().transpose(1, 2, 0)
    height, width = (side * n / max(pixels.shape[:2]) for n in pixels.shape[:2])
    x, y = left + (side - width) / 2, top + (side - height) / 2
    gray = {"cmap": "gray", "vmin": 0, "vmax": 255} if pixels.shape[2] == 1 else {}
    shown = pixels[:, :, 0] if gray else pixels
    axes.imshow(shown, extent=(x, x + width, y + height, y), aspect="auto", interpolation="nearest", **gray)
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="#bbbbbb", linewidth=0.8))


def _text(axes: Any, x: float, y: float, text: str, width: float, size: float, **style: Any) -> None:
    axes.text(x, y, text, fontsize=fitting(text, width, size, style.get("fontweight", "normal")), **style)


def _title(axes: Any, cell: Mapping[str, Any], reading: str) -> None:
    width = axes.get_xlim()[1] - 0.2
    text = one_line(
        f"{one_line(cell['system'], LONGEST)} before {one_line(cell['classifier'], LONGEST)} on {cell['dataset']}: "
        f"{attack_name(cell['attack'], cell['eps'])}, {attacker_name(cell['knowledge'])}"
    )
    _text(axes, 0.1, 0.08, text, width, 12.5, va="top", fontweight="bold")
    _text(axes, 0.1, 0.34, reading, width, 10.5, va="top", color="#333333")
