"""What the figures of `attacks.py` say: a table, a plot, the marks that were set, and where ours lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]

OURS, FUSED = "ours", "ours, fused copy"
COLORS = {  # Okabe and Ito's, told apart by the color-blind
    OURS: "#0072b2",
    FUSED: "#56b4e9",
    "torchattacks": "#d55e00",
    "foolbox": "#e69f00",
    "ART": "#999999",
    "adv-lib": "#009e73",
}
MINIMAL = ("l2", "l1", "l0")  # norms in which the attacks here look for the nearest image
ONE_PASS = ("fgsm", "pgd", "mim", "deepfool", "cw-1x100", "cw-9x100")
SIX = (*ONE_PASS, "jsma")
_TICKS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def by_attack(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """`{(model, attack): {library: row}}` of the rows that hold figures."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if "error" not in row:
            found.setdefault((row["model"], row["attack"]), {})[row["library"]] = row
    return found


def loses(rows: list[Row]) -> list[str]:
    """A sentence for each peer that is faster than ours, fells more images, or (minimal-norm attacks, images that both
    felled) stays nearer by more than 1 %."""
    found = []
    for (model, attack), line in by_attack(rows).items():
        ours = line[OURS]
        for name, row in line.items():
            if name in (OURS, FUSED):
                continue
            where, why = f"{attack} on {model}, against {name}", []
            if row["times_ours"] < 1:
                why.append(f"slower ({ours['seconds']['median']:.3g} s, {row['seconds']['median']:.3g} s)")
            if row["success"] > ours["success"] and row["n"] == ours["n"]:
                why.append(f"fewer images fall ({ours['success']:.1%}, {row['success']:.1%})")
            both = row["distance_where_both_fell"]
            minimal = row["norm"] in MINIMAL and both["n"]
            if minimal and both["ours"] > 1.01 * both["this"]:
                why.append(f"farther where both fell ({both['ours']:.4g}, {both['this']:.4g} in {row['norm']})")
            if why:
                found.append(f"{where}: {'; '.join(why)}")
    return found


