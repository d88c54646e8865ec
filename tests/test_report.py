"""Tables counted by hand, figures, and the page, from rows and samples written as a run writes them."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from unperturb import report, runs
from unperturb.intervals import wilson
from unperturb.report import comparison, cost, detectors, escape, figures, page, tables
from unperturb.results import samples, schema

KEPT = {"oblivious": 0.95, "white_box": 0.1}  # the share of images a defense saves, in the made-up runs


def columns(n: int, **given: Any) -> dict[str, Any]:
    """Every column of `n` rows, dull where not given."""
    blank = {
        k: {"string": "", "list<float32>": [[]] * n, "bool": False}.get(v, 0) for k, v in schema.ROW_COLUMNS.items()
    }
    return blank | {"index": np.arange(n), "defense": "none", "knowledge": "oblivious", "split": "test"} | given


def make_run(
    folder: Path,
    *,
    dataset: str = "digits",
    classifiers: tuple[str, ...] = ("lenet5", "conv", "resnet8"),
    defenses: tuple[str, ...] = ("none", "ours"),
    attacks: tuple[str, ...] = ("fgsm", "pgd-40", "mim-10"),
    eps: float = 0.3,
    n: int = 200,
    samples: int = 10,
    class_names: tuple[str, ...] = (),
) -> Path:
    """A run folder of made-up outcomes over real digits."""
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    clean = np.kron(digits[:samples].reshape(-1, 1, 8, 8) / 16, np.ones((1, 1, 3, 3)))
    clean = np.pad(clean, ((0, 0), (0, 0), (2, 2), (2, 2)))
    label = labels[:n]
    for c, classifier in enumerate(classifiers):
        for d, defense in enumerate(defenses):
            for a, attack in enumerate(attacks):
                for knowledge in ("oblivious",) if defense == "none" else ("oblivious", "white_box"):
                    rng = np.random.default_rng([c, d, a, len(knowledge)])
                    kept = 0.05 if defense == "none" else KEPT[knowledge] - 0.02 * a - 0.03 * c

                    hard = np.random.default_rng([c, d]).random(n)  # an image that is hard is hard for every attack

                    def judged(chance: float, jitter: float = 0.02, hard: Any = hard, rng: Any = rng) -> Any:
                        return np.where(hard + jitter * rng.normal(size=n) < chance, label, (label + 1) % 10)

                    bare_clean, bare = judged(0.99, 0), judged(0.05)
                    pure = (bare_clean, bare) if defense == "none" else (judged(0.98, 0), judged(kept))
                    views = [bare_clean, bare, *pure]
                    cell = {
                        "dataset": dataset,
                        "split": "test",
                        "classifier": classifier,
                        "defense": defense,
                        "attack": attack,
                        "attack_repr": f"{attack.partition('-')[0].upper()}(targets=None, norm='linf', eps={eps})",
                        "eps": eps,
                        "knowledge": knowledge,
                        "surrogate": "",
                        "seed": 0,
                    }
                    sure = [np.where(v == label, 0.98, 0.03) * rng.uniform(0.7, 1, n) for v in views]
                    names = ("clean", "adv", "pure_clean", "pure_adv")
                    similar = {
                        "psnr_adv": rng.normal(12.9, 1, n),
                        "psnr_pure_adv": rng.normal(25.3, 1, n) if defense != "none" else np.full(n, 12.9),
                        "psnr_pure_clean": rng.normal(31, 1, n) if defense != "none" else np.full(n, np.inf),
                        "ssim_adv": rng.normal(0.41, 0.03, n),
                        "ssim_pure_adv": rng.normal(0.93, 0.01, n),
                        "ssim_pure_clean": rng.normal(0.98, 0.01, n),
                    }
                    seen = {f"pred_{k}": v for k, v in zip(names, views)} | {
                        f"conf_{k}": v for k, v in zip(names, sure)
                    }
                    key = f"{'-'.join(name[:20] for name in (classifier, defense, attack))}-{knowledge}-{c}{d}{a}"
                    key = key.replace("/", "_")
                    shard = folder / "rows" / key / "00000.parquet"
                    schema.write_rows(shard, columns(n, **cell, label=label, **seen, **similar))

                    noisy = np.clip(clean + eps * np.sign(rng.normal(size=clean.shape)), 0, 1)
                    left = 0.08 if knowledge == "oblivious" else 0.5
                    tensors = {
                        "clean": clean,
                        "adversarial": noisy,
                        "restored": clean + left * (noisy - clean),
                        "restored_clean": clean * 0.98,
                    }
                    tensors = {k: torch.from_numpy((255 * v).round().astype(np.uint8)) for k, v in tensors.items()}
                    tensors["index"] = torch.arange(samples)
                    tensors["label"] = torch.from_numpy(label[:samples].astype(np.int64))
                    tensors["confidence"] = torch.from_numpy(np.stack(sure, 1)[:samples].astype(np.float32))
                    tensors["prediction"] = torch.from_numpy(np.stack(views, 1)[:samples].astype(np.int64))
                    described = cell | {"class_names": list(class_names or map(str, range(10)))}
                    samples.write_samples(folder / "samples" / f"{key}.safetensors", tensors, described)
    runs.write_json(folder / "recipe.json", {"name": "made-up"})
    runs.write_json(
        folder / "environment.json",
        {
            "date": "2020-01-01",
            "python": "3.11.0",
            "versions": {"unperturb": "0.1.0", "torch": "2.13.0"},
            "device": "cpu AVX2",
            "threads": 1,
            "commit": "0123abc",
        },
    )
    return folder


def frame(*cells: dict[str, Any]) -> pd.DataFrame:
    """Rows from cells; `right_clean` and `right_adv` say which images the protected model gets right."""
    parts = []
    for cell in cells:
        cell = {"attack": "fgsm", "attack_repr": "FGSM()", "eps": 0.3, "dataset": "digits", "classifier": "a"} | cell
        right = {k: np.array(cell.pop(f"right_{k}")) for k in ("clean", "adv")}
        seen = {f"pred_{v}{k}": np.where(right[k], 1, 2) for v in ("", "pure_") for k in right}
        parts.append(pd.DataFrame(columns(len(right["adv"]), label=1, surrogate="", **seen) | cell))
    return pd.concat(parts, ignore_index=True).astype({"eps": "float32"})


TINY = (
    {"defense": "none", "right_clean": [1, 1, 1, 0], "right_adv": [0, 0, 1, 0]},
    {"defense": "none", "right_clean": [1, 1, 1, 0], "right_adv": [0, 1, 0, 0], "attack": "pgd-40"},
    {"defense": "ours", "right_clean": [1, 1, 0, 1], "right_adv": [1, 1, 1, 0]},
    {"defense": "ours", "right_clean": [1, 1, 0, 1], "right_adv": [1, 0, 1, 1], "attack": "pgd-40"},
    {"defense": "ours", "right_clean": [1, 1, 0, 1], "right_adv": [0, 0, 0, 1], "knowledge": "white_box"},
)


def only(table: pd.DataFrame, **where: Any) -> pd.Series:
    found = table[(table[list(where)] == list(where.values())).all(axis=1)]
    assert len(found) == 1, found
    return found.iloc[0]


# Tables -------------------------------------------------------------------------------------------------------------


def test_accuracy_counted_by_hand() -> None:
    table = tables.accuracy_table(frame(*TINY))
    assert len(table) == 5 + 2  # the cells, and clean for each defense
    for where, right in (
        ({"defense": "none", "attack": "fgsm"}, 1),
        ({"defense": "none", "attack": "clean"}, 3),
        ({"defense": "ours", "attack": "fgsm", "knowledge": "oblivious"}, 3),
        ({"defense": "ours", "attack": "fgsm", "knowledge": "white_box"}, 1),
        ({"defense": "ours", "attack": "clean"}, 3),
    ):
        line = only(table, **where)
        assert (line["n"], line["accuracy"]) == (4, right / 4)
        assert (line["low"], line["high"]) == pytest.approx(wilson(right, 4))


def test_worst_case_is_per_image() -> None:
    table = tables.worst_case(frame(*TINY))
    # ours, oblivious: image 0 alone is right clean, under FGSM and under PGD; white box: image 3 alone.
    assert only(table, defense="ours", knowledge="oblivious")["accuracy"] == 1 / 4
    assert only(table, defense="ours", knowledge="oblivious")["covers"] == "oblivious: fgsm, pgd-40"
    assert only(table, defense="ours", knowledge="white_box")["accuracy"] == 1 / 4
    both = only(table, defense="ours", knowledge="all")
    assert (both["accuracy"], both["covers"]) == (0, "oblivious: fgsm, pgd-40; white box: fgsm")
    # Each attack on the bare classifier leaves an image, but never the same; its white box is its oblivious attacker.
    assert only(table, defense="none", knowledge="oblivious")["accuracy"] == 0
    assert only(table, defense="none", knowledge="white_box")["accuracy"] == 0


def test_worst_case_joins_on_the_index() -> None:
    few = {"defense": "ours", "index": np.array([3, 0]), "right_clean": [1, 1], "right_adv": [1, 0], "attack": "mim"}
    table = tables.worst_case(frame(TINY[2], few))
    line = only(table, knowledge="oblivious")  # in both: image 0 (lost to MIM) and image 3 (lost to FGSM)
    assert (line["n"], line["accuracy"]) == (2, 0)
    apart = {"defense": "ours", "index": np.array([8, 9]), "right_clean": [1, 1], "right_adv": [1, 1], "attack": "mim"}
    assert only(tables.worst_case(frame(TINY[2], apart)), knowledge="oblivious")["n"] == 0


def test_worst_cases_of_two_budgets_are_apart() -> None:
    small = {"defense": "ours", "right_clean": [1] * 4, "right_adv": [1, 1, 1, 0], "eps": 0.1}
    large = {"defense": "ours", "right_clean": [1] * 4, "right_adv": [1, 0, 0, 0], "eps": 8 / 255}
    free = {"defense": "ours", "right_clean": [1] * 4, "right_adv": [0] * 4, "eps": np.nan, "attack": "cw"}
    wide = tables.wide_table(frame(small, large, free))["ours", "oblivious"].droplevel([0, 1, 2])
    assert wide["worst case, eps 0.1"].startswith("75.0 %")
    assert wide["worst case, eps 8/255"].startswith("25.0 %")
    assert wide["cw"].startswith("0.0 %")
    # One budget alone is named too: its line says nothing of the attack without one that stands above it.
    one = tables.wide_table(frame(small, free))["ours", "oblivious"].droplevel([0, 1, 2])
    assert one["worst case, eps 0.1"].startswith("75.0 %")
    assert "worst case" not in one


def test_a_random_defense_counts_images_not_draws() -> None:
    draws = [
        {"defense": "ours", "right_clean": [1, 1, 1, 1], "right_adv": a, "draw": i}
        for i, a in enumerate(([1, 1, 0, 0], [1, 0, 1, 0]))
    ]
    rows = frame(*draws)
    line = only(tables.accuracy_table(rows), attack="fgsm")
    assert (line["n"], line["accuracy"]) == (4, 0.5)  # of the images: 1, 1/2, 1/2, 0
    assert only(tables.worst_case(rows), knowledge="oblivious")["accuracy"] == 0.25  # right in every draw


def test_classifiers_and_records_are_never_pooled() -> None:
    other = TINY[2] | {"classifier": "b", "right_adv": [0, 0, 0, 0]}
    again = TINY[2] | {"attack_repr": "FGSM(loss='margin')", "right_adv": [0, 0, 0, 1]}
    table = tables.accuracy_table(frame(TINY[2], other, again))
    assert only(table, classifier="a", attack="fgsm")["accuracy"] == 0.75
    assert only(table, classifier="b", attack="fgsm")["accuracy"] == 0
    assert only(table, classifier="a", attack="fgsm #2")["attack_repr"] == "FGSM(loss='margin')"
    wide = tables.wide_table(frame(TINY[2], again)).droplevel([0, 1, 2])
    assert list(wide.index) == ["images", "clean", "fgsm, eps 0.3", "fgsm, eps 0.3 #2", "worst case"]


def test_wide_table_puts_the_two_attackers_side_by_side() -> None:
    wide = tables.wide_table(frame(*TINY))
    assert list(wide.columns) == [("undefended", ""), ("ours", "oblivious"), ("ours", "white box")]
    block = wide.loc["digits", "test", "a"]
    assert list(block.index) == ["images", "clean", "fgsm, eps 0.3", "pgd-40, eps 0.3", "worst case"]
    low, high = wilson(3, 4)
    assert block["ours", "oblivious"]["fgsm, eps 0.3"] == f"75.0 % [{100 * low:.1f}, {100 * high:.1f}]"
    assert block["ours", "white box"]["pgd-40, eps 0.3"] == ""


def test_the_direct_attack_has_a_name_where_others_stand_beside_it() -> None:
    transfer = {"defense": "none", "knowledge": "transfer", "right_clean": [1] * 4, "right_adv": [1] * 4}
    noise = transfer | {"knowledge": "none", "attack": "noise", "right_adv": [0] * 4}
    wide = tables.wide_table(frame(*TINY, transfer, noise))
    named = [("undefended", "noise"), ("undefended", "transfer"), ("undefended", "direct")]
    assert list(wide.columns) == [*named, ("ours", "oblivious"), ("ours", "white box")]
    block = wide.droplevel([0, 1, 2])
    assert block["undefended", "direct"]["fgsm, eps 0.3"].startswith("25.0 %")
    assert block["undefended", "transfer"]["fgsm, eps 0.3"].startswith("100.0 %")
    assert "direct" in report.table(frame(*TINY, transfer))
    assert "direct" not in report.table(frame(*TINY))


def test_quality_averages_decibels_and_counts_identical_images_apart() -> None:
    psnr = {"psnr_adv": [10.0, 14.0, 12.0, 12.0], "psnr_pure_adv": [20, 30, np.inf, 25], "psnr_pure_clean": np.inf}
    ssim = {"ssim_adv": [0.1, 0.2, 0.3, 0.4], "ssim_pure_adv": 0.5, "ssim_pure_clean": np.nan}
    rows = frame(TINY[0], TINY[2] | psnr | ssim)
    line = only(tables.quality_table(rows), defense="ours")  # and no line for "none": nothing was restored
    assert (line["psnr_before"], line["psnr_after"]) == (12, 25)
    assert (line["identical_before"], line["identical_after"], line["identical_clean"]) == (0, 1, 4)
    assert line["ssim_before"] == pytest.approx(0.25)
    text = report.table(rows, 120)
    assert "25.0 (1 identical)" in text
    assert re.search(r"identical +0\.250 +0\.500 +-\n", text)


def test_conditions_hold_the_record_the_seed_and_the_commit() -> None:
    made = TINY[2] | {"knowledge": "transfer", "surrogate": "vgg"}
    table = tables.conditions(
        frame(*TINY, made), {"commit": "0123abc", "versions": {"torch": "2.13.0"}}, {"commit": "9"}
    )
    values = dict(zip(table["what"], table["value"]))
    assert values["digits test: fgsm, eps 0.3"] == "FGSM(); seed 0; oblivious n 4; transfer from vgg n 4; white box n 4"
    assert values["versions"] == "torch 2.13.0"
    assert sorted(table[table["what"] == "commit"]["value"]) == ["0123abc", "9"]


@pytest.mark.parametrize(
    ("eps", "text"), [(0.3, "0.3"), (np.float32(0.3), "0.3"), (8 / 255, "8/255"), (2.0, "2"), (float("nan"), "")]
)
def test_budgets_read_as_people_write_them(eps: float, text: str) -> None:
    assert tables.budget_name(eps) == text


def test_no_rows_is_said() -> None:
    with pytest.raises(ValueError, match="no rows"):
        tables.accuracy_table(frame(*TINY).iloc[:0])


# Text ---------------------------------------------------------------------------------------------------------------


def test_text_fits_a_terminal_with_three_of_everything(tmp_path: Path) -> None:
    defenses = ("none", "paper-mnist", "protect-mnist", "apegan")
    rows = schema.read_rows(
        make_run(tmp_path, dataset="fashion_mnist", defenses=defenses, eps=8 / 255, n=20, samples=1)
    )
    assert max(map(len, report.table(rows, 80).splitlines())) <= 80
    text = report.table(rows)
    assert max(map(len, text.splitlines())) <= 100
    for name in ("lenet5", "conv", "resnet8", "undefended", *defenses[1:], "oblivious", "white box", "worst case"):
        assert name in text
    assert text.count("pgd-40, eps 8/255") == 3 * 3 + 3 * 3 * 2  # three pages of accuracy and six cells a classifier


def test_markdown_keeps_its_columns() -> None:
    lines = report.to_markdown(tables.wide_table(frame(*TINY))).splitlines()
    assert lines[0] == "| dataset | split | classifier | attack | undefended | ours, oblivious | ours, white box |"
    assert len({line.count("|") for line in lines}) == 1
    assert report.to_markdown(pd.DataFrame({"a": ["x|y"], "b": [0.25]})).splitlines()[2] == "| x\\|y | 0.25 |"


# Figures ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    return make_run(folder, classifiers=("lenet5", "conv"), attacks=("mim-10", "fgsm"), n=30, samples=3)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "small"
    return make_run(folder, classifiers=("conv",), attacks=("mim-10", "fgsm"), n=30, samples=1)


@pytest.mark.parametrize("name", ["defense_gan", "adversarial_large", "denoised_smoothing", "adversariallytrained"])
def test_the_name_of_a_defense_stays_on_the_figure(name: str, run: Path) -> None:
    cell, tensors = samples.read_samples(run)[0]
    (axes,) = figures.restored_figure({**cell, "defense": name}, tensors).axes
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    (label,) = (t for t in axes.texts if t.get_text().replace("\n", "") == name)
    first = min(image.get_window_extent(renderer).x0 for image in axes.images)
    box = label.get_window_extent(renderer)
    assert 0 <= box.x0 < box.x1 <= first


def test_restored_figure_says_what_was_predicted(run: Path) -> None:
    for cell, tensors in samples.read_samples(run):
        (axes,) = figures.restored_figure(cell, tensors).axes
        texts = [t.get_text() for t in axes.texts]
        assert [t for t in texts if t in ("Normal", "Adv", cell["defense"])] == ["Normal", "Adv", cell["defense"]]
        said = [t for t in texts if re.search("^[^ ]+ [✓✗]$", t)]
        label, predicted = tensors["label"].tolist(), tensors["prediction"].tolist()
        expected = [f"{p[v]} {'✓' if p[v] == t else '✗'}" for v in (0, 1, 3) for p, t in zip(predicted, label)]
        assert said == expected
        assert np.array_equal(axes.images[-1].get_array(), tensors["restored"][2, 0].numpy())


def test_confidence_figure_shows_images_that_the_attack_turned(run: Path) -> None:
    for cell, tensors in samples.read_samples(run):
        label, predicted = tensors["label"], tensors["prediction"]
        attacked = 3 if cell["knowledge"] == "white_box" else 1
        turned = ((predicted[:, 0] == label) & (predicted[:, attacked] != label)).nonzero().flatten().tolist()
        chosen = turned or [0, 1, 2]
        said = "\n".join(t.get_text() for t in figures.confidence_figure(cell, tensors).axes[0].texts)
        expected = [100 * float(tensors["confidence"][i, v]) for v in (0, 1, 3) for i in chosen]
        assert [float(found) for found in re.findall(r": ([\d.]+) %", said)] == pytest.approx(expected, abs=0.051)


def test_accuracy_figure_draws_the_table(run: Path) -> None:
    rows = schema.read_rows(run)
    table = tables.accuracy_table(rows)
    axes = figures.accuracy_figure(rows).axes
    assert len(axes) == 2  # a panel per classifier
    names = [t.get_text() for t in axes[0].get_xticklabels()]
    assert names == ["clean", "fgsm\neps 0.3", "mim-10\neps 0.3", "worst case\neps 0.3"]
    bare, oblivious, white_box = axes[0].containers[0], axes[0].containers[2], axes[0].containers[4]
    for bars, defense, knowledge in (
        (bare, "none", "oblivious"),
        (oblivious, "ours", "oblivious"),
        (white_box, "ours", "white_box"),
    ):
        line = only(table, classifier="conv", defense=defense, knowledge=knowledge, attack="mim-10")
        assert bars[2].get_height() == pytest.approx(100 * line["accuracy"])


def test_accuracy_figure_of_many_defenses_is_no_wider_than_a_page(run: Path) -> None:
    rows = schema.read_rows(run)
    ours = rows[rows["defense"] == "ours"]
    rows = pd.concat([rows, *(ours.assign(defense=f"ours {i}") for i in range(9))], ignore_index=True)
    figure = figures.accuracy_figure(rows)
    assert len([axes for axes in figure.axes if axes.axison]) == 2 * 10  # classifiers times defenses
    assert figure.get_figwidth() <= figures.WIDEST + 1


def test_a_figure_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    class Broken:
        def savefig(self, path: Path, **_: Any) -> None:
            path.write_bytes(b"half")
            raise OSError("no space")

    path = tmp_path / "a.png"
    path.write_bytes(b"whole")
    with pytest.raises(runs.RunError, match="no space"):
        figures.save(Broken(), path)  # type: ignore[arg-type]
    assert path.read_bytes() == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


# Page ---------------------------------------------------------------------------------------------------------------


def test_the_report_is_whole_self_contained_and_remade_byte_for_byte(small_run: Path, tmp_path: Path) -> None:
    written = report.write_report(small_run, tmp_path / "one")
    again = report.write_report([small_run], tmp_path / "two")
    assert written.keys() == again.keys()
    for name, path in written.items():
        assert path == tmp_path / "one" / ("report.html" if name == "page" else name)
        assert path.read_bytes() == again[name].read_bytes(), name
    kinds = {name.partition("-")[0] for name in written if name.startswith("figures/")}
    assert kinds == {"figures/accuracy", "figures/restored", "figures/confidence"}
    text = written["page"].read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*(?!["']data:)|https?://|@import|url\(|<script|<link""", text)
    # The chart, and of each attack and attacker one image clean, attacked (here not the same for both) and restored.
    assert text.count("data:image/webp;base64,") == 1 + 2 * 2 * 3
    for said in ("white-box attacker", "0123abc", "torch 2.13.0", "MIM(targets=None", "seed 0", "n 30"):
        assert said in text
    line = only(tables.worst_case(schema.read_rows(small_run)), defense="ours", knowledge="white_box")
    assert f"{100 * line['accuracy']:.1f} %" in text[: text.index("Accuracy per attack")]


