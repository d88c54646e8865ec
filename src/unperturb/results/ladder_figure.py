"""How accuracy falls: step by step as an attacker knows more, and as its budget grows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from unperturb.results.figures import (
    BARE,
    DPI,
    attacker_title,
    block_name,
    clean_of,
    fitting,
    interval,
    looks,
    own_sizes,
    percent_axis,
    spread_out,
    text_width,
    wrapped,
)
from unperturb.results.names import CLEAN, attacker_name, budget_name, in_figure, norm_name
from unperturb.results.results import Block, Results
from unperturb.results.robust import TOLERANCE, Judged
from unperturb.threat_models import KNOWLEDGE, ThreatModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NARROW = 6.0  # inches; what is less wide is for the screen of a telephone
FINE = 60  # steps that an axis of budgets is divided into


class Step(NamedTuple):
    """What is left at one step of the ladder, in [0, 1]. knowledge: a key of `KNOWLEDGE`, or "clean". tried: whether
    anything of this very knowledge was; where not, nothing falls here."""

    knowledge: str
    tried: bool
    accuracy: float
    low: float
    high: float


def ladder(judged: Judged, norm: Any, eps: float) -> list[Step]:
    """Robust accuracy step by step: when clean, then under the attacks of each kind of knowledge and of all kinds
    before it, in the order of `KNOWLEDGE`, so that the last step is under everything; empty where no image counts.

    An attack that a cascade made only on what stronger attackers had left counts from their step on.
    """
    start = clean_of(judged)
    if start is None:
        return []
    steps = [Step(CLEAN, True, *start)]
    for i, knowledge in enumerate(KNOWLEDGE):
        kinds, before = judged.cells["knowledge"], list(KNOWLEDGE)[: i + 1]
        so_far = judged.among(before)
        left = so_far.any() and interval(judged.only(so_far).under(ThreatModel(norm, eps)))
        steps.append(Step(knowledge, bool((so_far & (kinds == knowledge)).any()), *(left or start)))
    return steps


def eps_curve(judged: Judged, norm: Any, knowledge: str, budgets: Sequence[float]) -> list[float]:
    """Robust accuracy under attackers of at most this knowledge at each of `budgets`; clean accuracy where nothing came
    so near."""
    import numpy as np

    admitted = judged.among(KNOWLEDGE[knowledge].includes)
    # How near the nearest image lies that turns it: what `Judged.under` asks at one budget, for all at once.
    turned = np.where(judged.right[admitted], np.inf, np.nan_to_num(judged.distances[norm][admitted], nan=0.0))
    nearest = np.where(judged.clean, turned.min(axis=0, initial=np.inf), -np.inf)
    return [float((nearest > eps + TOLERANCE[norm]).mean(axis=0).mean()) for eps in budgets]


def every_block(results: Results) -> dict[Block, list[Judged]]:
    """Each block's systems."""
    return {block: [Judged.of(results, block, system) for system in results.systems[block]] for block in results.blocks}


@in_figure
def ladder_figure(results: Results, eps: float | str | None = None, *, norm: Any = None, width: float = 9.6) -> Figure:
    """Accuracy falling step by step as the attacker knows more (`ladder`): a panel per block, a line per system, its
    name and what is left at its end; thin bars are 95 % Wilson intervals. A mark stands where that kind of knowledge
    was tried on the system. Blocks of which one has the first so many images of another's order share a panel; what
    was judged on fewer says so.

    eps, norm: the budget; by default that of most cells of the block. width: inches; below 6 for a narrow screen.
    """
    threat = None if eps is None else ThreatModel(norm or "linf", eps)
    results = results.readable(28)
    panels = []
    for block, systems in _side_by_side(every_block(results)).items():
        given = [b for b in results.budgets(block) if norm in (None, b[0])]
        budget = (threat.norm, float(threat.eps)) if threat else given[0] if given else (norm or "linf", 1.0)
        steps = {one.system: ladder(one, *budget) for one in systems}
        bare = [one.system for one in systems if not one.defended]
        panels.append((block, budget, {name: of for name, of in steps.items() if of}, bare, own_sizes(systems)))
    tall = 4.6 if width < NARROW or len(panels) > 1 else 5.2
    figure, sheets = _panels(len(panels), width, tall)
    for axes, (block, (kind, most), steps, bare, sizes) in zip(sheets, panels):
        title = f"{block_name(block)}, {norm_name(kind)} {budget_name(most)}"
        _titled(axes, title, "accuracy under all attacks up to this step, %")
        _ladder(axes, steps, bare, sizes)
    return figure