def marks(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The marks set for these figures and whether they are met: claim, where, value, mark, met."""
    found: list[dict[str, Any]] = []

    def mark(claim: str, where: str, value: float, limit: float, *, least: bool = False) -> None:
        met = value >= limit if least else value <= limit
        found.append({"claim": claim, "where": where, "value": value, "mark": limit, "met": met})

    models = {m["name"]: m for m in record["models"]}
    for (model, attack), line in by_attack(record["rows"]).items():
        if attack not in SIX or OURS not in line:
            continue
        where, ours, peers = (
            f"{attack} on {model}",
            line[OURS],
            {k: v for k, v in line.items() if k not in (OURS, FUSED)},
        )
        overhead = ours["overhead"]["median"]
        mark("overhead, at most", where, overhead, 1.3 if attack == "jsma" else 1.08)
        if attack != "jsma" and FUSED in line and models[model]["folded"]:
            mark("overhead with the fused copy, below", where, line[FUSED]["overhead"]["median"], 0.85)
        if peers:
            best = max(row["images_per_second"] for row in peers.values())
            mark("seconds, at most the best peer's", where, ours["seconds"]["median"], ours["n"] / best)
        if attack == "jsma" and "torchattacks" in peers:
            times = 24.0 if models[model]["images"][1] * models[model]["images"][2] ** 2 < 3072 else 70.0
            mark(
                "times as fast as torchattacks, at least", where, peers["torchattacks"]["times_ours"], times, least=True
            )
        whole = [row["distance"] for row in peers.values() if row["success"] == 1.0]
        if attack == "cw-9x100" and whole and ours["success"] == 1.0:
            mark("mean L2 at 100 % success, at most the best peer's", where, ours["distance"], min(whole))
    return found


def print_table(record: dict[str, Any]) -> None:
    """Attack x library, then the marks and where ours lose."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 132)
    for model in record["models"]:
        table = Table(title=f"{model['name']}, median of the rounds")
        for head in ("attack", "library"):
            table.add_column(head)
        for head in ("seconds", "min-max", "images/s", "x ours", "overhead", "success", "distance", "outside"):
            table.add_column(head, justify="right")
        last = ""
        for row in record["rows"]:
            if row["model"] != model["name"]:
                continue
            name = "" if row["attack"] == last else f"{row['attack']}, {row['n']} images"
            if name and last:
                table.add_section()
            last = row["attack"]
            here = next(r["n"] for r in record["rows"] if (r["model"], r["attack"]) == (row["model"], row["attack"]))
            fewer = "" if row["n"] == here else f" ({row['n']} of them)"
            table.add_row(name, row["library"] + fewer, *_cells(row))
        console.print(table)
    for name, why in record["absent"].items():
        console.print(f"{name} did not take part: {why}", markup=False)
    for mark in record["marks"]:
        said = f"{mark['claim']} {mark['mark']:.3g}: {mark['value']:.3g} ({mark['where']})"
        console.print(f"{'met   ' if mark['met'] else 'MISSED'}  {said}", markup=False)
    for line in record["loses"]:
        console.print(f"ours lose: {line}", markup=False)


def _cells(row: Row) -> list[str]:
    if "error" in row:
        return [f"[dim]{row['error'].splitlines()[0][:40]}[/dim]"]
    seconds, overhead, distance = row["seconds"], row["overhead"], row["distance"]
    return [
        f"{seconds['median']:.3g}",
        f"{seconds['min']:.3g}-{seconds['max']:.3g}",
        f"{row['images_per_second']:.0f}",
        f"{row['times_ours']:.2f}",
        ("" if overhead is None else f"{overhead['median']:.2f}") + ("*" if row["passes_are"] == "spent" else ""),
        f"{row['success']:.1%}",
        "" if distance is None else f"{distance:.4g} {row['norm']}",
        str(row["outside"] or ""),
    ]


def plot(rows: list[Row], path: Path) -> None:
    """Bars of overhead from 1 up or down, a panel per model; over a peer's bar, its seconds as a multiple of ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from unperturb.runs import write_atomically

    lines = {k: v for k, v in by_attack(rows).items() if all(row["overhead"] for row in v.values())}
    models = list(dict.fromkeys(model for model, _ in lines))
    if not models:
        return
    widest = max(sum(len(v) + 1 for (m, _), v in lines.items() if m == model) for model in models)
    size = (max(7.0, 0.36 * widest + 1.5), 3.7 * len(models) + 0.4)
    figure, panels = plt.subplots(len(models), 1, figsize=size, squeeze=False, sharey=True, layout="constrained")
    values = [row["overhead"] for line in lines.values() for row in line.values()]
    lowest, highest = min(v["min"] for v in values), max(v["max"] for v in values)
    panels[0, 0].set_yscale("log")
    panels[0, 0].set_ylim(min(0.6, 0.9 * lowest), 6 * max(1.0, highest))  # room for the legend
    for axes, model in zip(panels[:, 0], models):
        _panel(axes, model, {attack: line for (m, attack), line in lines.items() if m == model})
    shown = {name: bar for axes in panels[:, 0] for bar, name in zip(*axes.get_legend_handles_labels())}
    ordered = [name for name in COLORS if name in shown]
    panels[0, 0].legend([shown[n] for n in ordered], ordered, ncols=3, fontsize=9, frameon=False, loc="upper left")
    write_atomically(path, lambda p: figure.savefig(p, dpi=130, format="png"))
    plt.close(figure)


def _panel(axes: Any, model: str, attacks: dict[str, dict[str, Row]]) -> None:
    at, ticks = 0.0, []
    for line in attacks.values():
        ticks.append(at + (len(line) - 1) / 2)
        for name, row in line.items():
            value = row["overhead"]
            spread = [[value["median"] - value["min"]], [value["max"] - value["median"]]]
            axes.bar(at, value["median"] - 1, 0.9, bottom=1, color=COLORS[name], label=name)
            axes.errorbar(at, value["median"], spread, fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
            if name not in (OURS, FUSED):
                times = row["times_ours"]
                axes.annotate(
                    f"{times:.0f}x" if times >= 9.95 else f"{times:.2f}x",
                    (at, max(value["max"], 1)),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                )
            at += 1
        at += 1
    axes.axhline(1, color="#222222", linewidth=0.9, linestyle="--")
    axes.set_xlim(-1, at - 1)
    counts = [f"{attack}\nn = {line[OURS]['n']}" for attack, line in attacks.items()]
    axes.set_xticks(ticks, counts, fontsize=9)
    axes.tick_params(axis="x", length=0)
    low, high = axes.get_ylim()
    shown = [v for v in _TICKS if low <= v <= high]
    axes.set_yticks(shown, [f"{v:g}" for v in shown], fontsize=9)
    axes.set_yticks([], minor=True)  # else a narrow log axis writes 6 x 10^-1 between them
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_ylabel("overhead: time / least passes", fontsize=9)
    axes.set_title(f"{model}; over a peer's bar: its seconds / ours", fontsize=10, loc="left")