def test_a_report_of_rows_finds_its_pictures_by_their_runs(small_run: Path, tmp_path: Path) -> None:
    rows = schema.read_rows(small_run)
    rows.attrs.clear()
    assert not any("restored" in name for name in report.write_report(rows, tmp_path))
    rows.attrs["runs"] = [str(small_run)]
    assert any("restored" in name for name in report.write_report(rows, tmp_path))


def front(rows: pd.DataFrame) -> str:
    """The first screen of the page."""
    made = {
        "accuracy": tables.accuracy_table(rows),
        "worst-case": tables.worst_case(rows),
        "side-by-side": tables.wide_table(rows),
        "quality": tables.quality_table(rows),
        "conditions": tables.conditions(rows),
    }
    text = page._page(made, notes=tables.notes(rows))
    return text[text.index("<h1>") : text.index("Accuracy per attack")]


def test_the_first_screen_does_not_make_the_naive_claim() -> None:
    assert "No white-box attacker was tried" in front(frame(*TINY[:4]))
    text = front(frame(*TINY))
    assert "No white-box attacker" not in text
    assert "Doubt" not in text
    better = TINY[4] | {"right_adv": [1, 1, 0, 1]}
    assert "Doubt" in front(frame(*TINY[:4], better))


def test_a_range_over_classifiers_is_a_range() -> None:
    other = [cell | {"classifier": "b", "right_clean": [1] * 4, "right_adv": [1] * 4} for cell in TINY]
    assert "25.0 to 100.0 %" in front(frame(*TINY, *other))


