"""What the paper does not show: distributions of likeness, the noise itself, and how the trainings went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.paper.tables import Judged
from unperturb.results.figures import BARE, DPI, fitting, looks
from unperturb.results.names import attack_name, attack_rank, in_figure
from unperturb.results.results import groups

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SPREAD = {"psnr": ("PSNR, dB (what lies beyond is in the outer bars)", None), "ssim": ("SSIM", (0.0, 1.0))}
CURVES = 24  # panels of trainings that a figure has room for


@in_figure
def distributions_figure(judged: Judged) -> Figure:
    """How PSNR and SSIM are distributed over images: a line per oblivious attack, a column per measure; gray before
    purifying, a line per purifier after, all classifiers together. Images that are identical have no PSNR."""
    from matplotlib.figure import Figure

    rows = judged.results.rows.merge(judged.results.cells[["short"]], left_on="cell", right_index=True)
    rows = rows[(rows["knowledge"] == "oblivious") & rows["short"].isin(judged.labels) & rows["defended"]]
    attacks = sorted(groups(rows, ["short", "eps"]), key=lambda of: attack_rank(of[0][0]))
    figure = Figure(figsize=(9.6, 1.5 * len(attacks) + 1.1), dpi=DPI)
    grid = figure.subplots(len(attacks), len(SPREAD), squeeze=False)
    shown = set(rows["system"])
    styles = looks([system for system in dict.fromkeys(judged.results.cells["system"]) if system in shown])
    for place, (what, (name, ends)) in enumerate(SPREAD.items()):
        edges = _edges(rows, what, ends)
        for axes, ((attack, eps), part) in zip(grid[:, place], attacks):
            _spread(axes, part, what, edges, styles)
            if not place:
                title = attack_name(attack.removesuffix(f"-{eps:.3g}"), eps).replace(", ", "\n")
                axes.set_ylabel(title, fontsize=10.5, rotation=0, ha="right", va="center")
        grid[-1, place].set_xlabel(name, fontsize=11)
    figure.legend(handles=_legend(styles), loc="upper left", ncols=len(styles) + 1, frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / figure.get_figheight()), h_pad=0.5, w_pad=2)
    return figure


def _edges(rows: pd.DataFrame, what: str, ends: tuple[float, float] | None) -> Any:
    """Where the bars of a histogram begin and end: the same in every panel of a measure."""
    import numpy as np

    values = rows[[f"{what}_adv", f"{what}_pure_adv"]].to_numpy(np.float64).ravel()
    values = values[np.isfinite(values)]
    low, high = ends or (np.quantile(values, [0.002, 0.99]) if len(values) else (0.0, 1.0))
    return np.linspace(low, max(high, low + 1e-3), 46)


def _spread(axes: Any, part: pd.DataFrame, what: str, edges: Any, styles: Mapping[str, Mapping[str, Any]]) -> None:
    import numpy as np

    def share(values: Any) -> Any:
        """Of the images in each bar; what lies beyond is in the first or the last."""
        finite = values[np.isfinite(values)]
        return np.histogram(np.clip(finite, edges[0], edges[-1]), edges)[0] / max(len(finite), 1)

    one = part[part["system"] == part["system"].iloc[0]]  # before purifying all systems have the same images
    axes.stairs(share(one[f"{what}_adv"].to_numpy(np.float64)), edges, fill=True, color="#c8c8c8")
    for system, style in styles.items():
        after = part.loc[part["system"] == system, f"{what}_pure_adv"].to_numpy(np.float64)
        axes.stairs(share(after), edges, color=style["color"], lw=1.6)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=9.5)


def _legend(styles: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    after = [Line2D([], [], color=of["color"], lw=1.8, label=f"after {name}") for name, of in styles.items()]
    return [Patch(facecolor="#c8c8c8", label="adversarial, before"), *after]


# Trainings ----------------------------------------------------------------------------------------------------------


def training_logs(folders: Sequence[tuple[str, Path]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each training by its name; what kept no log, such as the zoo's, is left out."""
    found = {}
    for name, folder in folders:
        if (path := folder / "log.jsonl").exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
            if any("validation" not in record for record in records):
                found[name] = records
    return found


@in_figure
def curves_figure(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """How trainings went: a panel per training. Each loss term, over epochs, on a log axis; below it the accuracy on
    validation images, where it was looked at on the way."""
    from matplotlib.figure import Figure

    shown = list(logs.items())[:CURVES]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(4.8 * across, 3.9 * down), dpi=DPI)
    for axes, (name, log) in zip(list(figure.subplots(down, across, squeeze=False).flat), shown):
        _curves(axes, name, log)
    for axes in figure.axes[len(shown) : down * across]:
        axes.set_axis_off()
    figure.tight_layout(h_pad=1.5, w_pad=1.5)
    return figure


def _curves(axes: Any, name: str, log: Sequence[Mapping[str, Any]]) -> None:
    known = {"step", "epoch", "lr", "images_per_second", "gflops", "pflop", "seconds", "validation"}
    steps = [record for record in log if "validation" not in record]
    terms = [term for term in steps[0] if term not in known]
    epochs = [record["epoch"] for record in steps]
    for term, style in zip(terms, looks(terms).values()):
        values = [record.get(term, float("nan")) for record in steps]
        if any(value and value == value for value in values):
            axes.plot(epochs, values, color=style["color"], lw=1.5, label=term)
    axes.set_yscale("log")
    axes.set_title(name, loc="left", fontsize=fitting(name, 3.6, 11.5, "bold"), fontweight="bold")
    axes.set_xlabel("epoch", fontsize=9.5)
    axes.set_ylabel("loss (log scale)", fontsize=9.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    looked = [record for record in log if "validation" in record]
    if len(looked) > 1:
        per_step = epochs[-1] / max(steps[-1]["step"], 1)
        share = axes.twinx()
        scores = [100 * record["validation"]["score"] for record in looked]
        share.plot([r["step"] * per_step for r in looked], scores, color=BARE, lw=1.8, linestyle="--", marker="o", ms=4)
        share.set_ylim(0, 104)
        share.set_ylabel("validation, % (dashed)", fontsize=9.5, color="#666666")
        share.spines[["top"]].set_visible(False)
        share.tick_params(labelsize=9, colors="#666666")
    axes.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
