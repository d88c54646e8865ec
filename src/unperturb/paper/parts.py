"""The parts of the paper, as `parts.toml` declares them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

from unperturb.registry import unknown

TRAININGS = ("figure2", "curves")  # drawn from what was trained alone, or from nothing but the networks


@dataclass(frozen=True)
class Part:
    """A data set's part of the paper.

    protocol: the recipe of the evaluation behind Tables 1, 3 and 4, Figure 1 and the pictures. beside: those behind
    Table 2. figure: the pictures' number in the paper. shown: the attack, by its name in tables, that pictures are of.
    """

    name: str
    protocol: str
    beside: tuple[str, ...]
    figure: str
    shown: str
    about: str

    @property
    def pieces(self) -> dict[str, tuple[str, ...]]:
        """Every table and figure of the part with the evaluations that it is made from."""
        rows = (self.protocol,)
        tables = {"table1": rows, "table2": self.beside, "table3": rows, "table4": rows}
        figures = {"figure1": rows, "figure2": (), self.figure: rows}
        return tables | figures | {"distributions": rows, "eps": rows, "curves": (), "report": rows}


def parts() -> dict[str, Part]:
    """The parts by name."""
    text = (resources.files("unperturb") / "paper" / "parts.toml").read_text(encoding="utf-8")
    return {name: Part(name, **{**of, "beside": tuple(of["beside"])}) for name, of in tomllib.loads(text).items()}


def chosen(names: Iterable[str]) -> dict[str, tuple[Part, list[str]]]:
    """The pieces that `names` ask for, with their part, by its name; every piece of every part where there are none.

    A name is a part (`mnist`), a piece (`figure1`) of every part, or a piece of one part (`table1-mnist`). Raises
    `UnknownNameError`.
    """
    known = {(part.name, piece): part for part in parts().values() for piece in part.pieces}
    found: dict[str, tuple[Part, list[str]]] = {}
    asked = list(names) or list(parts())
    for name in asked:
        mine = [(part, piece) for part, piece in known if name in (part, piece, f"{piece}-{part}")]
        if not mine:
            every = [
                *parts(),
                *dict.fromkeys(piece for _, piece in known),
                *(f"{piece}-{part}" for part, piece in known),
            ]
            raise unknown("part of the paper", name, every)
        for part, piece in mine:
            pieces = found.setdefault(part, (known[part, piece], []))[1]
            pieces += [piece] if piece not in pieces else []
    return found