def test_a_report_of_the_bare_classifier_alone_and_of_odd_names() -> None:
    assert "<table" not in front(frame(*TINY[:2]))
    text = front(frame(*TINY[:2], TINY[2] | {"defense": "<i>ours</i>"}))
    assert "<i>ours" not in text
    assert "&lt;i&gt;ours" in text


def test_the_report_loads_nothing_heavy_before_it_is_used() -> None:
    heavy = {"torch", "pandas", "matplotlib", "jinja2", "scipy"}
    code = f"import sys, unperturb.report; print(sorted({heavy!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Defenses side by side -----------------------------------------------------------------------------------------------

FREE = {"attack": "cw", "attack_repr": "CW()", "eps": np.nan}
MARGIN = {"attack": "margin-40", "attack_repr": "PGD(loss='margin')"}
SIDE_BY_SIDE = (
    *TINY,
    FREE | {"defense": "none", "right_clean": [1, 1, 1, 0], "right_adv": [0, 0, 0, 0]},
    FREE | {"defense": "ours", "right_clean": [1, 1, 0, 1], "right_adv": [0, 1, 1, 1]},
    MARGIN | {"defense": "none", "right_clean": [1, 1, 1, 0], "right_adv": [1, 1, 1, 0]},
    MARGIN
    | {"defense": "ours", "right_clean": [1, 1, 0, 1], "right_adv": [1, 1, 0, 0], "knowledge": "white_box"}
    | {"seconds_purify": 0.25},
)


