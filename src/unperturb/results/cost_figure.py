"""The picture of what a system keeps against what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unperturb.results.figures import BARE, DPI, RIGHT, block_name, fitting, interval, own_sizes, percent_axis
from unperturb.results.names import budget_name, in_figure, norm_name
from unperturb.results.results import Block, Results
from unperturb.results.robust import Judged
from unperturb.threat_models import ThreatModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FREE_MS = 0.01  # what takes less is no purifier: the log axis begins with a place for these
ENOUGH = 3  # defended systems, that a picture is worth drawing of


@dataclass(frozen=True)
class Cost:
    """One system. ms: an image, of purifying. pflop: of training; NaN: not known. left: accuracy and the ends of its
    interval under everything that was tried, None where nothing that knows of the system was; oblivious: the same under
    oblivious attackers."""

    name: str
    ms: float
    pflop: float
    left: tuple[float, float, float] | None
    oblivious: tuple[float, float, float] | None
    size: str = ""  # its number of images, where others have another


def costs(results: Results, block: Block, norm: Any, eps: float) -> list[Cost]:
    """Each system of a block; those that were not tried at this budget are left out."""
    found = []
    systems = [Judged.of(results, block, name) for name in results.systems[block]]
    sizes = own_sizes(systems)
    for judged in systems:
        if judged.under(ThreatModel(norm, eps)) is None:
            continue
        left, oblivious = (interval(judged.left(norm, eps)[key]) for key in ("adaptive", "oblivious"))
        seconds = results.rows["seconds_purify"][results.rows["cell"].isin(judged.cells.index)].median()
        pflop = results.about(judged.system, block.dataset).get("pflop")
        known = float("nan") if pflop is None else float(pflop)
        found.append(Cost(judged.system, 1000 * float(seconds), known, left, oblivious, sizes[judged.system]))
    return found


@in_figure
def cost_figure(results: Results) -> Figure | None:
    """What is left of each system under everything that was tried, with its 95 % Wilson interval, against milliseconds
    an image: a panel per block, at the budget of most of its cells.

    A dash above a mark is what oblivious attackers leave: from there the system falls once it is known. The larger a
    mark, the more its training cost (hollow: not known); blue and joined: the Pareto front, nothing cheaper is as good.
    None where no block has three defended systems.
    """
    from matplotlib.figure import Figure

    results = results.readable()
    panels = []
    for block in results.blocks:
        for norm, eps in results.budgets(block)[:1]:
            shown = costs(results, block, norm, eps)
            bare = set(results.where(**block._asdict()).cells.query("~defended")["system"])
            if sum(one.name not in bare for one in shown) >= ENOUGH:
                panels.append((f"{block_name(block)}, {norm_name(norm)} {budget_name(eps)}", shown))
    if not panels:
        return None
    figure = Figure(figsize=(9.6, 5.4 * len(panels)), dpi=DPI)
    grid = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (title, shown) in zip(grid, panels):
        _frame(axes, title, shown)
    figure.tight_layout(h_pad=2)
    for axes, (_, shown) in zip(grid, panels):
        _draw(axes, shown)
    return figure


def _frame(axes: Any, title: str, shown: Sequence[Cost]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(FREE_MS / 4, max(*(one.ms for one in shown), 1.0) * 4)
    for pflop in (0.0, 0.05, 0.5):
        axes.scatter([], [], s=_area(pflop), color=BARE, label=f"{pflop:g} PFLOP")
    axes.plot([], [], "_", color=BARE, ms=11, mew=2, label="left by oblivious\nattackers")
    axes.legend(
        title="training", loc="lower left", bbox_to_anchor=(1.0, 0.0), frameon=False, fontsize=10, title_fontsize=10
    )
    axes.axvline(FREE_MS, color="#dddddd", linewidth=0.8)
    axes.text(
        FREE_MS / 2, -0.022, "no purifier", transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=10
    )
    axes.xaxis.set_major_formatter(lambda ms, _: f"{ms:g}" if ms >= FREE_MS * 2 else "")
    axes.tick_params(axis="x", which="both", length=0, labelsize=10)
    percent_axis(axes)
    axes.set_ylim(-4, 106)
    axes.set_xlabel("purifying one image, ms (log scale)", fontsize=11, labelpad=8)
    axes.set_ylabel("robust accuracy, every attacker tried, %", fontsize=11)
    axes.set_title(title, fontsize=fitting(title, 8.3, 11.5, "bold"), loc="left", fontweight="bold")


def _draw(axes: Any, shown: Sequence[Cost]) -> None:
    at = [one.ms if one.ms > FREE_MS else FREE_MS / 2 for one in shown]
    known = [(i, one.left) for i, one in enumerate(shown) if one.left is not None]
    best = pareto([shown[i].ms if shown[i].ms > FREE_MS else 0.0 for i, _ in known], [left[0] for _, left in known])
    front = {known[k][0] for k in best}
    lines: list[Any] = []  # what no name may cover
    marks = []
    for i, one in enumerate(shown):
        color = RIGHT if i in front else BARE
        if one.oblivious is not None:
            top = 100 * one.oblivious[0]
            foot = 100 * one.left[0] if one.left else top
            axes.plot([at[i], at[i]], [foot, top], color=color, lw=1, linestyle=":", zorder=1)
            axes.plot([at[i]], [top], "_", color=color, ms=11, mew=2, zorder=3)
            lines.append(((at[i], foot), (at[i], top)))
        if one.left is None:
            marks.append((at[i], 100 * one.oblivious[0] if one.oblivious else 0.0))
            continue
        value, low, high = (100 * v for v in one.left)
        marks.append((at[i], value))
        lines.append(((at[i], low), (at[i], high)))
        axes.plot([at[i], at[i]], [low, high], color=color, lw=1.6, zorder=2)
        hollow = one.pflop != one.pflop
        axes.scatter(
            at[i], value, s=_area(0.0 if hollow else one.pflop), color="white" if hollow else color,
            edgecolors=color if hollow else "white", linewidths=1.2, zorder=5 if i in front else 4,
        )  # fmt: skip
    steps = sorted((at[i], marks[i][1]) for i in front)
    ends = [*(x for x, _ in steps[1:]), axes.get_xlim()[1]]
    for (x, y), end in zip(steps, ends):
        lines.append(((x, y), (end, y)))
    if steps:
        path = [*steps, (axes.get_xlim()[1], steps[-1][1])]
        axes.plot(*zip(*path), drawstyle="steps-post", color=RIGHT, lw=1.2, alpha=0.6)
    only = ["" if one.left is not None else " (oblivious attackers only)" for one in shown]
    names = [", ".join(filter(None, (one.name, one.size))) + who for one, who in zip(shown, only)]
    _label(axes, marks, names, [RIGHT if i in front else "#444444" for i in range(len(shown))], lines)


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
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


def _label(axes: Any, at: Sequence[tuple[float, float]], names: list[str], colors: list[str], lines: list[Any]) -> None:
    """A name beside each mark, where it covers no mark, no other name and no part of `lines`; a thin line where it had
    to move."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(axes.figure).get_renderer()  # type: ignore[no-untyped-call]
    points = [axes.transData.transform(p) for p in at]
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in points]
    for part in lines:
        (x0, y0), (x1, y1) = axes.transData.transform(part)
        taken.append(Bbox.from_extents(x0 - 2, y0 - 2, x1 + 2, y1 + 2))
    if legend := axes.get_legend():
        taken.append(legend.get_window_extent(renderer))
    inside = axes.get_window_extent(renderer)
    line = {"arrowstyle": "-", "color": "#bbbbbb", "lw": 0.7}
    distances = [(d * dx, d * dy) for d in (12, 24, 38, 54, 72, 92, 114, 140, 170) for dx, dy in _AROUND]
    for i in sorted(range(len(names)), key=lambda i: -at[i][1]):
        text = None
        for dx, dy in distances:
            if text is not None:
                text.remove()
            text = axes.annotate(
                names[i], at[i], (dx, dy), textcoords="offset points", fontsize=10, color=colors[i],
                ha="left" if dx > 0 else "right" if dx < 0 else "center", va="center",
                arrowprops={**line, "relpos": (float(dx < 0) if dx else 0.5, 0.5)} if abs(dx) + abs(dy) > 20 else None,
            )  # fmt: skip
            box = words(text, renderer)
            others = [b for j, b in enumerate(taken) if j != i]
            if (
                inside.contains(box.x0, box.y0)
                and inside.contains(box.x1, box.y1)
                and not any(box.overlaps(b) for b in others)
                and not any(b.contains(x, y) for x, y in _way(points[i], box, dx) for b in others[: len(points) - 1])
            ):
                break
        taken.append(words(text, renderer))


def _way(point: Any, box: Any, aside: float) -> list[tuple[float, float]]:
    """Points on the thin line from a mark to its name: where another mark lies on it, that would seem to own the name.
    Those that touch the mark itself are left out: its neighbors may lie over it."""
    x, y = box.x0 if aside > 0 else box.x1 if aside < 0 else (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    return [(point[0] + (x - point[0]) * k / 12, point[1] + (y - point[1]) * k / 12) for k in range(4, 13)]


_AROUND = ((1.0, 0.0), (-1.0, 0.0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7), (0.0, -1.0), (0.0, 1.0))


def words(annotation: Any, renderer: Any) -> Any:
    """Where the words of an annotation stand, without the line to its mark."""
    from matplotlib.text import Text

    annotation.update_positions(renderer)
    return Text.get_window_extent(annotation, renderer)