def _side_by_side(blocks: Mapping[Block, list[Judged]]) -> dict[Block, list[Judged]]:
    """`blocks` without those that have the first images of a larger one's fixed order, `test:100@0` of `test:1000@0`:
    their systems stand beside the larger one's, where it has not judged them itself."""
    order = {block: block._replace(split=re.sub(r":\d+@", "@", block.split)) for block in blocks}
    found: dict[Block, list[Judged]] = {}
    for block in sorted(blocks, key=lambda block: -max((len(one.index) for one in blocks[block]), default=0)):
        mine = found.setdefault(next((larger for larger in found if order[larger] == order[block]), block), [])
        mine += [one for one in blocks[block] if one.system not in {other.system for other in mine}]
    return {block: found[block] for block in blocks if block in found}


def _ladder(axes: Any, systems: dict[str, list[Step]], bare: Sequence[str], sizes: Mapping[str, str]) -> None:
    tried = [step.knowledge for steps in systems.values() for step in steps if step.tried]
    shown = [knowledge for knowledge in (CLEAN, *KNOWLEDGE) if knowledge in tried]
    dodge = min(0.07, 0.5 / max(len(systems), 1))
    aside = dodge * (len(systems) - 1) / 2
    ends = []
    for number, (name, style) in enumerate(looks(list(systems), bare).items()):
        steps = [step for step in systems[name] if step.knowledge in shown]
        at = [i - aside + dodge * number for i in range(len(steps))]
        value = [100 * step.accuracy for step in steps]
        last = max((i for i, step in enumerate(steps) if step.tried), default=0)
        direct = name in bare and any(step.tried and step.knowledge == "oblivious" for step in steps)
        known = len(steps) if direct else last + 1  # who attacks it directly knows all there is to know
        axes.plot(at[:known], value[:known], color=style["color"], linestyle=style["linestyle"], lw=1.6, zorder=3)
        axes.plot(at[known - 1 :], value[known - 1 :], color=style["color"], linestyle=":", lw=1, zorder=3)
        for x, y, step in zip(at, value, steps):
            if step.tried:
                axes.plot([x, x], [100 * step.low, 100 * step.high], color=style["color"], lw=1, alpha=0.55, zorder=2)
                _mark(axes, x, y, style)
        only = f" ({attacker_name(steps[last].knowledge)} only)" if known < len(steps) else ""
        left = ", ".join(filter(None, (f"{value[-1]:.1f}", sizes[name])))
        ends.append((name, left + only, value[-1], style["color"]))
    _label_ends(axes, ends, -0.15 - aside, len(shown) - 1 + aside)
    heads = [attacker_title(k, defended=set(systems) != set(bare)) for k in shown]
    if any(text_width(head, 10.5) > _inches(axes) - 0.08 for head in heads):
        axes.set_xticks(range(len(shown)), heads, fontsize=9.5, rotation=40, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(shown)), heads, fontsize=10.5)
    axes.tick_params(axis="x", length=0)


def eps_places(tried: Sequence[float], end: float, norm: str) -> list[float]:
    """Where a curve is drawn: in even steps from 0 to `end`, at each budget that was tried, and just below it, so that
    what falls there falls upright."""
    below = [max(eps - 3 * TOLERANCE[norm], 0.0) for eps in tried]
    return sorted({eps for eps in (*tried, *below) if eps <= end} | {end * i / FINE for i in range(FINE + 1)})


@in_figure
def eps_figure(results: Results, *, norm: Any = None, width: float = 9.6, most: float | None = None) -> Figure:
    """Robust accuracy against eps: a panel per system (what is undefended, dashed, in each of its block), a line per
    kind of knowledge, at each eps by the distances of the images' own rows.

    An attack of fixed budget shows at that budget alone, where a mark stands; between marks the line is what attacks
    without a budget found, dotted, an upper bound, where none was tried. norm: by default that of most cells. width:
    inches; below 6 for a narrow screen. most: where the axis ends; by default a little above the largest budget.
    """
    results = results.readable(28)
    panels: list[tuple[tuple[str, str], Callable[[Any], None]]] = []
    for block, systems in every_block(results).items():
        given = results.budgets(block)
        kind = norm or (given[0][0] if given else "linf")
        tried = sorted(eps for n, eps in given if n == kind)
        end = most or (1.15 * tried[-1] if tried else _farthest([one for one in systems if len(one.index)], kind))
        places = eps_places(tried, end, kind)
        bare = [one for one in systems if not one.defended and len(one.index)]
        for one in [one for one in systems if one.defended and len(one.index)] or bare:
            title = f"{one.system}, {norm_name(kind)}", f"robust accuracy, %, {block_name(block)}"
            lines = _lines(one, bare if one.defended else [], kind, places)
            panels.append((title, lambda axes, lines=lines, end=end: _curves(axes, lines, end)))  # type: ignore[misc]
    figure, sheets = _panels(len(panels), width, 4.2 if width >= NARROW else 4.0)
    for axes, (title, draw) in zip(sheets, panels):
        _titled(axes, *title)
        draw(axes)
    return figure