def side_by_side(*more: dict[str, Any], costs: Any = None) -> pd.DataFrame:
    return report.comparison_table(frame(*SIDE_BY_SIDE, *more), costs or {})


def test_side_by_side_counted_by_hand() -> None:
    table = side_by_side()
    assert list(table["defense"]) == ["undefended", "ours"]
    bare, ours = (line for _, line in table.iterrows())
    measures = [
        "clean",
        "oblivious: fgsm",
        "oblivious: pgd-40",
        "oblivious: cw",
        "worst: oblivious",
        "white box: fgsm",
        "white box: margin-40",
        "worst: white box",
        "worst: all",
    ]
    assert [c.removesuffix(" n") for c in table if c.endswith(" n")] == measures  # margin-40 is no oblivious attack
    assert [4 * ours[m] for m in measures] == [3, 3, 3, 3, 0, 1, 2, 0, 0]
    # Direct attacks stand in both attackers' columns: white box is what was tried so on the others, FGSM and margin.
    assert [4 * bare[m] for m in measures] == [3, 1, 1, 0, 0, 1, 3, 1, 0]
    assert (ours["clean low"], ours["clean high"]) == pytest.approx(wilson(3, 4))
    assert (table[[f"{m} n" for m in measures]] == 4).all(axis=None)


