"""The picture of what a defense keeps against what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unperturb.report.comparison import WORST_OBLIVIOUS
from unperturb.report.escape import LONGEST, in_figure, one_line
from unperturb.report.figures import BARE, DPI, RIGHT, fitting
from unperturb.report.tables import UNDEFENDED, attack_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FREE_MS = 0.01  # what takes less is no purifier: the log axis begins with a place for these


@in_figure
def cost_figure(table: pd.DataFrame) -> Figure | None:
    """Worst oblivious accuracy with its 95 % Wilson interval against milliseconds an image; the larger a mark, the more
    its training cost (hollow: not known); blue and joined: the Pareto front, nothing cheaper is as good.

    table: one table of `comparison_table`. None where fewer than three defenses have both numbers.
    """
    from matplotlib.figure import Figure

    shown = table[table[f"{WORST_OBLIVIOUS} n"].fillna(0) > 0] if f"{WORST_OBLIVIOUS} n" in table else table[:0]
    if (shown["defense"] != UNDEFENDED).sum() < 3:
        return None
    value, low, high = (100 * shown[f"{WORST_OBLIVIOUS}{end}"].to_numpy(float) for end in ("", " low", " high"))
    cost, names = shown["ms"].to_numpy(float), [one_line(name, LONGEST) for name in shown["defense"]]
    at = [max(ms, FREE_MS / 2) for ms in cost]
    front = pareto([ms if ms > FREE_MS else 0.0 for ms in cost], value.tolist())
    figure = Figure(figsize=(9.6, 5.6), dpi=DPI)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlim(FREE_MS / 4, max(*at, 1.0) * 4)
    axes.set_ylim(-4, 106)
    steps = sorted((at[i], value[i]) for i in front)
    axes.plot(*zip(*steps, (axes.get_xlim()[1], steps[-1][1])), drawstyle="steps-post", color=RIGHT, lw=1.2, alpha=0.6)
    for i in range(len(names)):
        color = RIGHT if i in front else BARE
        spread = [[max(value[i] - low[i], 0)], [max(high[i] - value[i], 0)]]
        axes.errorbar(at[i], value[i], spread, fmt="none", ecolor=color, elinewidth=1.2, capsize=2.5, zorder=2)
        pflop = float(shown["pflop"].iloc[i])
        known = pflop == pflop
        axes.scatter(
            at[i], value[i], s=_area(pflop if known else 0.0), color=color if known else "white",
            edgecolors=color if not known else "white", linewidths=1.2, zorder=4 if i in front else 3,
        )  # fmt: skip
    for pflop in (0.0, 0.05, 0.5):
        axes.scatter([], [], s=_area(pflop), color=BARE, label=f"{pflop:g} PFLOP")
    axes.legend(
        title="training", loc="lower left", bbox_to_anchor=(1.0, 0.0), frameon=False, fontsize=10, title_fontsize=10
    )
    axes.axvline(FREE_MS, color="#dddddd", linewidth=0.8)
    axes.text(
        FREE_MS / 2, -0.022, "no purifier", transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=10
    )
    axes.xaxis.set_major_formatter(lambda ms, _: f"{ms:g}" if ms >= FREE_MS * 2 else "")
    axes.tick_params(axis="both", labelsize=10)
    axes.tick_params(axis="x", which="both", length=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("purifying one image, ms (log scale)", fontsize=11, labelpad=8)
    axes.set_ylabel("worst case per image, oblivious attackers, %", fontsize=11)
    first = shown.iloc[0]
    budget = attack_name("", first["eps"]).lstrip(", ")
    title = f"What a defense keeps, and what it costs: {first['dataset']} ({first['split']}), {first['classifier']}"
    title = one_line(f"{title}{', ' + budget if budget else ''}")
    axes.set_title(title, fontsize=fitting(title, 8.3, 11.5, "bold"), loc="left", fontweight="bold")
    figure.tight_layout()
    ends = [*(x for x, _ in steps[1:]), axes.get_xlim()[1]]
    line = [((x, y), (end, y)) for (x, y), end in zip(steps, ends)]
    colors = [RIGHT if i in front else "#444444" for i in range(len(names))]
    line += [((x, lower), (x, upper)) for x, lower, upper in zip(at, low, high)]
    _label(axes, list(zip(at, value.tolist())), names, colors, line)
    return figure


def pareto(costs: list[float], values: list[float]) -> list[int]:
    """The numbers of those that nothing beats: no other costs at most as much and is better, or costs less and is as
    good."""
    pairs = list(zip(costs, values))
    return [
        i
        for i, (cost, value) in enumerate(pairs)
        if not any((c <= cost and v > value) or (c < cost and v >= value) for c, v in pairs)
    ]


def _area(pflop: float) -> float:
    return 24 + 250 * pflop**0.5


def _label(axes: Any, at: list[tuple[float, float]], names: list[str], colors: list[str], line: list[Any]) -> None:
    """A name beside each mark, where it covers no mark, no other name and no part of `line`; a thin line where it had
    to move."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(axes.figure).get_renderer()  # type: ignore[no-untyped-call]
    points = [axes.transData.transform(p) for p in at]
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in points]
    for part in line:
        (x0, y0), (x1, y1) = axes.transData.transform(part)
        taken.append(Bbox.from_extents(x0 - 2, y0 - 2, x1 + 2, y1 + 2))
    if legend := axes.get_legend():
        taken.append(legend.get_window_extent(renderer))
    inside = axes.get_window_extent(renderer)
    distances = [(d * dx, d * dy) for d in (12, 24, 38, 54, 72, 92, 114, 140, 170) for dx, dy in _AROUND]
    for i in sorted(range(len(names)), key=lambda i: -at[i][1]):
        text = None
        for dx, dy in distances:
            if text is not None:
                text.remove()
            text = axes.annotate(
                names[i], at[i], (dx, dy), textcoords="offset points", fontsize=10, color=colors[i],
                ha="left" if dx > 0 else "right" if dx < 0 else "center", va="center",
                arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "lw": 0.7} if abs(dx) + abs(dy) > 20 else None,
            )  # fmt: skip
            box = _words(text, renderer)
            others = [b for j, b in enumerate(taken) if j != i]
            if (
                inside.contains(box.x0, box.y0)
                and inside.contains(box.x1, box.y1)
                and not any(box.overlaps(b) for b in others)
            ):
                break
        taken.append(_words(text, renderer))


_AROUND = ((1.0, 0.0), (-1.0, 0.0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7), (0.0, -1.0), (0.0, 1.0))


def _words(annotation: Any, renderer: Any) -> Any:
    """Where the words of an annotation stand, without the line to its mark."""
    from matplotlib.text import Text

    annotation.update_positions(renderer)
    return Text.get_window_extent(annotation, renderer)
