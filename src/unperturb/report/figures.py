"""Figures from rows and samples: what the images look like, what the classifier makes of them, and the accuracies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.report.escape import columns, first, in_figure, one_line, readable
from unperturb.report.tables import (
    BLOCK,
    OBLIVIOUS,
    accuracy_table,
    attack_name,
    attacker_name,
    groups,
    split_name,
    worst_case,
)
from unperturb.runs import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by color-blind readers too. Signs and hatches repeat what color says.
RIGHT, WRONG, BARE = "#0072B2", "#C44E00", "#8A8A8A"
BARS = {"undefended": (BARE, "..."), "oblivious": (RIGHT, ""), "white_box": ("#E69F00", "///")}
DPI = 120
SLOT = 0.9  # inches that the bars of an attack and its name take
WIDEST = 15.0  # inches; a page shows a wider figure too small to read
# Where each view of an image stands in a sample's `confidence` and `prediction`.
CLEAN, ADVERSARIAL, RESTORED = 0, 1, 3


@in_figure
def restored_figure(cell: Mapping[str, Any], tensors: Mapping[str, Any]) -> Figure:
    """Rows "Normal", "Adv" and the defense's name: at most ten sampled images clean, attacked, attacked and purified.

    Under each its predicted class, blue with a tick where right, orange with a cross where wrong. cell, tensors: one
    entry of `unperturb.samples.read_samples`. Source: the paper, Figs. 3-7.
    """
    count, side, margin = min(len(tensors["label"]), 10), 0.95, 0.9
    axes = _sheet(max(margin + count * side, 7.1), 0.66 + 3 * 1.26)
    views = (("Normal", "clean", CLEAN), ("Adv", "adversarial", ADVERSARIAL), (cell["defense"], "restored", RESTORED))
    answers = [[class_name(cell, int(n)) for n in tensors["prediction"][:count, view]] for _, _, view in views]
    size = fitting("\n".join(f"{name} ✓" for line in answers for name in line), side - 0.06, 10.5)
    for line, (label, key, view) in enumerate(views):
        top = 0.66 + 1.26 * line
        _text(axes, margin - 0.1, top + side / 2, _wrapped(label, 9), margin - 0.15, 12, ha="right", va="center")
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
    (bare for an oblivious attacker, whether or not the defense then saves them; protected for one who knows of it), or
    the first of all where there are none. cell, tensors: one entry of
    `unperturb.samples.read_samples`. Source: the paper, Fig. 1.
    """
    label, predicted = tensors["label"].numpy(), tensors["prediction"].numpy()
    attacked = ADVERSARIAL if cell["knowledge"] in OBLIVIOUS else RESTORED
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