def test_side_by_side_joins_parts_of_a_split_and_says_their_n() -> None:
    part = {"defense": "gan", "split": "test:2@0", "right_clean": [1, 1], "right_adv": [1, 0]}
    whole = [cell | {"split": "test:4@0"} for cell in SIDE_BY_SIDE]
    table = report.comparison_table(frame(*whole, part), {})
    assert list(table["defense"]) == ["undefended", "ours", "gan"]
    assert set(table["split"]) == {"test"}
    line = only(table, defense="gan")
    assert (line["clean n"], line["oblivious: fgsm n"], line["oblivious: pgd-40 n"]) == (2, 2, 0)
    assert line["worst: oblivious"] == 0.5
    text = report.compare(frame(*whole, part), {})
    assert "50.0 [9.5, 90.5] n 2" in text
    assert "n 4" not in text
    # The same cell of another part is one more image of it, not another cell.
    more = SIDE_BY_SIDE[2] | {"split": "test:5@0", "index": np.array([9]), "right_clean": [1], "right_adv": [1]}
    joined = only(report.comparison_table(frame(*whole, more), {}), defense="ours")
    assert (joined["oblivious: fgsm n"], joined["oblivious: fgsm"]) == (5, 4 / 5)


def test_side_by_side_has_a_table_for_each_budget() -> None:
    small = SIDE_BY_SIDE[2] | {"eps": 0.1, "attack": "fgsm-small"}
    table = side_by_side(small)
    assert table["eps"].tolist() == pytest.approx([0.1, 0.3, 0.3])
    line = only(table[table["eps"] < 0.2], defense="ours")
    assert line["oblivious: fgsm-small"] == 0.75
    assert line["oblivious: cw"] == 0.75  # without a budget: in each table
    assert line["oblivious: fgsm n"] is pd.NA or line["oblivious: fgsm n"] == 0
    assert report.compare(frame(*SIDE_BY_SIDE, small), {}).count("undefended") >= 1