class Curve(NamedTuple):
    """One line of accuracy, in [0, 1], against eps. marks: where an attack had just that budget. searched: whether an
    attacker of this very kind had an attack without a budget, which says something between the marks."""

    name: str
    eps: list[float]
    accuracy: list[float]
    marks: list[float]
    searched: bool
    style: dict[str, Any]


def _lines(one: Judged, bare: Sequence[Judged], norm: str, places: list[float]) -> list[Curve]:
    """The curve of each kind of knowledge that was tried on a system, and of the undefended; kinds that leave the same
    are one."""
    of_kind: dict[tuple[float, ...], list[str]] = {}
    for knowledge in KNOWLEDGE:
        if (one.cells["knowledge"] == knowledge).any():
            of_kind.setdefault(tuple(eps_curve(one, norm, knowledge, places)), []).append(knowledge)
    found = []
    look = looks(tuple(KNOWLEDGE))  # a kind has its color in every panel
    for accuracy, kinds in of_kind.items():
        style = look[kinds[-1]]
        name = ", ".join(attacker_title(kind, defended=one.defended) for kind in kinds)
        found.append(Curve(name, places, list(accuracy), _at(one, norm, kinds), _searches(one, kinds), style))
    for other in bare:
        style = looks([other.system], [other.system])[other.system]
        left = eps_curve(other, norm, "white_box", places)
        found.append(Curve(other.system, places, left, _at(other, norm), _searches(other), style))
    return found


def _at(judged: Judged, norm: str, kinds: Sequence[str] = tuple(KNOWLEDGE)) -> list[float]:
    """The budgets that attacks of these kinds of knowledge were given."""
    cells = judged.cells[(judged.cells["norm"] == norm) & judged.cells["knowledge"].isin(kinds)]
    return sorted({float(f"{eps:.7g}") for eps in cells["eps"].dropna()})


def _searches(judged: Judged, kinds: Sequence[str] = tuple(KNOWLEDGE)) -> bool:
    """Whether an attacker of one of these kinds of knowledge had an attack that minimizes the distance."""
    return bool((judged.cells["eps"].isna() & judged.cells["knowledge"].isin(kinds)).any())


def _curves(axes: Any, lines: Sequence[Curve], end: float) -> None:
    ends = []
    for curve in lines:
        color, dashes = curve.style["color"], curve.style["linestyle"] if curve.searched else (0, (1, 1.6))
        value = [100 * v for v in curve.accuracy]
        axes.plot(curve.eps, value, color=color, linestyle=dashes, lw=1.7, zorder=3)
        for eps in curve.marks:
            if eps <= end:
                _mark(axes, eps, value[curve.eps.index(eps)], curve.style)
        ends.append((curve.name, f"{value[-1]:.1f}", value[-1], color))
    _label_ends(axes, ends, 0.0, end)
    marks = sorted({eps for curve in lines for eps in curve.marks if eps <= end}) or [end / 2, end]
    ticks = [0.0]
    for eps in sorted(marks, reverse=True):  # the larger ones have the room
        if all(abs(eps - other) * _inches(axes) > 0.5 for other in ticks):
            ticks.append(eps)
    size = 9.5 if _narrow(axes) else 10.5
    axes.set_xticks(sorted(ticks), [budget_name(eps) for eps in sorted(ticks)], fontsize=size)
    axes.set_xlabel("eps", fontsize=size)
    axes.xaxis.set_label_coords(end / 2, -0.1, transform=axes.get_xaxis_transform())
    axes.tick_params(axis="x", length=3)


def _farthest(systems: Sequence[Judged], norm: str) -> float:
    """The distance within which nineteen of twenty images that an attack without a budget turned lie."""
    import numpy as np

    turned = np.concatenate([one.distances[norm][~one.right] for one in systems] or [np.zeros(0)])
    turned = turned[np.isfinite(turned) & (turned > 0)]
    return float(f"{np.quantile(turned, 0.95):.2g}") if len(turned) else 1.0


