"""The pictures of docs/concepts.md, one for each kind of knowledge and one of their order: python docs/concepts/draw.py

The kinds, their titles and their order are those of `unperturb.threat_models`.
"""

from __future__ import annotations

import itertools
from html import escape
from pathlib import Path

from unperturb.threat_models import KNOWLEDGE

HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT = 480, 244
INK, KNOWN, UNKNOWN, BACK = "#1b2a33", "#d3ecf5", "#ffffff", "#c2410c"
PURIFIER, CLASSIFIER, ANSWER = 96, 236, 376  # where a row's boxes begin
MADE, SHOWN = 76, 190  # where the two rows begin: what the attack is made on, what it is shown to

# By kind: the boxes that the attack is made on, how what comes back is called and where it leads around, and which
# boxes of the deployed system the attacker has.
OF_A_KIND: dict[str, tuple[dict[int, str], str, str, set[int]]] = {
    "none": ({}, "", "", set()),
    "transfer": ({CLASSIFIER: "another classifier"}, "gradient, exact", "through", set()),
    "oblivious": ({CLASSIFIER: "classifier"}, "gradient, exact", "through", {CLASSIFIER}),
    "gray_box": ({PURIFIER: "his own purifier", CLASSIFIER: "classifier"}, "gradient, exact", "through", {CLASSIFIER}),
    "black_box": ({PURIFIER: "purifier", CLASSIFIER: "classifier"}, "answers alone", "around", set()),
    "bpda": (
        {PURIFIER: "purifier", CLASSIFIER: "classifier"},
        "gradient, in part a surrogate's",
        "surrogate",
        {PURIFIER, CLASSIFIER},
    ),
    "white_box": (
        {PURIFIER: "purifier", CLASSIFIER: "classifier"},
        "gradient, exact",
        "through",
        {PURIFIER, CLASSIFIER},
    ),
}


def text(x: float, y: float, words: str, *, size: int = 13, color: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, words: str, *, width: int = 112, known: bool = True) -> str:
    """A box of height 38; what the attacker has not is white and dashed."""
    dashes = "" if known else ' stroke-dasharray="5 4"'
    fill = KNOWN if known else UNKNOWN
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="38" rx="6" fill="{fill}" stroke="{INK}"{dashes}/>'
    return shape + text(x + width / 2, y + 24, words, anchor="middle")


def arrow(points: str, *, back: bool = False) -> str:
    color, head = (BACK, "back") if back else (INK, "on")
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6" marker-end="url(#{head})"/>'


def row(y: float, boxes: dict[int, str], known: set[int], image: str, answer: str) -> list[str]:
    """An image, the boxes that it passes, and the answer."""
    stops = [(16, 56), *((x, 112) for x in boxes), (ANSWER, 88)]
    parts = [box(16, y, image, width=56), box(ANSWER, y, answer, width=88)]
    parts += [box(x, y, words, known=x in known) for x, words in boxes.items()]
    for (x, width), (after, _) in itertools.pairwise(stops):
        parts.append(arrow(f"{x + width + 2},{y + 19} {after - 3},{y + 19}"))
    return parts


def coming_back(y: float, boxes: dict[int, str], words: str, way: str) -> list[str]:
    """What comes back to the attacker: along the boxes, through a surrogate beside the purifier, or around them."""
    low = y + 50
    parts = [arrow(f"{ANSWER + 44},{y + 40} {ANSWER + 44},{low} 44,{low} 44,{y + 42}", back=True)]
    if way != "around":  # where it goes through a box, the line touches it
        for x in boxes:
            solid = not (way == "surrogate" and x == PURIFIER)
            dashes = "" if solid else ' stroke-dasharray="3 3"'
            parts.append(
                f'<rect x="{x + 8}" y="{low - 7}" width="96" height="14" rx="7" fill="#fff" stroke="{BACK}"{dashes}/>'
            )
            name = "its gradient" if solid else "surrogate"
            parts.append(text(x + 56, low + 4, name, size=10, color=BACK, anchor="middle"))
    return [*parts, text(ANSWER + 88, low + 18, words, size=11, color=BACK, anchor="end")]


def panel(name: str) -> str:
    """One kind of knowledge: what the attack is made on, and the deployed system, as the attacker sees it."""
    kind, (boxes, words, way, known) = KNOWLEDGE[name], OF_A_KIND[name]
    parts = [text(16, 26, kind.title, size=17), text(16, 45, kind.meaning, size=12)]
    parts += [text(16, MADE - 8, "THE ATTACK", size=10), text(16, SHOWN - 8, "THE DEPLOYED SYSTEM", size=10)]
    if boxes:
        parts += row(MADE, boxes, set() if way == "around" else set(boxes), "x", "answer")
        parts += coming_back(MADE, boxes, words, way)
    else:
        parts += [box(16, MADE, "x", width=56), arrow(f"74,{MADE + 19} 233,{MADE + 19}")]
        parts.append(box(CLASSIFIER, MADE, "random noise"))
    parts.append(f'<line x1="16" y1="{SHOWN - 28}" x2="464" y2="{SHOWN - 28}" stroke="#c9d3d8"/>')
    parts += row(SHOWN, {PURIFIER: "purifier", CLASSIFIER: "classifier"}, known, "x_adv", "what counts")
    return picture(HEIGHT, parts, f"{kind.title}: {kind.meaning}")


def order() -> str:
    """The kinds from little knowledge to all; an arrow leads to who knows more and has all that this one has."""
    below = {name: set(kind.includes) - {name} for name, kind in KNOWLEDGE.items()}
    depth = {name: len(below[name]) for name in KNOWLEDGE}
    columns = [[name for name in KNOWLEDGE if depth[name] == d] for d in sorted(set(depth.values()))]
    at = {
        name: (10 + 125 * column, 75 + 54 * k - 27 * (len(names) - 1))
        for column, names in enumerate(columns)
        for k, name in enumerate(names)
    }
    parts = []
    for name, (x, y) in at.items():
        parts.append(box(x, y, KNOWLEDGE[name].title, width=84))
        # From the nearest below alone: what these include is included.
        for other in below[name] - {far for near in below[name] for far in below[near]}:
            from_x, from_y = at[other]
            parts.append(arrow(f"{from_x + 86},{from_y + 19} {x - 3},{y + 19}"))
    return picture(188, sorted(parts), "Who knows more: noise, then transfer and oblivious, up to white box")


def picture(height: int, parts: list[str], title: str) -> str:
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{color}"/></marker>'
        for name, color in (("on", INK), ("back", BACK))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img"><title>{escape(title)}</title><defs>{heads}</defs>\n'
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fbfcfd"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def pictures() -> dict[str, str]:
    """All pictures, SVG by file name."""
    return {"order.svg": order()} | {f"{name}.svg": panel(name) for name in KNOWLEDGE}


if __name__ == "__main__":
    for name, svg in pictures().items():
        (HERE / name).write_text(svg, encoding="utf-8")