def test_side_by_side_likeness_time_and_cost() -> None:
    psnr = {"psnr_pure_adv": [20.0, 30.0, np.inf, 25.0], "ssim_pure_adv": 0.5, "seconds_purify": 0.004}
    again = {"psnr_pure_adv": 35.0, "ssim_pure_adv": 0.7, "seconds_purify": 0.002}
    cells = [TINY[2] | psnr, TINY[3] | again, TINY[4] | {"psnr_pure_adv": 1.0, "seconds_purify": 9.0}]
    costs = {
        ("digits", "ours"): {"pflop": 0.25, "differentiable": False, "random": True},
        ("mnist", "ours"): {"pflop": 7.0, "differentiable": True, "random": False},
    }
    line = only(report.comparison_table(frame(*TINY[:2], *cells), costs), defense="ours")
    assert line["psnr"] == pytest.approx((25 + 35) / 2)
    assert line["ssim"] == pytest.approx(0.6)
    assert line["ms"] == pytest.approx(4)  # the median of cells: one that had to wait does not count
    assert (line["pflop"], line["gradient"]) == (0.25, "stand-in, averaged")
    bare = only(report.comparison_table(frame(*TINY), {}), defense="undefended")
    assert np.isnan(bare["pflop"])


def test_side_by_side_keeps_the_order_that_was_asked_for() -> None:
    others = [TINY[2] | {"defense": d} for d in ("b", "a")]
    asked = {("digits", d): {"pflop": 0.0, "differentiable": True, "random": False} for d in ("none", "b", "ours", "a")}
    assert list(side_by_side(*others, costs=asked)["defense"]) == ["undefended", "b", "ours", "a"]


def test_side_by_side_fits_a_terminal_and_stands_on_the_page(small_run: Path, tmp_path: Path) -> None:
    rows = frame(*SIDE_BY_SIDE, TINY[2] | {"defense": "another", "seconds_purify": 2.0})
    text = report.compare(rows, {})
    assert max(map(len, text.splitlines())) <= 100
    for said in ("a on digits (test), eps 0.3", "white box: margin-40", "75.0 [30.1, 95.4]", "2,000"):
        assert said in text
    written = report.write_report(rows, tmp_path / "many")
    found = pd.read_csv(written["tables/comparison.csv"])
    assert found["worst: oblivious"].tolist() == [0, 0, 0.5]  # "another" was shown FGSM alone
    to_read = written["tables/comparison.md"].read_text(encoding="utf-8")
    assert to_read.startswith(
        "### a on digits (test), eps 0.3\n\nAccuracy, % [95 % Wilson interval] of 4 images.\n\n| defense | clean |"
    )
    assert "| 75.0 [30.1, 95.4] |" in to_read
    page_text = written["page"].read_text(encoding="utf-8")
    assert "Defenses side by side" in page_text
    assert "Defenses side by side" not in report.write_report(small_run, tmp_path / "few")["page"].read_text()


def test_costs_are_read_where_they_are_kept(small_run: Path, tmp_path: Path) -> None:
    assert schema.read_costs(small_run) == {}  # written before there were any
    entry = {"dataset": "digits", "folder": "runs/ours", "spec": None, "differentiable": True, "random": False}
    for folder, pflop in (("a", 0.5), ("b", 0.5), ("c", 0.7)):
        runs.write_json(tmp_path / folder / "defenses.json", {"ours": {**entry, "pflop": pflop, "seconds": 3.0}})
    assert schema.read_costs(tmp_path / "a", tmp_path / "b", small_run)["digits", "ours"]["pflop"] == 0.5
    assert schema.read_costs(tmp_path / "a", tmp_path / "c")["digits", "ours"]["pflop"] is None
    rows = frame(*TINY)
    rows.attrs["runs"] = [str(tmp_path / "a")]
    assert only(report.comparison_table(rows), defense="ours")["pflop"] == 0.5


def test_the_pareto_front_is_what_nothing_beats() -> None:
    costs, values = [0.0, 1.0, 1.0, 2.0, 3.0, 3.0], [0.2, 0.5, 0.4, 0.5, 0.9, 0.9]
    assert cost.pareto(costs, values) == [0, 1, 4, 5]


def several(*marks: tuple[str, float, float, float]) -> pd.DataFrame:
    """One table of defenses, each with its name, milliseconds, worst oblivious accuracy and PFLOP."""
    worst = comparison.WORST_OBLIVIOUS
    table = {"dataset": "mnist", "split": "test", "classifier": "a", "eps": 0.3, f"{worst} n": 1000}
    ends = [{worst: v, f"{worst} low": v * 0.95, f"{worst} high": v + 0.05 * (1 - v)} for _, _, v, _ in marks]
    return pd.DataFrame(
        [{**table, **end, "defense": d, "ms": ms, "pflop": p} for (d, ms, _, p), end in zip(marks, ends)]
    )


