"""Figures from rows and samples: what the images look like, what the classifier makes of them, and the accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.report.tables import BLOCK, accuracy_table, attack_name, attacker_name, groups, worst_case
from unperturb.runs import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by color-blind readers too. Signs and hatches repeat what color says.
RIGHT, WRONG, BARE = "#0072B2", "#C44E00", "#8A8A8A"
BARS = {"undefended": (BARE, "..."), "oblivious": (RIGHT, ""), "white_box": ("#E69F00", "///")}
DPI = 120
WIDEST = 15.0  # inches; a page shows a wider figure too small to read
# Where each view of an image stands in a sample's `confidence` and `prediction`.
CLEAN, ADVERSARIAL, RESTORED = 0, 1, 3


def restored_figure(cell: Mapping[str, Any], tensors: Mapping[str, Any]) -> Figure:
    """Rows "Normal", "Adv" and the defense's name: the first ten sampled images clean, attacked, attacked and purified.

    Under each its predicted class, blue with a tick where right, orange with a cross where wrong. cell, tensors: one
    entry of `unperturb.runs.read_samples`. Source: the paper, Figs. 3-7.
    """
    from matplotlib.figure import Figure

    count = min(len(tensors["label"]), 10)
    width = max(0.95 * count, 6.2)
    figure = Figure(figsize=(width + 0.9, 4.55), dpi=DPI)
    grid = figure.subplots(3, count, squeeze=False)
    figure.subplots_adjust(left=0.85 / (width + 0.9), right=0.995, top=0.855, bottom=0.055, wspace=0.08, hspace=0.24)
    views = (("Normal", "clean", CLEAN), ("Adv", "adversarial", ADVERSARIAL), (cell["defense"], "restored", RESTORED))
    for line, (label, key, view) in zip(grid, views):
        label = _wrapped(label)
        size = 12 * min(1.0, 7 / max(map(len, label.split("\n"))))  # the margin holds seven letters
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=size, labelpad=8)
        for i, axes in enumerate(line):
            _show(axes, tensors[key][i])
            predicted, true = int(tensors["prediction"][i, view]), int(tensors["label"][i])
            sign, color = ("✓", RIGHT) if predicted == true else ("✗", WRONG)
            axes.set_xlabel(f"{_class(cell, predicted)} {sign}", color=color, fontsize=10.5, labelpad=3)
    _title(figure, cell, "Under each image, the class predicted: ✓ right, ✗ wrong.")
    return figure


def confidence_figure(cell: Mapping[str, Any], tensors: Mapping[str, Any], examples: int = 3) -> Figure:
    """Clean -> adversarial -> restored, with the confidence in the true label under each image.

    Shown are the first `examples` sampled images that are right when clean and wrong in the model that was attacked
    (bare for an oblivious attacker, whether or not the defense then saves them; protected for one who knows of it), or
    the first of all where there are none. cell, tensors: one entry of
    `unperturb.runs.read_samples`. Source: the paper, Fig. 1.
    """
    from matplotlib.figure import Figure

    label, predicted = tensors["label"].numpy(), tensors["prediction"].numpy()
    attacked = ADVERSARIAL if cell["knowledge"] in ("none", "transfer", "oblivious") else RESTORED
    turned = (predicted[:, CLEAN] == label) & (predicted[:, attacked] != label)
    chosen = [int(i) for i in (turned.nonzero()[0] if turned.any() else range(len(label)))][:examples]
    height = 2.25 * len(chosen) + 1.0
    figure = Figure(figsize=(6.6, height), dpi=DPI)
    grid = figure.subplots(len(chosen), 3, squeeze=False)
    figure.subplots_adjust(left=0.03, right=0.97, top=1 - 1.0 / height, bottom=0.6 / height, wspace=0.5, hspace=0.45)
    views = (("clean", "clean", CLEAN), ("adversarial", "adversarial", ADVERSARIAL), ("restored", "restored", RESTORED))
    for axes, (title, _, _) in zip(grid[0], views):
        axes.set_title(title, fontsize=12)
    for line, i in zip(grid, chosen):
        for axes, (_, key, view) in zip(line, views):
            _show(axes, tensors[key][i])
            sure = float(tensors["confidence"][i, view])
            right = predicted[i, view] == label[i]
            taken = "✓" if right else f"✗ {_class(cell, int(predicted[i, view]))}"
            text = f"{_class(cell, int(label[i]))}: {100 * sure:.1f} %\n{taken}"
            axes.set_xlabel(text, color=RIGHT if right else WRONG, fontsize=11.5, labelpad=4, linespacing=1.35)
        for axes in line[:2]:
            place = {"xycoords": "axes fraction", "arrowprops": {"arrowstyle": "-|>", "color": "#444444", "lw": 1.6}}
            axes.annotate("", xy=(1.42, 0.5), xytext=(1.08, 0.5), annotation_clip=False, **place)
    _title(figure, cell, "Under each image, the confidence in its true class; ✗: what it is taken for instead.")
    return figure


def accuracy_figure(rows: pd.DataFrame) -> Figure:
    """Accuracy with its 95 % Wilson interval: a panel per classifier and defense, in it a group per attack and
    the worst case, in that a bar for undefended, oblivious and white box.

    rows: as `unperturb.runs.read_rows` gives them; of one data set, or the panels get small.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    accuracy = accuracy_table(rows)
    worst = worst_case(rows).assign(attack="worst case")
    # Where there is no budget there is no one worst case to draw.
    accuracy = pd.concat([accuracy, worst[worst["eps"].notna() & (worst["knowledge"] != "all")]], ignore_index=True)
    accuracy = accuracy[accuracy["knowledge"].isin(["", "oblivious", "white_box"])]  # those that have a bar
    accuracy = accuracy.assign(name=[attack_name(a, eps) for a, eps in zip(accuracy["attack"], accuracy["eps"])])
    blocks = list(groups(accuracy, BLOCK))
    defenses = [d for d in accuracy["defense"].unique() if d != "none"] or ["none"]
    panels = [(key, block, defense) for key, block in blocks for defense in defenses]
    width = max(4.3, 0.88 * max(block["name"].nunique() for _, block in blocks))
    across = min(len(defenses) if len(defenses) > 1 else min(2, len(blocks)), max(1, int(WIDEST / width)))
    down = -(-len(panels) // across)
    total = 3.1 * down + 0.9
    figure = Figure(figsize=(width * across + 0.3, total), dpi=DPI)
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes, ((dataset, split, classifier), block, defense) in zip(grid, panels):
        _bars(axes, block, defense)
        what = "undefended" if defense == "none" else defense
        axes.set_title(f"{dataset} ({split}), {classifier}\n{what}", fontsize=11.5, loc="left")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("accuracy, %", fontsize=11)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", ncols=3, frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / total), h_pad=1.2, w_pad=1.5)
    return figure


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
    axes.set_xticks(list(places.values()), labels, fontsize=10)
    axes.set_ylim(0, 104)
    axes.set_yticks(range(0, 101, 25))
    axes.tick_params(axis="y", labelsize=10)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _show(axes: Any, image: Any) -> None:
    """One uint8 `(C, H, W)` image, framed, without ticks."""
    pixels = image.numpy().transpose(1, 2, 0)
    gray = pixels.shape[2] == 1
    axes.imshow(pixels[:, :, 0] if gray else pixels, cmap="gray" if gray else None, vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#bbbbbb")


def _title(figure: Figure, cell: Mapping[str, Any], reading: str) -> None:
    height = figure.get_figheight()
    text = (
        f"{cell['defense']} before {cell['classifier']} on {cell['dataset']}: "
        f"{attack_name(cell['attack'], cell['eps'])}, {attacker_name(cell['knowledge'])}"
    )
    size = min(12.5, 72 * figure.get_figwidth() / (0.7 * len(text)))  # long names still fit the width
    figure.text(0.015, 1 - 0.08 / height, text, ha="left", va="top", fontsize=size, fontweight="bold")
    figure.text(0.015, 1 - 0.34 / height, reading, ha="left", va="top", fontsize=10.5, color="#333333")


def _class(cell: Mapping[str, Any], number: int) -> str:
    names = cell.get("class_names") or []
    name = str(names[number]) if number < len(names) else str(number)
    return name if len(name) <= 12 else f"{name[:11]}…"


def _wrapped(text: str) -> str:
    """Words and joined parts on lines of their own where a label would be wide."""
    return text if len(text) <= 10 else text.replace(" ", "\n").replace("-", "-\n", 1).replace("_", "_\n")