# Panels -------------------------------------------------------------------------------------------------------------


def _panels(count: int, width: float, tall: float) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels below one another, and their axes; each has room for names at its right, which
    `_label_ends` takes."""
    from matplotlib.figure import Figure

    narrow = width < NARROW
    figure = Figure(figsize=(width, tall * max(count, 1)), dpi=2 * DPI if narrow else DPI)
    total, low, left = tall * max(count, 1), 0.85 if narrow else 0.6, 0.45 if narrow else 0.6
    sheets = []
    for i in range(count):
        bottom = (total - tall * (i + 1) + low) / total
        sheets.append(figure.add_axes((left / width, bottom, 1 - (left + 0.05) / width, (tall - low - 0.75) / total)))
    return figure, sheets


def _narrow(axes: Any) -> bool:
    return axes.get_figure().get_figwidth() < NARROW


def _inches(axes: Any) -> float:
    """How many inches of the page a unit of the lower axis takes."""
    low, high = axes.get_xlim()
    return axes.get_position().width * axes.get_figure().get_figwidth() / (high - low)


def _titled(axes: Any, title: str, measure: str) -> None:
    """A title and, below it, what the axis measures: a line across reads better than one that stands on its end."""
    figure = axes.get_figure()
    width, total = figure.get_figwidth(), figure.get_figheight()
    size = (10.5, 9.5) if _narrow(axes) else (12.5, 10.5)
    top = axes.get_position().y1
    put = {"transform": figure.transFigure, "ha": "left", "va": "baseline"}
    sizes = [fitting(title, width - 0.3, size[0], "bold"), fitting(measure, width - 0.2, size[1])]
    figure.text(0.1 / width, top + 0.42 / total, title, fontsize=sizes[0], fontweight="bold", **put)
    figure.text(0.1 / width, top + 0.17 / total, measure, fontsize=sizes[1], color="#444444", **put)
    percent_axis(axes, size[1])


def _mark(axes: Any, x: float, y: float, style: Mapping[str, Any]) -> None:
    size = {"*": 9, "X": 7.5, "P": 7.5}.get(style["marker"], 6.5)
    axes.plot([x], [y], style["marker"], color=style["color"], ms=size, mec="white", mew=0.7, zorder=4, clip_on=False)


def _label_ends(axes: Any, ends: Sequence[tuple[str, str, float, str]], begin: float, end: float) -> None:
    """Each line's name at its end, none over another, with a thin line to where it belongs. ends: name, number, height,
    color of each. Lines run from `begin` to `end`; the axis goes on as far as the longest name needs."""
    figure = axes.get_figure()
    inches = axes.get_position().width * figure.get_figwidth()
    size, most = (9.5, 12) if _narrow(axes) else (10.5, 24)
    texts = [f"{wrapped(name, most)}{chr(10) if _narrow(axes) else '  '}{number}" for name, number, *_ in ends]
    widest = max((text_width(text, size) for text in texts), default=0.0)
    room = min(widest + 0.35, 0.45 * inches)
    axes.set_xlim(begin, begin + (end - begin) * inches / (inches - room))
    unit = 1 / _inches(axes)
    line = 1.25 * size / 72 * 104 / (axes.get_position().height * figure.get_figheight())
    heights = [line * (1.15 + text.count("\n")) for text in texts]
    tight = min(1.0, 104 / max(sum(heights), 1e-9))  # where they do not fit one above the other, they are smaller
    size, heights = tight * size, [tight * height for height in heights]
    for text, (_, _, y, color), at in zip(texts, ends, spread_out([y for _, _, y, _ in ends], heights, 0, 104)):
        left = end + 0.28 * unit
        axes.plot(
            [end + 0.08 * unit, left - 0.04 * unit], [y, at], color=color, lw=0.7, alpha=0.8, zorder=2, clip_on=False
        )
        small = fitting(text, room - 0.3, size)
        axes.text(left, at, text, fontsize=small, color=ink(color), va="center", ha="left", linespacing=1.15)
    # The grid ends where the lines do, not below the names.
    axes.grid(False)
    axes.hlines(range(25, 101, 25), begin, end, color="#dddddd", lw=0.8, zorder=0)
    axes.spines["bottom"].set_bounds(begin, end)


def ink(color: str) -> str:
    """A color dark enough for words: the lightest of the palette are hard to read on white."""
    return {"#56B4E9": "#1D7FB5", "#E69F00": "#9A6A00", "#CC79A7": "#A34A7C", BARE: "#666666"}.get(color, color)
