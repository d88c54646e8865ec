"""Results: rows and what lies beside them, ordered and judged once, for every table, figure and flag to start from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unperturb.results.names import LONGEST, NAMES, attack_name, attack_rank, readable
from unperturb.results.schema import CELL_KEYS, ROW_COLUMNS, read_rows
from unperturb.threat_models import KNOWLEDGE, Norm

if TYPE_CHECKING:
    import pandas as pd

Beside = Mapping[tuple[str, str], Mapping[str, Any]]  # by (data set, system)
Probes = Mapping[tuple[str, str, str], Mapping[str, Any]]  # by (data set, classifier, system)
BLOCK = ["dataset", "split", "classifier"]


class Block(NamedTuple):
    """Systems are compared within one block: on the same images, over the same base classifier."""

    dataset: str
    split: str
    classifier: str


class Results:
    """Rows, and what follows from them alone.

    rows: as `unperturb.results.schema.read_rows` gives them; of an image that one draw of a cell has twice, as where
    two runs share a system, the first counts. about, probes: what is known of systems besides, by (data set, system),
    probes by (data set, classifier, system); by default what `read_rows` has put beside the rows, in their `attrs`.

    Attributes: `rows`, with the number of each row's cell as `cell`; `runs`, the folders they came from; `names`, per
    column what a name was before `readable` changed it, by its name now.

    Raises `ValueError` where there are no rows, or a column is missing.
    """

    def __init__(self, rows: pd.DataFrame, *, about: Beside | None = None, probes: Probes | None = None) -> None:
        lacking = [column for column in ROW_COLUMNS if column not in rows]
        if lacking:
            raise ValueError(f"these are no rows: they have no column {lacking[0]!r}; `read_rows` gives some")
        if not len(rows):
            raise ValueError("there are no rows to make tables of; make some with `unperturb evaluate`")
        self.runs = tuple(Path(run) for run in rows.attrs.get("runs", ()))
        beside = {what: {tuple(key): of for *key, of in rows.attrs.get(what, ())} for what in ("systems", "probes")}
        self._about: dict[Any, Any] = dict(beside["systems"] if about is None else about)
        self._probes: dict[Any, Any] = dict(beside["probes"] if probes is None else probes)
        self.names: dict[str, dict[str, str]] = {}
        rows = rows.assign(cell=rows.groupby(CELL_KEYS, sort=False, dropna=False).ngroup())
        cells = rows.drop_duplicates("cell").set_index("cell")[CELL_KEYS]
        self._cells = _in_order(cells, {key: i for i, key in enumerate(self._about)})
        places = dict(zip(self._cells.index, range(len(cells))))
        rows["cell"] = rows["cell"].map(places)
        self._cells = self._cells.reset_index(drop=True)
        self.rows = rows.drop_duplicates(["cell", "index", "draw"], ignore_index=True)

    @classmethod
    def read(cls, *runs: str | Path) -> Results:
        """The results of one or more run folders; raises `RunError` where one holds no rows or damaged ones."""
        if not runs:
            raise ValueError("results are read from at least one run folder")
        return cls(read_rows(*runs))

    @classmethod
    def of(cls, source: Results | pd.DataFrame | str | Path | Iterable[str | Path]) -> Results:
        """Results from whatever holds some: results, rows, a run folder or several."""
        import pandas as pd

        if isinstance(source, Results):
            return source
        if isinstance(source, pd.DataFrame):
            return cls(source)
        return cls.read(*([source] if isinstance(source, str | Path) else source))

    @property
    def cells(self) -> pd.DataFrame:
        """One line per cell, in the order of reading, by the cell's number: `CELL_KEYS`, and how it is called: `short`
        (the attack, numbered where two records of a column share a name), `name` (with its budget), `rank` (the
        attack's place)."""
        return self._cells

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """One line per cell, draw and image.

        Columns: cell, draw, index; clean_right, right (the system on the image, on the adversarial image), right_8bit
        (on that image rounded to 8 bits; empty where that is not recorded); l0, l2, linf (how far the adversarial image
        is away); inherited, made_with (whether an earlier stage of a cascade made it, and what its attacker knew, ""
        for the cell's own); zero_gradients (the fraction of the attacker's gradients that were exactly zero; NaN where
        none was asked for, or that is not recorded).
        """
        import pandas as pd

        rows = self.rows
        asked = rows["gradients"].where((rows["gradients"] > 0) & (rows["zero_gradients"] >= 0))
        rounded = (rows["pred_pure_adv_8bit"] == rows["label"]).astype("boolean")
        frame = pd.DataFrame(
            {
                **{k: rows[k] for k in ("cell", "draw", "index")},
                "clean_right": rows["pred_pure_clean"] == rows["label"],
                "right": rows["pred_pure_adv"] == rows["label"],
                "right_8bit": rounded.mask(rows["pred_pure_adv_8bit"] == -2),
                **{k: rows[k] for k in ("l0", "l2", "linf")},
                "inherited": rows["made_by"] != "",
                "made_with": rows["made_with"],
                "zero_gradients": (rows["zero_gradients"] / asked).clip(0, 1),
            }
        )
        return frame.sort_values(["cell", "draw", "index"], kind="stable", ignore_index=True)

    @cached_property
    def blocks(self) -> list[Block]:
        """What systems are compared in, in the order of reading."""
        return [Block(*key) for key in self.cells[BLOCK].drop_duplicates().itertuples(index=False, name=None)]

    @cached_property
    def systems(self) -> dict[Block, list[str]]:
        """The names of each block's systems, what is undefended first, then as they were asked for."""
        return {
            block: list(part["system"].unique()) for block, part in zip(self.blocks, self.parts(BLOCK), strict=True)
        }

    def parts(self, by: list[str]) -> Iterator[pd.DataFrame]:
        """The parts of `cells` that are equal in the columns `by`, in the order of reading; NaN is equal to itself."""
        yield from (part for _, part in groups(self.cells, by))

    def budgets(self, block: Block) -> list[tuple[Norm, float]]:
        """The (norm, eps) that attacks of a block were given, that of most cells first, then the largest."""
        mine = self.cells[(self.cells[BLOCK] == list(block)).all(axis=1) & self.cells["eps"].notna()]
        counted = Counter(zip(mine["norm"], map(_as_given, mine["eps"])))
        return sorted(counted, key=lambda budget: (-counted[budget], *reading_order(budget)))

    def where(self, **values: Any) -> Results:
        """The results of the cells that have these values in these columns of `cells`; a collection means any of its
        values, NaN or None no budget. Raises `ValueError`, which lists the choices, where nothing is left."""
        kept = self.cells
        for column, value in values.items():
            if column not in CELL_KEYS:
                raise ValueError(f"cells have no {column!r}; they have {', '.join(CELL_KEYS)}")
            found = kept[column].astype(object)
            wanted = list(value) if isinstance(value, Collection) and not isinstance(value, str) else [value]
            mine = kept[_among(found, wanted)]
            if not len(mine):
                choices = ", ".join(map(str, found.drop_duplicates()))
                raise ValueError(f"no cell has {column} {', '.join(map(str, wanted))}; there are: {choices}")
            kept = mine
        return self._with(self.rows[self.rows["cell"].isin(kept.index)])

    def whole_splits(self) -> Results:
        """The results with the parts of one split that several runs looked at put together, under the split's name."""
        return self._with(self.rows.assign(split=[split.partition(":")[0] for split in self.rows["split"]]))

    def readable(self, longest: int = LONGEST) -> Results:
        """The results under names that people can read (`unperturb.results.names.readable`); `names` keeps the whole
        ones."""
        changed = readable({column: self.cells[column].unique() for column in NAMES}, longest)
        rows = self.rows.assign(**{k: self.rows[k].replace(of) for k, of in changed.items()})
        found = self._with(rows, changed)
        for column, of in changed.items():
            before = self.names.get(column, {})
            found.names[column] = before | {new: before.get(old, old) for old, new in of.items()}
        return found

    def renamed(self, column: str) -> dict[str, str]:
        """What `readable` has made of names of a column, such as "system", by what they were."""
        return {old: new for new, old in self.names.get(column, {}).items()}

    def about(self, system: str, dataset: str | None = None) -> Mapping[str, Any]:
        """What the run folders keep of a system (`unperturb.results.schema.read_systems`); empty where they keep
        nothing. dataset: needed where there are several. Raises `ValueError` without it there."""
        return self._about.get((self._dataset(dataset), system), {})

    def probe(self, system: str, dataset: str | None = None, classifier: str | None = None) -> Mapping[str, Any]:
        """What a short probe measured of a system; empty where it was not probed. dataset: as in `about`. classifier:
        before which it was (default: the first)."""
        wanted = self._dataset(dataset), classifier, system
        for key, numbers in self._probes.items():
            if all(known in ("", name) or name is None for known, name in zip(key, wanted)):
                return numbers
        return {}

    def _dataset(self, name: str | None) -> str:
        known = list(self.cells["dataset"].unique())
        if name is None and len(known) > 1:
            raise ValueError(f"a system may have been judged on several data sets; say which of {', '.join(known)}")
        return known[0] if name is None else name

    def _with(self, rows: pd.DataFrame, names: Mapping[str, Mapping[str, str]] | None = None) -> Results:
        """Other rows with what is known of the same systems, under the names that `names` gives them."""
        datasets, classifiers, systems = ((names or {}).get(k, {}) for k in ("dataset", "classifier", "system"))
        about = {(datasets.get(d, d), systems.get(s, s)): of for (d, s), of in self._about.items()}
        probes = {
            (datasets.get(d, d), classifiers.get(c, c), systems.get(s, s)): of for (d, c, s), of in self._probes.items()
        }
        found = Results(rows, about=about, probes=probes)
        found.runs, found.names = self.runs, dict(self.names)
        return found


def reading_order(budget: tuple[Norm, float]) -> tuple[bool, str, float]:
    """Where a (norm, eps) stands among others: Linf first, the largest of a norm first."""
    norm, eps = budget
    return norm != "linf", norm, -eps


def records(frame: pd.DataFrame) -> Iterator[tuple[Any, dict[str, Any]]]:
    """`(number, values by column)` of each line."""
    yield from zip(frame.index, ({str(k): v for k, v in line.items()} for line in frame.to_dict("records")))


def groups(frame: pd.DataFrame, by: list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """`(key, part)` of `frame`, in the order of its lines; NaN is a key too."""
    yield from frame.groupby(by, sort=False, dropna=False)


def key_of(line: Mapping[str, Any], columns: Iterable[str]) -> tuple[Any, ...]:
    """A line's values in `columns`, to look it up by: NaN, which is not equal to itself, is None."""
    return tuple(None if line[k] != line[k] else line[k] for k in columns)


def _as_given(eps: float) -> float:
    """A budget without what float32 has added to it: to seven digits."""
    return round(float(eps), 6 - math.floor(math.log10(eps))) if eps > 0 else 0.0


def _among(column: pd.Series[Any], values: list[Any]) -> pd.Series[Any]:
    """Where `column` is one of `values`: numbers as near as float32 has them, None and NaN no number."""
    import pandas as pd

    found = pd.Series(False, index=column.index)
    for value in values:
        if value is None or value != value:
            found |= column.isna()
        elif isinstance(value, float):
            found |= (column.astype(float) - value).abs() <= 1e-6 * max(1.0, abs(value))
        else:
            found |= column == value
    return found


def _in_order(cells: pd.DataFrame, asked: Mapping[tuple[str, str], int]) -> pd.DataFrame:
    """Cells in the order of reading, with `short`, `name` and `rank`; asked: the order of the systems by (data set,
    name)."""
    cells = cells.assign(
        rank=[attack_rank(attack) for attack in cells["attack"]],
        system_place=[asked.get(key, len(asked)) for key in zip(cells["dataset"], cells["system"])],
    )
    places = {k: {v: i for i, v in enumerate(dict.fromkeys(cells[k]))} for k in [*BLOCK, "system"]}
    places["knowledge"] = {v: i for i, v in enumerate(KNOWLEDGE)}

    def place(column: pd.Series[Any]) -> Any:
        return column.map(places[str(column.name)]) if column.name in places else column

    by = [*BLOCK, "defended", "system_place", "system", "knowledge", "rank", "attack", "norm", "eps", "attack_repr"]
    cells = cells.sort_values([*by, "surrogate", "seed"], key=place, kind="stable")
    # One name for two records in the same column would hide one of them: number them.
    column = [*BLOCK, "system", "knowledge", "attack", "norm", "eps"]
    numbers = cells.groupby(column, dropna=False, sort=False).cumcount()
    again = [f" #{i + 1}" if i else "" for i in numbers]
    cells["short"] = [f"{attack}{i}" for attack, i in zip(cells["attack"], again)]
    cells["name"] = [attack_name(attack, eps) + i for attack, eps, i in zip(cells["attack"], cells["eps"], again)]
    return cells.drop(columns="system_place")