def test_cost_figure_names_every_defense_where_it_can_be_read() -> None:
    close = [(f"defense_{i}", 0.4 + 0.01 * i, 0.9 + 0.01 * i, 0.07) for i in range(6)]
    marks = [("undefended", 1e-6, 0.0, 0.0), *close, ("slow", 2000.0, 0.88, float("nan"))]
    figure = cost.cost_figure(several(*marks))
    assert figure is not None
    (axes,) = figure.axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    found = {t.get_text(): cost._words(t, renderer) for t in axes.texts if t.get_text() != "no purifier"}
    assert set(found) == {name for name, *_ in marks}
    boxes = list(found.values())
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert cost.cost_figure(several(*marks[:3])) is None


def test_cost_figures_are_saved_where_there_are_three_defenses(tmp_path: Path) -> None:
    others = [TINY[2] | {"defense": d, "seconds_purify": 0.001} for d in ("b", "c")]
    written = report.write_report(frame(*TINY, *others), tmp_path)
    assert "figures/cost-digits-test-a-0.3.png" in written
    assert "Worst oblivious accuracy against cost" in written["page"].read_text(encoding="utf-8")
    assert not any("cost" in name for name in report.write_report(frame(*TINY), tmp_path / "few"))


def test_of_many_defenses_the_table_is_read_first(tmp_path: Path) -> None:
    free = TINY[2] | {"attack": "cw", "eps": np.nan}
    others = [TINY[2] | {"defense": d, "seconds_purify": 0.001} for d in ("b", "c", "d")]
    few = report.write_report(frame(*TINY, free, *others[:2]), tmp_path / "few")["page"].read_text(encoding="utf-8")
    many = report.write_report(frame(*TINY, free, *others), tmp_path / "many")["page"].read_text(encoding="utf-8")
    for text, sentences in ((few, True), (many, False)):
        assert ("survive every attack by an attacker" in text) == sentences
        assert (text.index("Defenses side by side") > text.index("Worst case, digits")) == sentences
        assert text.count("<h2>Defenses side by side") == text.count('alt="cost: ') == 1
    # What has no budget has no place among the worst cases of many: it stands in the table.
    assert (few.count("Worst case, digits"), many.count("Worst case, digits")) == (2, 1)


# Names from outside -------------------------------------------------------------------------------------------------

ODD = (
    "[/red]",
    "<script>alert(1)</script>",
    "a|b",
    "$x$",
    "a\nb",
    "\x1b[31m",
    "日本語",
    "防御",
    "n" * 300,
    "=1+1",
    "../up",
)


