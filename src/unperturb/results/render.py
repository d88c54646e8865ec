"""Results as people read them: the one place where numbers become text, and never the other way round."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb import screen
from unperturb.registry import unknown
from unperturb.results import tables
from unperturb.results.comparison import COST, COSTS, NUMBERS, PAPER, ROBUST, comparison_table, paired_table
from unperturb.results.flags import Flag, flags_of
from unperturb.results.names import CLEAN, attack_name, attacker_name, budget_name, norm_name, one_line, split_name
from unperturb.results.results import BLOCK, Results, groups, key_of, reading_order, records
from unperturb.results.robust import Judged, RobustAccuracy, every_system
from unperturb.results.sheet import STYLES, Sheet
from unperturb.threat_models import KNOWLEDGE, ThreatModel

if TYPE_CHECKING:
    import pandas as pd

    Source = Results | pd.DataFrame | str | Path | Iterable[str | Path]

NAME = 24  # columns of a name, of the hundred that a terminal may have
READING = {
    "oblivious": "the attacker sees the undefended classifier only and knows nothing of the defense: the usual "
    "protocol, and the weakest attacker",
    "white box": "the attacker differentiates through purifier and classifier: only this column says what a defense is "
    "worth once it is known, and a stronger attack can only lower it",
    "robust": "right when clean and under every attack of at most this distance by an attacker who knows no more than "
    "its column's: white box includes all others",
    "PSNR, SSIM": "of the adversarial image before and after the purifier, and of a clean image after it",
}


# Whole answers ------------------------------------------------------------------------------------------------------


def table(source: Source, width: int | None = None, *, style: str = "text", flags: Iterable[Flag] | None = None) -> str:
    """Accuracy under each attack, robust accuracy and image quality, side by side.

    source: results, rows or run folders. width: columns of the terminal (default: this one's); systems that do not fit
    side by side continue below. style: "text", "markdown", "html" or "latex". flags: the doubts to say below, by
    default all that `flags_of` raises.

    Raises `UnknownNameError` for another style.
    """
    results = Results.of(source).readable(NAME)
    sheets = [*accuracy_sheets(results), *quality_sheets(results)]
    doubts = flags_of(results) if flags is None else flags
    return _written(_by_title(sheets), style, width, doubts, READING if style == "text" else {})


def compare(
    source: Source, width: int | None = None, *, style: str = "text", flags: Iterable[Flag] | None = None
) -> str:
    """Systems side by side, a line each, with robust accuracies and costs (`comparison_table`). Arguments as in
    `table`; columns that do not fit continue below."""
    results = Results.of(source).readable(NAME)
    doubts = flags_of(results) if flags is None else flags
    return _written(comparison_sheets(comparison_table(results)), style, width, doubts)


def compare_pair(a: Source, b: Source, width: int | None = None, *, style: str = "text") -> str:
    """Two systems, or the systems of two runs, on the same images, with McNemar's test (`paired_table`), and below them
    the doubts about those that are compared. width, style: as in `table`."""
    one, other = (Results.of(source).readable(NAME) for source in (a, b))
    paired = paired_table(one, other)
    return _written(paired_sheets(paired), style, width, _of_the_pair(paired, one, other))


def _of_the_pair(paired: pd.DataFrame, one: Results, other: Results) -> list[Flag]:
    """The flags of the systems that are compared, under the names that they have there."""
    columns = ["dataset", "system_a", "system_b"]
    found = list[Flag]()
    for dataset, a, b in paired[columns].drop_duplicates().itertuples(index=False, name=None):
        for results, system, name in zip((one, other), (a, b), _apart(a, b)):
            mine = (flag for flag in flags_of(results) if (flag.system, flag.dataset) == (system, dataset))
            found += [replace(flag, system=name) for flag in mine]
    return list({flag_text(flag): flag for flag in found}.values())


def _apart(a: str, b: str) -> tuple[str, str]:
    """What two systems are called beside one another."""
    return (a, b) if a != b else (f"first {a}", f"second {b}")


def _written(
    sheets: Iterable[Sheet],
    style: str,
    width: int | None,
    flags: Iterable[Flag] = (),
    reading: Mapping[str, str] | None = None,
) -> str:
    if style not in STYLES:
        raise unknown("style", style, STYLES)
    width = width or screen.width()
    parts = [STYLES[style](sheet, width) for sheet in sheets]
    if doubts := list(flags):
        parts.append(_flags(doubts, style, width))
    if reading:
        indent = " " * (max(map(len, reading)) + 2)
        said = (
            textwrap.fill(text, width, initial_indent=name.ljust(len(indent)), subsequent_indent=indent)
            for name, text in reading.items()
        )
        parts.append("".join(f"{line}\n" for line in said))
    return "\n".join(parts)


def flag_text(flag: Flag) -> str:
    """One flag as a sentence: `DOUBT 3 gradient masked, ours on digits: ...`."""
    return one_line(f"{flag.severity.upper()} {_called(flag)}: {flag.says}")


def _called(flag: Flag) -> str:
    where = f" on {flag.dataset}" if flag.dataset else ""
    return f"{flag.number} {flag.name.replace('_', ' ')}, {flag.system}{where}"


def _flags(flags: Sequence[Flag], style: str, width: int) -> str:
    """The flags below a table: wrapped to the terminal, else as a table of their own."""
    if style == "text":
        return "".join(textwrap.fill(flag_text(flag), width, subsequent_indent="      ") + "\n" for flag in flags)
    lines = [[flag.severity, _called(flag), flag.says] for flag in flags]
    return STYLES[style](Sheet("Flags", "", [""] * 3, ["severity", "flag", "what it says"], lines, names=2), width)


def _by_title(sheets: Sequence[Sheet]) -> list[Sheet]:
    """Sheets of one title together, in the order of their first."""
    titles = [sheet.title for sheet in sheets]
    return sorted(sheets, key=lambda sheet: titles.index(sheet.title))


# Numbers ------------------------------------------------------------------------------------------------------------


def percent(value: float, low: float | None = None, high: float | None = None, *, sign: str = " %") -> str:
    """An accuracy, and its interval where there is one: `97.1 % [96.0, 98.0]`; empty where it is no number."""
    if value != value:
        return ""
    ends = "" if low is None or high is None or low != low else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * value:.1f}{sign}{ends}"


def percent_of(line: Mapping[str, Any] | RobustAccuracy | None, *, sign: str = " %") -> str:
    """`accuracy`, `low` and `high` of a table's line or of a robust accuracy as text; empty where there is none."""
    if line is None:
        return ""
    values = line if isinstance(line, Mapping) else line.__dict__
    return percent(values["accuracy"], values["low"], values["high"], sign=sign) if values["n"] else ""


def counts(least: int, most: int) -> str:
    """A number of images, or the least and the most of several: `100-1,000`."""
    return "-".join(f"{n:,}" for n in sorted({least, most}))


def quality(line: Mapping[str, Any], what: str, when: str) -> str:
    """One entry of `quality_table`; images that are identical are counted, not averaged."""
    value = line[f"{what}_{when}"]
    if what == "ssim":
        return f"{value:.3f}" if value == value else "-"
    same = line[f"identical_{when}"]
    if value != value:
        return "identical" if same else "-"
    return f"{value:.1f}" + (f" ({same:,} identical)" if same else "")


def cost(name: str, value: Any) -> str:
    """One of `comparison_table`'s costs; empty where it is not known."""
    import pandas as pd

    if pd.isna(value):
        return ""
    forms = {"psnr": "{:.1f}", "ssim": "{:.3f}", "ms": "{:,.0f}" if value >= 99.5 else "{:.2g}"}
    return forms.get(name, "{:.2g}").format(value)


def gradient(differentiable: Any, random: Any) -> str:
    """How a white-box attacker has a system's gradient: `exact`, or by a `surrogate` where the purifier has none to
    give; `averaged` over draws; empty where that is not known."""
    import pandas as pd

    if pd.isna(differentiable):
        return ""
    return ("exact" if differentiable else "surrogate") + (", averaged" if not pd.isna(random) and random else "")


def budget_title(norm: str, eps: float) -> str:
    """A budget as titles and lines say it: `eps 0.3`, `L2 0.5`; empty where there is none."""
    if eps != eps:
        return ""
    return f"{'eps' if norm == 'linf' else norm_name(norm)} {budget_name(eps)}"


def block_title(block: Iterable[str]) -> str:
    """A block as titles say it: `resnet8 on mnist (1000 of test)`."""
    dataset, split, classifier = block
    return f"{classifier} on {dataset} ({split_name(split)})"


# Sheets -------------------------------------------------------------------------------------------------------------


def accuracy_sheets(results: Results) -> list[Sheet]:
    """A sheet per block: a line per attack, and side by side what each attacker leaves of each system; below, the
    robust accuracy at each budget by who knows no more than the column's attacker."""
    counted = tables.accuracy_table(results)
    judged = {(one.block, one.system): one for one in every_system(results)}
    sheets = []
    for block, cells, (_, mine) in zip(results.blocks, results.parts(BLOCK), groups(counted, BLOCK), strict=True):
        found = {key_of(line, ("system", "knowledge", "attack", "norm", "eps")): line for _, line in records(mine)}
        heads = list(dict.fromkeys(zip(cells["system"], cells["knowledge"], cells["defended"])))
        columns = [(system, knowledge) for system, knowledge, _ in heads]
        attacks = {
            key_of(cell, ("short", "norm", "eps")): cell["name"]
            for _, cell in records(cells.sort_values(["rank", "attack", "norm", "eps", "name"], kind="stable"))
        }
        sizes = mine.groupby(["system", "knowledge"])["n"].agg(["min", "max"])
        lines = [["images", *(counts(*sizes.loc[column]) for column in columns)]]
        lines += [[CLEAN, *(percent_of(found[system, "", CLEAN, "", None]) for system, _ in columns)]]
        lines += [
            [name, *(percent_of(found.get((*column, *attack))) for column in columns)]
            for attack, name in attacks.items()
        ]
        for norm, eps in sorted(results.budgets(block), key=reading_order):
            lines += _robust_lines([(judged[block, system], knowledge) for system, knowledge in columns], norm, eps)
        titles = [attacker_name(k) if defended or k != "oblivious" else "direct" for _, k, defended in heads]
        over = ["", *(system for system, _ in columns)]
        sheets.append(Sheet(block_title(block), "accuracy [95 % Wilson interval]", over, ["", *titles], lines))
    return sheets


def _robust_lines(columns: Iterable[tuple[Judged, str]], norm: Any, eps: float) -> list[list[str]]:
    """The robust accuracy of each (system, knowledge), and where one is random, what stands in every draw."""
    found = [judged.under(ThreatModel(norm, eps, knowledge)) for judged, knowledge in columns]
    name = f"robust, {budget_title(norm, eps)}"
    lines = [[name, *map(percent_of, found)]]
    if any(one and one.draws > 1 for one in found):
        every = (percent(one.worst, one.worst_low, one.worst_high) if one else "" for one in found)
        lines.append([f"{name}, every draw", *every])
    return lines


def robust_sheets(results: Results) -> list[Sheet]:
    """A sheet per block and budget: a line per system, its accuracy when clean and by who knows what side by side."""
    sheets = []
    for (*block, norm, eps), part in groups(tables.robust_table(results), [*BLOCK, "norm", "eps"]):
        kinds = [k for k in KNOWLEDGE if k in set(part["knowledge"])]
        lines = []
        for (system,), mine in groups(part, ["system"]):
            of = {line["knowledge"]: line for _, line in records(mine)}
            clean, n = (next(iter(of.values()))[k] for k in ("clean", "n"))
            lines.append([system, f"{n:,}", percent(clean), *(percent_of(of.get(k)) for k in kinds)])
        heads = ["system", "images", CLEAN, *map(attacker_name, kinds)]
        title = f"{block_title(block)}, {budget_title(norm, eps)}"
        over = ["", "", "", *["who knows no more than"] * len(kinds)]
        sheets.append(Sheet(title, "robust accuracy [95 % Wilson interval]", over, heads, lines))
    return sheets


def quality_sheets(results: Results) -> list[Sheet]:
    """A sheet per block: PSNR and SSIM of each defended system's cells."""
    sheets = []
    for block, part in groups(tables.quality_table(results), BLOCK):
        measured = [(what, when) for what in ("psnr", "ssim") for when in tables.WHENS]
        lines = [[*_cell(line), *(quality(line, *m) for m in measured)] for _, line in records(part)]
        over = ["", "", "", *["PSNR, dB"] * 3, *["SSIM"] * 3]
        heads = ["system", "attacker", "attack", *tables.WHENS * 2]
        sheets.append(Sheet(block_title(block), "against the clean images", over, heads, lines, names=3))
    return sheets


def detector_sheets(results: Results) -> list[Sheet]:
    """A sheet per block that has detectors: per cell what was rejected, accuracy in both ways of counting, and what
    each detector is worth."""
    own = tables.detector_table(results)
    sheets = []
    for block, part in groups(tables.rejection_table(results), BLOCK):
        names = [name for name in part.columns if f"{name}_low" in part.columns]
        lines = []
        for _, line in records(part):
            mine = own[[key_of(other, tables.CELL) == key_of(line, tables.CELL) for _, other in records(own)]]
            marks = [", ".join(f"{value:.3f}" for value in mine["auroc"])]
            marks += [", ".join(percent(value, sign="") for value in mine[k]) for k in ("tpr_1", "tpr_5")]
            shares = [percent(line[k], line[f"{k}_low"], line[f"{k}_high"]) for k in names]
            lines.append([*_cell(line), *shares, *marks])
        over = ["", "", "", "rejected", "rejected", *["right"] * 3, *["each detector"] * 3]
        heads = [
            "system",
            "attacker",
            "attack",
            CLEAN,
            "attacked",
            "clean, kept",
            "attacked, kept",
            "or rejected (MagNet)",
        ]
        marks = ["AUROC", "% found at 1 % false", "% found at 5 % false"]
        note = "detectors, of all images [95 % Wilson interval]"
        sheets.append(Sheet(block_title(block), note, over, [*heads, *marks], lines, names=3))
    return sheets


def comparison_sheets(compared: pd.DataFrame) -> list[Sheet]:
    """A sheet per block and budget of `comparison_table`: a line per system; entries are `97.1 [96.0, 98.0]` in
    percent, with their n where it is not the sheet's."""
    sheets = []
    for (*block, norm, eps), part in groups(compared, [*BLOCK, "norm", "eps"]):
        columns: list[Any] = list(part.columns)
        measures = list(dict.fromkeys((group, name) for group, name, _ in columns if group != COST))
        sizes = [int(n) for m in measures for n in part[(*m, "n")].dropna()]
        common = max(set(sizes), key=sizes.count)
        lines = []
        for index, line in zip(part.index, part.to_dict("records")):
            entries = [_entry({k: line[(*m, k)] for k in NUMBERS}, common) for m in measures]
            of = {name: line[COST, name, ""] for name in COSTS}
            costs = [cost(name, of[name]) for name in ("psnr", "ssim", "ms", "pflop")]
            lines.append([index[-1], *entries, *costs, gradient(of["differentiable"], of["random"])])
        titles = [measure_title(*m) for m in measures]
        over = ["", *(group for group, _ in titles), "purified", "purified", "cost", "cost", "cost"]
        heads = [
            "system",
            *(head for _, head in titles),
            "PSNR, dB",
            "SSIM",
            "ms an image",
            "training PFLOP",
            "gradient",
        ]
        title = ", ".join(filter(None, (block_title(block), budget_title(norm, eps))))
        note = f"accuracy, % [95 % Wilson interval] of {common:,} images"
        sheets.append(Sheet(title, note, over, heads, lines).without_empty())
    return sheets


def measure_title(group: str, name: str) -> tuple[str, str]:
    """A measure of `comparison_table` as two lines of heads say it."""
    if group == CLEAN:
        return "", CLEAN
    if group == ROBUST:
        return "robust accuracy", "all tried" if name == "white_box" else attacker_name(name)
    if group == PAPER:
        return "paper protocol", "oblivious, any distance"
    return attacker_name(group), name


def _entry(line: Mapping[str, Any], common: int) -> str:
    """One accuracy, with its n where that is not `common`."""
    if line["accuracy"] != line["accuracy"]:
        return ""
    return percent_of(line, sign="") + (f" n {line['n']:,}" if line["n"] != common else "")


def paired_sheets(paired: pd.DataFrame) -> list[Sheet]:
    """A sheet per pair of systems of `paired_table`."""
    sheets = []
    for (*block, a, b), part in groups(paired, [*BLOCK, "system_a", "system_b"]):
        lines = []
        several = part["n"].min() < part["n"].max()
        for _, line in records(part):
            heading = measure_title(line["kind"] if line["kind"] != "attack" else line["knowledge"], _name_of(line))
            shares = [percent(line["accuracy_a"]), percent(line["accuracy_b"])]
            numbers = [f"{line[k]:,}" for k in ("only_a", "only_b")]
            lines.append([*heading, *shares, *numbers, probability(line["p"]), f"{line['n']:,}" if several else ""])
        over = ["", "", "accuracy", "accuracy", "right alone", "right alone", "", ""]
        heads = ["", "", *["first", "second"] * 2, "p", "images"]
        size = "the images of both" if several else f"{part['n'].iloc[0]:,} images"
        note = f"{size}; p is McNemar's exact test that both are equally good"
        title = f"{block_title(block)}: {a} (first) and {b} (second)"
        sheets.append(Sheet(title, note, over, heads, lines, names=2).without_empty())
    return sheets


def _name_of(line: Mapping[str, Any]) -> str:
    budget = budget_title(line["norm"], line["eps"])
    name = line["attack"] if line["kind"] == "attack" else measure_title(line["kind"], line["knowledge"])[1]
    return ", ".join(filter(None, (name, budget)))


def probability(p: float) -> str:
    """A probability: `0.031`, `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def frame_sheet(frame: pd.DataFrame, title: str = "") -> Sheet:
    """Any table of numbers as it is, to four digits."""
    lines = [[_plain(value) for value in line] for line in frame.itertuples(index=False, name=None)]
    return Sheet(title, "", [""] * len(frame.columns), list(map(str, frame.columns)), lines)


def _plain(value: Any) -> str:
    import pandas as pd

    if value is None or value is pd.NA or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(line: Mapping[str, Any]) -> list[str]:
    """What names a cell: system, attacker, attack."""
    return [line["system"], attacker_name(line["knowledge"]), attack_name(line["attack"], line["eps"])]


# Conditions ---------------------------------------------------------------------------------------------------------


def conditions(results: Results, *environments: Mapping[str, Any]) -> pd.DataFrame:
    """What the numbers hold for, as text: columns `what` and `value`.

    Each attack's whole record with its seed and number of images, then the whole names that `Results.readable` has
    shortened, then device, threads, versions and commit. environments: as `unperturb.runs.environment` gives them, one
    per run folder; equal ones are said once.
    """
    import pandas as pd

    lines: list[tuple[str, str]] = []
    keys = ["dataset", "split", "attack", "attack_repr", "seed"]
    for (dataset, split, name, record, seed), same in groups(tables.attack_table(results), keys):
        seen = []
        for (knowledge,), part in groups(same, ["knowledge"]):
            made_on = ", ".join(sorted(set(part["surrogate"]) - {""}))
            source = f"{attacker_name(knowledge)} from {made_on}" if made_on else attacker_name(knowledge)
            seen.append(f"{source} n {counts(part['least'].min(), part['most'].max())}")
        lines.append((f"{dataset} {split}: {name}", f"{record}; seed {seed}; {'; '.join(seen)}"))
    renamed = [(column, new, old) for column, of in results.names.items() for new, old in of.items()]
    lines += [(f"{column} {new}", old) for column, new, old in renamed if one_line(old) != new]
    for environment in environments:
        for key, value in environment.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
            if (key, text) not in lines:
                lines.append((key, text))
    return pd.DataFrame(lines, columns=["what", "value"])