@in_figure
def accuracy_figure(rows: pd.DataFrame) -> Figure:
    """Accuracy with its 95 % Wilson interval: a panel per classifier and defense, in it a group per attack and
    the worst case, in that a bar for undefended, oblivious and white box.

    rows: as `unperturb.schema.read_rows` gives them; of one data set, or the panels get small.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    rows, _ = readable(rows)
    accuracy = accuracy_table(rows)
    worst = worst_case(rows).assign(attack="worst case")
    # Where there is no budget there is no one worst case to draw.
    accuracy = pd.concat([accuracy, worst[worst["eps"].notna() & (worst["knowledge"] != "all")]], ignore_index=True)
    accuracy = accuracy[accuracy["knowledge"].isin(["", "oblivious", "white_box"])]  # those that have a bar
    accuracy = accuracy.assign(name=[attack_name(a, eps) for a, eps in zip(accuracy["attack"], accuracy["eps"])])
    blocks = list(groups(accuracy, BLOCK))
    defenses = [d for d in accuracy["defense"].unique() if d != "none"] or ["none"]
    panels = [(key, block, defense) for key, block in blocks for defense in defenses]
    width = max(4.3, SLOT * max(block["name"].nunique() for _, block in blocks))
    across = min(len(defenses) if len(defenses) > 1 else min(2, len(blocks)), max(1, int(WIDEST / width)))
    down = -(-len(panels) // across)
    total = 3.1 * down + 0.9
    figure = Figure(figsize=(width * across + 0.3, total), dpi=DPI)
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes, ((dataset, split, classifier), block, defense) in zip(grid, panels):
        _bars(axes, block, defense)
        what = "undefended" if defense == "none" else defense
        title = f"{dataset} ({split_name(split)}), {classifier}\n{what}"
        axes.set_title(title, fontsize=fitting(title, width - 0.5, 11.5), loc="left")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("accuracy, %", fontsize=11)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", ncols=3, frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / total), h_pad=1.2, w_pad=1.5)
    return figure


@in_figure
def save(figure: Figure, path: Path) -> Path:
    """Write `figure` to `path` as PNG, atomically; returns `path`."""
    # The version of matplotlib would otherwise be in the file: the same rows give the same bytes.
    write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=DPI, metadata={"Software": None}))
    return path


def _bars(axes: Any, block: pd.DataFrame, defense: str) -> None:
    """The bars of one panel; `block` holds the accuracies of one classifier."""
    places = {name: i for i, name in enumerate(dict.fromkeys(block["name"]))}
    shown = {
        "undefended": ("none", "oblivious"),
        "oblivious": (defense, "oblivious"),
        "white_box": (defense, "white_box"),
    }
    if defense == "none":
        del shown["oblivious"], shown["white_box"]
    wide = 0.84 / len(shown)
    for i, (key, (of, knowledge)) in enumerate(shown.items()):
        mine = block[(block["defense"] == of) & block["knowledge"].isin([knowledge, ""])]
        at = [places[name] + (i - (len(shown) - 1) / 2) * wide for name in mine["name"]]
        value, low, high = (100 * mine[k].to_numpy() for k in ("accuracy", "low", "high"))
        color, hatch = BARS[key]
        axes.bar(
            at, value, wide * 0.92, label=attacker_name(key), color=color, edgecolor="white", hatch=hatch, linewidth=0
        )
        spread = [value - low, high - value]
        axes.errorbar(at, value, spread, fmt="none", ecolor="#222222", elinewidth=1.2, capsize=2.5)
    labels = ["\n".join(map(_wrapped, name.split(", "))) for name in places]
    axes.set_xticks(list(places.values()), labels, fontsize=fitting("\n".join(labels), SLOT - 0.06, 10))
    axes.set_ylim(0, 104)
    axes.set_yticks(range(0, 101, 25))
    axes.tick_params(axis="y", labelsize=10)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


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


def fitting(text: str, width: float, size: float, weight: str = "normal") -> float:
    """`size` points, or as much less as the lines of `text` need to fit `width` inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    lines = (line for line in text.split("\n") if line)
    longest = max((text_to_path.get_text_width_height_descent(line, font, False)[0] for line in lines), default=0)
    return size * min(1.0, 72 * width / longest) if longest else size


def _title(axes: Any, cell: Mapping[str, Any], reading: str) -> None:
    width = axes.get_xlim()[1] - 0.2
    text = one_line(
        f"{cell['defense']} before {cell['classifier']} on {cell['dataset']}: "
        f"{attack_name(cell['attack'], cell['eps'])}, {attacker_name(cell['knowledge'])}"
    )
    _text(axes, 0.1, 0.08, text, width, 12.5, va="top", fontweight="bold")
    _text(axes, 0.1, 0.34, reading, width, 10.5, va="top", color="#333333")


def class_name(cell: Mapping[str, Any], number: int) -> str:
    """What people call a class; a number below 0 is the answer of a model whose logits were not finite."""
    if number < 0:
        return "no answer"
    names = cell.get("class_names") or []
    return one_line(names[number], 12) if number < len(names) else str(number)


def confidence(value: float) -> str:
    """A confidence as people read it: `98.3 %`; empty where there is none."""
    return f"{100 * value:.1f} %" if value == value else ""


def _wrapped(text: str, width: int = 10) -> str:
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