def test_odd_names_are_told_apart_and_harmless_in_every_format(tmp_path: Path) -> None:
    mine = {"dataset": "folder:/home/me/my photos"}
    odd = [TINY[2] | mine | {"defense": ODD[i // 4], "attack": name} for i, name in enumerate(ODD)]
    odd += [TINY[2] | mine | {"defense": ODD[9]}, TINY[0] | mine]
    written = report.write_report(frame(*odd), tmp_path, title="<b>mine</b>", note="one & two\nthree")
    text = written["page"].read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert "<title>&lt;b&gt;mine&lt;/b&gt;</title>" in text
    assert "<p>one &amp; two</p>\n<p>three</p>" in text
    assert "n" * 50 not in text[: text.index("Conditions")]
    assert text.count("/home/me") == 1  # whole among the conditions
    for name, path in written.items():
        found = path.read_text(encoding="utf-8") if name.endswith((".md", ".csv")) else ""
        assert re.fullmatch(r"(tables/|figures/)?[a-z0-9.-]+", name)
        if name.endswith(".md"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in found.splitlines() if line[:1] == "|"}) == 1
            assert "<script" not in found
            assert "$x$" not in found
    table = pd.read_csv(written["tables/accuracy.csv"])
    assert table["attack"].nunique() == len(ODD) + 2  # and FGSM, and clean
    assert {"'=1+1", "none"} < set(table["defense"])
    shown = report.table(frame(*odd)) + report.compare(frame(*odd), {})
    assert "\x1b" not in shown
    # Two that differ in their middle alone, or that look like a word of the table's own, are not one.
    alike = ["a" * 30 + c + "b" * 30 for c in "xy"] + ["undefended", "none"]
    rows, names = escape.readable(frame(*(TINY[2] | {"defense": d} for d in alike)))
    assert rows["defense"].nunique() == 4
    assert "undefended" not in set(rows["defense"])
    assert escape.readable(rows)[1] == {}
    assert escape.renamed({"defense": alike[0], "eps": 1}, names)["defense"] in set(rows["defense"])


def test_names_in_one_line_and_their_width() -> None:
    assert escape.one_line("a\r\n b\u202ec\ud800") == "a bc"
    assert escape.one_line("abcdefghijkl", 9) == "abcde…jkl"
    assert escape.columns("日本") == 4
    assert escape.columns(escape.one_line("日本語" * 30, 24)) <= 24
    assert escape.in_markdown("_a_b_ [x](y) *&<") == r"\_a_b\_ [x]\(y) \*&amp;&lt;"
    assert escape.in_file_name("Ä/8", "日本") != escape.in_file_name("Ä/8", "防御")
    lines = report.table(frame(*(cell | {"attack": "日本語"} for cell in (TINY[0], TINY[2])))).splitlines()
    begins = [line.partition(" %")[0].rpartition(" ") for line in lines if line.startswith(("clean  ", "日本語, "))]
    assert [first.strip() for first, _, _ in begins] == ["clean", "日本語, eps 0.3"]
    assert len({escape.columns(first) for first, _, _ in begins}) == 1


@pytest.mark.filterwarnings("ignore:Glyph")  # where no font for them is installed
def test_figures_say_names_as_they_are_and_keep_them_apart(run: Path) -> None:
    cell, tensors = samples.read_samples(run)[0]
    names = ["$x$", "日本語", "a_b" * 9, *map(str, range(7))]
    odd = {**cell, "defense": "$a$\nb", "class_names": names}
    (axes,) = figures.restored_figure(odd, tensors).axes
    assert not any(t.get_parse_math() for t in axes.texts)
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in axes.texts if t.get_text()[-1] in "✓✗"]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    rows = frame(*(TINY[0] | {"attack": name} for name in ("m" * 40, "pgd-l2-margin-100-steps", "日本語" * 9, "cw")))
    figure = figures.accuracy_figure(rows)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in figure.axes[0].get_xticklabels()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# What was wrong with answers ----------------------------------------------------------------------------------------


def test_answers_and_gradients_that_were_none_are_told(run: Path) -> None:
    rows = frame(*TINY)
    assert tables.notes(rows) == []  # rows of before, without the columns
    assert tables.notes(rows.assign(gradients=-1, zero_gradients=-1)) == []
    known = rows["knowledge"] == "white_box"
    lost = rows.assign(pred_pure_adv=rows["pred_pure_adv"].where(~known | (rows["index"] > 1), -1))
    (said,) = tables.notes(lost)
    assert said.startswith("ours before a: 2 images gave no finite logits (fgsm, eps 0.3, white box)")
    assert only(tables.accuracy_table(lost), knowledge="white_box")["accuracy"] == 0.25  # as before: those were wrong
    masked = rows.assign(gradients=40, zero_gradients=np.where(known, 30, 1))
    (said,) = tables.notes(masked)
    assert said.startswith("ours before a: gradient masked. For fgsm, eps 0.3, white box")
    assert "75 %" in said
    assert "gradient masked" in front(masked)
    assert f"NOTE {said}" in " ".join(report.table(masked).split())  # wrapped to the terminal
    cell, tensors = samples.read_samples(run)[0]
    none = {**tensors, "prediction": torch.full_like(tensors["prediction"], -1)}
    for draw in (figures.restored_figure, figures.confidence_figure):
        assert any("no answer" in t.get_text() for t in draw(cell, none).axes[0].texts)


def test_a_defense_that_keeps_less_than_none_is_said_first() -> None:
    keeps = {"defense": "none", "right_clean": [1] * 4, "right_adv": [1, 1, 0, 0]}
    worse = keeps | {"defense": "ours", "right_adv": [1, 0, 0, 0]}
    text = front(frame(keeps, worse))
    assert "ours 25.0 % against 50.0 % (oblivious; the intervals overlap)." in text
    assert text.index("Worse than no defense") < text.index("survive every attack")
    assert "Worse" not in front(frame(keeps, worse | {"right_adv": [0, 1, 1, 0]}))
    # An attack that the bare classifier was not given does not count against the defense.
    assert "Worse" not in front(frame(keeps, worse | {"attack": "strong"}))
    assert "Worse" in front(frame(keeps, worse | {"knowledge": "white_box"}))


# Strips -------------------------------------------------------------------------------------------------------------


def test_small_images_are_kept_to_the_pixel_and_large_ones_made_small(run: Path) -> None:
    def opened(tile: dict[str, Any]) -> np.ndarray:
        with Image.open(io.BytesIO(base64.b64decode(tile["data"].partition(",")[2]))) as picture:
            return np.asarray(picture.convert("RGB"))

    cell, tensors = next(s for s in samples.read_samples(run) if s[0]["defense"] == "ours")
    strip, same = page._strips([(cell, tensors), ({**cell, "attack": "other"}, tensors)])
    assert (strip["crisp"], strip["first"], same["first"]) == (True, True, False)
    assert [line["name"] for line in strip["lines"]] == ["clean", "attacked", "ours"]
    for line, view in zip(strip["lines"], ("clean", "adversarial", "restored")):
        assert np.array_equal(opened(line["tiles"][1])[:, :, 0], tensors[view][1, 0].numpy())
    photos = {k: torch.zeros(3, 3, 400, 300, dtype=torch.uint8) for k in ("clean", "adversarial", "restored")}
    (strip,) = page._strips([(cell, {**tensors, **photos})])
    assert not strip["crisp"]
    assert opened(strip["lines"][0]["tiles"][0]).shape == (160, 120, 3)


def test_defenses_share_the_images_that_attack_them_all_and_the_page_stays_small(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, tensors = next(s for s in samples.read_samples(run) if s[0]["defense"] == "ours")
    cells = [({**cell, "defense": d, "attack": a}, tensors) for a in ("fgsm", "cw") for d in ("ours", "theirs")]
    strips = page._strips(cells)
    assert [[line["name"] for line in s["lines"]] for s in strips] == [["clean", "attacked", "ours", "theirs"]] * 2
    monkeypatch.setattr(page, "HELD", 10)
    assert len(page._strips(cells)) == 1


def test_every_table_slides_in_its_own_box_or_becomes_cards(small_run: Path, tmp_path: Path) -> None:
    text = report.write_report(small_run, tmp_path)["page"].read_text(encoding="utf-8")
    opened = re.findall(r'(<div class="scroll">)?\s*(<table[^>]*>)', text)
    assert len(opened) >= 4
    assert all(box or "cards" in table for box, table in opened)
    assert "The first images" not in text


def test_a_detector_that_gives_no_score_finds_nothing() -> None:
    scores = {"scores_clean": [[0.0]] * 4, "scores_adv": [[np.nan], [np.nan], [1.0], [1.0]]}
    (line,) = detectors.detector_table(frame(TINY[2] | scores)).to_dict("records")
    assert (line["auroc"], line["tpr_1"]) == (0.5, 0.5)
