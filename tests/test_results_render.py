"""Numbers as text: in a terminal, Markdown, HTML, LaTeX and CSV, with names that may hold anything."""

from __future__ import annotations

import io
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from made_rows import frame
from made_runs import make_run
from test_results_comparison import SIDE_BY_SIDE
from test_results_tables import BARE, OURS, PGD, TINY
from unperturb.cli import app
from unperturb.intervals import wilson
from unperturb.registry import UnknownNameError
from unperturb.results import Results, accuracy_table, compare, compare_pair, comparison_table, names, render, table
from unperturb.results.flags import Flag, flags_of
from unperturb.results.sheet import Sheet, as_csv, as_html, as_latex, as_markdown, as_text, in_latex, in_markdown

DOUBT = Flag(
    number=3,
    name="gradient_masked",
    severity="doubt",
    system="ours",
    says="up to 75 % of an image's gradients were exactly zero, so that this attack says little of it",
    dataset="digits",
)


def sheet_of(*cells: dict[str, Any]) -> dict[str, dict[tuple[str, str], str]]:
    """The one accuracy sheet of these cells: by line, the entries by (system, attacker)."""
    (sheet,) = render.accuracy_sheets(Results(frame(*cells)))
    heads = list(zip(sheet.groups, sheet.heads))[1:]
    return {line[0]: dict(zip(heads, line[1:])) for line in sheet.lines}


# Entries ------------------------------------------------------------------------------------------------------------


def test_an_accuracy_its_interval_and_nothing() -> None:
    assert render.percent(0.971, 0.96, 0.98) == "97.1 % [96.0, 98.0]"
    assert render.percent(0.971, 0.96, 0.98, sign="") == "97.1 [96.0, 98.0]"
    assert render.percent(0.5) == "50.0 %"
    assert render.percent(float("nan"), 0.0, 1.0) == ""
    assert render.percent_of({"n": 0, "accuracy": float("nan"), "low": 0, "high": 0}) == ""
    assert render.percent_of(None) == ""


@pytest.mark.parametrize(
    ("norm", "eps", "text"),
    [
        ("linf", 0.3, "eps 0.3"),
        ("linf", np.float32(0.3), "eps 0.3"),
        ("linf", 8 / 255, "eps 8/255"),
        ("l2", 2.0, "L2 2"),
        ("l0", 12, "L0 12"),
        ("", float("nan"), ""),
    ],
)
def test_budgets_read_as_people_write_them(norm: str, eps: float, text: str) -> None:
    assert render.budget_title(norm, eps) == text


def test_costs_probabilities_and_gradients() -> None:
    assert [render.cost("ms", v) for v in (0.01234, 4.2, 99.0, 99.6, 2000.0)] == ["0.012", "4.2", "99", "100", "2,000"]
    assert (render.cost("psnr", 25.04), render.cost("ssim", 0.9), render.cost("pflop", float("nan"))) == (
        "25.0",
        "0.900",
        "",
    )
    assert [render.probability(p) for p in (1.0, 0.0314, 0.0002)] == ["1.000", "0.031", "< 0.001"]
    assert [render.gradient(*of) for of in ((True, False), (False, True), (True, pd.NA), (pd.NA, pd.NA))] == [
        "exact",
        "surrogate, averaged",
        "exact",
        "",
    ]


# Tables -------------------------------------------------------------------------------------------------------------


def test_attackers_stand_side_by_side() -> None:
    lines = sheet_of(*TINY)
    columns = [("undefended", "direct"), ("ours", "oblivious"), ("ours", "white box")]
    assert [list(entries) for entries in lines.values()] == [columns] * len(lines)
    assert list(lines) == ["images", "clean", "fgsm, eps 0.3", "pgd-40, eps 0.3", "robust, eps 0.3"]
    low, high = wilson(3, 4)
    assert lines["fgsm, eps 0.3"]["ours", "oblivious"] == f"75.0 % [{100 * low:.1f}, {100 * high:.1f}]"
    assert lines["pgd-40, eps 0.3"]["ours", "white box"] == ""
    assert lines["images"]["ours", "white box"] == "4"
    # Below an attacker stands what is left by all who know no more.
    assert lines["robust, eps 0.3"]["ours", "oblivious"].startswith("25.0 %")
    assert lines["robust, eps 0.3"]["ours", "white box"].startswith("0.0 %")


def test_classifiers_are_never_pooled() -> None:
    other = OURS | {"classifier": "b", "index": np.array([0, 1]), "right_clean": [1, 1], "right_adv": [0, 0]}
    a, b = render.accuracy_sheets(Results(frame(OURS, other)))
    assert (a.title, b.title) == ("a on digits (test)", "b on digits (test)")
    assert [sheet.lines[0] for sheet in (a, b)] == [["images", "4"], ["images", "2"]]
    assert [sheet.lines[2][1].partition(" [")[0] for sheet in (a, b)] == ["75.0 %", "0.0 %"]


def test_robust_accuracies_of_two_budgets_are_apart() -> None:
    cells = [
        OURS | {"attack": name, "eps": eps, "linf": eps, "right_clean": [1] * 4, "right_adv": right}
        for name, eps, right in (("a", 0.1, [1, 1, 1, 0]), ("b", 8 / 255, [1, 0, 1, 1]))
    ]
    lines = sheet_of(*cells)
    assert lines["robust, eps 0.1"]["ours", "oblivious"].startswith("50.0 %")  # the small one counts within the large
    assert lines["robust, eps 8/255"]["ours", "oblivious"].startswith("75.0 %")
    free = OURS | {"attack": "cw", "attack_repr": "CW()", "eps": np.nan, "right_adv": [0] * 4}
    assert list(sheet_of(free)) == ["images", "clean", "cw"]


def test_of_a_random_system_every_draw_has_a_line() -> None:
    draws = [
        OURS | {"right_clean": [1] * 4, "right_adv": a, "draw": i} for i, a in enumerate(([1, 1, 0, 0], [1, 0, 1, 0]))
    ]
    lines = sheet_of(*draws)
    assert lines["robust, eps 0.3"]["ours", "oblivious"].startswith("50.0 %")
    assert lines["robust, eps 0.3, every draw"]["ours", "oblivious"].startswith("25.0 %")


def test_robust_accuracy_by_knowledge_has_a_sheet_for_each_budget() -> None:
    (sheet,) = render.robust_sheets(Results(frame(*TINY)))
    assert sheet.title == "a on digits (test), eps 0.3"
    assert list(sheet.heads) == ["system", "images", "clean", "oblivious", "white box"]
    assert [[entry.partition(" [")[0] for entry in line] for line in sheet.lines] == [
        ["undefended", "4", "75.0 %", "0.0 %", "0.0 %"],
        ["ours", "4", "75.0 %", "25.0 %", "0.0 %"],
    ]


def test_a_table_fits_its_terminal_and_says_how_to_read_it() -> None:
    systems = [OURS | {"system": name} for name in ("paper-mnist", "protect-mnist", "ape_gan")]
    cells = [cell | extra for cell in (BARE, *systems) for extra in ({}, PGD)]
    cells += [cell | {"knowledge": "white_box"} for cell in systems]
    rows = frame(*(cell | {"classifier": c} for cell in cells for c in ("lenet5", "resnet8")))
    for width in (80, 100):
        assert max(map(len, table(rows, width).splitlines())) <= width
    text = table(rows)
    for name in ("lenet5", "resnet8", "undefended", "ape_gan", "oblivious", "white box", "robust, eps 0.3", "PSNR, dB"):
        assert name in text
    assert text.count("pgd-40, eps 0.3") == 2 * 2 + 2 * 3  # two pages of accuracy and three cells a classifier
    assert max(map(len, compare(rows, 80).splitlines())) <= 80


def test_quality_in_words_where_images_are_identical() -> None:
    psnr = {"psnr_adv": [10.0, 14.0, 12.0, 12.0], "psnr_pure_adv": [20, 30, np.inf, 25], "psnr_pure_clean": np.inf}
    ssim = {"ssim_adv": [0.1, 0.2, 0.3, 0.4], "ssim_pure_adv": 0.5, "ssim_pure_clean": np.nan}
    text = table(frame(BARE, OURS | psnr | ssim), 120)
    assert "25.0 (1 identical)" in text
    assert re.search(r"identical +0\.250 +0\.500 +-\n", text)


def test_systems_side_by_side() -> None:
    part = {"system": "gan", "right_clean": [1, 1], "right_adv": [1, 0], "seconds_purify": 2.0}
    about = {("digits", "ours"): {}, ("digits", "gan"): {"pflop": 0.25, "differentiable": False, "random": True}}
    results = Results(frame(*SIDE_BY_SIDE, part), about=about)
    (sheet,) = render.comparison_sheets(comparison_table(results))
    assert sheet.title == "a on digits (test), eps 0.3"
    assert "of 4 images" in sheet.note
    assert list(zip(sheet.groups, sheet.heads)) == [
        ("", "system"),
        ("", "clean"),
        ("oblivious", "fgsm"),
        ("oblivious", "pgd-40"),
        ("oblivious", "cw"),
        ("robust accuracy", "oblivious"),
        ("paper protocol", "oblivious, any distance"),
        ("white box", "fgsm"),
        ("white box", "margin-40"),
        ("robust accuracy", "all tried"),
        ("purified", "PSNR, dB"),
        ("purified", "SSIM"),
        ("cost", "ms an image"),
        ("cost", "training PFLOP"),
        ("cost", "gradient"),
    ]
    ours, gan = (dict(zip(sheet.heads, line)) for line in sheet.lines[1:])
    assert ours["clean"] == "75.0 [30.1, 95.4]"
    assert gan["clean"] == "100.0 [34.2, 100.0] n 2"  # where it is not the table's
    assert (gan["ms an image"], gan["training PFLOP"], gan["gradient"]) == ("2,000", "0.25", "surrogate, averaged")
    assert ours["gradient"] == ""
    for said in ("paper protocol", "margin-40", "75.0 [30.1, 95.4]"):
        assert said in compare(results)


def test_two_systems_and_their_test() -> None:
    a, b = (
        OURS | {"system": s, "right_clean": [1] * 10, "right_adv": r} for s, r in (("a", [1] * 10), ("b", [0] * 10))
    )
    results = Results(frame(a, b))
    text = compare_pair(results.where(system="a"), results.where(system="b"), 120)
    assert "a on digits (test): a (first) and b (second): 10 images; p is McNemar's" in text
    assert re.search(r"oblivious +fgsm, eps 0\.3 +100\.0 % +0\.0 % +10 +0 +0\.002\n", text)
    assert "ours (first) and ours (second)" in compare_pair(frame(OURS), frame(OURS))
    more = b | PGD | {"right_clean": [1] * 4, "right_adv": [0] * 4}
    text = compare_pair(frame(a, a | PGD), frame(b | {"system": "a"}, more | {"system": "a"}), 120)
    assert "the images of both; p is" in text
    assert re.search(r"pgd-40, eps 0\.3 +100\.0 % +0\.0 % +4 +0 +0\.125 +4 *\n", text)
    # Doubts are said under the names that stand above.
    masked = frame(a | {"gradients": 10, "zero_gradients": 10, "knowledge": "white_box"})
    text = compare_pair(masked, frame(a | {"gradients": 10, "knowledge": "white_box"}), 120)
    assert "BROKEN 3 gradient-masked, first a on digits" in text
    assert "BROKEN 3 gradient-masked, second a on digits" not in text


def test_the_command_compares_the_systems_that_it_is_told(tmp_path: Path) -> None:
    two = [str(make_run(tmp_path / str(n), n=n, samples=1)) for n in (20, 10)]

    def said(*words: str) -> str:
        done = CliRunner().invoke(app, ["compare", *words])
        assert done.exit_code == 0, done.exception
        return " ".join(done.output.split())

    first = re.findall(r"conv on digits \(test\): .*?: ", said(*two))[0]
    assert first == "conv on digits (test): ours (first) and ours (second): "
    assert "undefended (first)" not in said(two[0], two[0])
    assert "ours (first) and undefended (second): 20 images" in said(
        two[0], two[0], "--system", "ours", "--system", "undefended"
    )
    for asked, wrong in ((["gone"], "no cell has system gone"), (["ours"] * 3, "not 3")):
        done = CliRunner().invoke(app, ["compare", *two, *(word for name in asked for word in ("--system", name))])
        assert re.search(wrong, str(done.exception))


def test_names_stay_whole_where_a_recipe_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["show", "table2-mnist"]).output
    about = [line for line in shown.partition("kind =")[0].splitlines() if line]
    assert all(line.startswith("# ") and len(line) <= 80 and not line.endswith("-") for line in about)
    assert "NAME-mnist" in shown
    assert '\n  "runs/median-mnist",\n' in shown  # a long list has an entry a line
    assert tomllib.loads(shown)["systems"][:2] == ["undefended", "runs/median-mnist"]


def test_two_systems_of_the_whole_ladder_fit_a_narrow_terminal() -> None:
    ladder = ("none", "transfer", "oblivious", "gray_box", "bpda", "white_box")
    ball = {"eps": 8 / 255, "linf": 8 / 255, "attack": "square-5000"}
    cells = [OURS | ball | {"knowledge": k} for k in (*ladder, "black_box")]
    lines = compare_pair(frame(*cells), frame(*cells), 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("right alone" in line for line in lines) == 1  # in one piece


def test_flags_are_said_below_a_table() -> None:
    text = table(frame(*TINY), 80, flags=[DOUBT])
    said = "DOUBT 3 gradient masked, ours on digits: up to 75 % of an image's gradients"
    assert said in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert text.index("DOUBT") < text.index("the attacker sees the undefended classifier only")
    assert "DOUBT" not in table(frame(*TINY), flags=[])
    shown = compare(frame(*TINY), style="markdown", flags=[DOUBT])
    assert "| doubt | 3 gradient masked, ours on digits | up to 75 %" in shown


@pytest.mark.parametrize("show", [table, compare])
def test_no_table_stands_without_the_flags_that_its_rows_raise(show: Any) -> None:
    # The undefended classifier's attacker breaks what the one who knows all does not.
    n = 40
    weak = OURS | {"right_clean": [1] * n, "right_adv": [0] * n}
    rows = frame(weak, weak | {"knowledge": "white_box", "right_adv": [1] * n})
    raised = flags_of(Results(rows))
    assert raised
    text = " ".join(show(rows).split())
    assert all(" ".join(render.flag_text(flag).split()) in text for flag in raised)


def test_conditions_hold_the_record_the_seed_and_the_commit() -> None:
    made = OURS | {"knowledge": "transfer", "surrogate": "vgg"}
    results = Results(frame(*TINY, made, OURS | {"system": "x" * 60}))
    found = render.conditions(
        results.readable(), {"commit": "0123abc", "versions": {"torch": "2.13.0"}}, {"commit": "9"}
    )
    values = dict(zip(found["what"], found["value"]))
    assert values["digits test: fgsm, eps 0.3"] == "FGSM(); seed 0; oblivious n 4; transfer from vgg n 4; white box n 4"
    assert values["versions"] == "torch 2.13.0"
    assert sorted(found[found["what"] == "commit"]["value"]) == ["0123abc", "9"]
    assert [v for k, v in values.items() if k.startswith("system ")] == ["x" * 60]  # whole, where it was shortened


# Formats ------------------------------------------------------------------------------------------------------------

SHEET = Sheet(
    "A & B", "in %", ["", "one", "one", "two"], ["name", "a", "b", "c"], [["x|y", "1", "2", ""], ["$z$", "3", "", "4"]]
)


def test_a_sheet_in_a_terminal() -> None:
    assert as_text(SHEET, 80) == "A & B: in %\n\n      one     two\nname  a    b  c\nx|y   1    2\n$z$   3       4\n"
    pages = as_text(SHEET, 12)
    assert pages.count("name") == 2  # the names are said again
    assert max(map(len, pages.splitlines())) <= 12
    assert as_text(SHEET, 1).count("name") == 3  # a column each, where no two fit


def test_what_names_several_lines_is_said_once_in_a_terminal() -> None:
    lines = [["ours", "oblivious", "1"], ["ours", "white box", "2"], ["theirs", "white box", "3"]]
    sheet = Sheet("A", "", [""] * 3, ["system", "attacker", "n"], lines, names=2)
    assert as_text(sheet, 80).splitlines()[3:] == [
        "ours    oblivious  1",
        "        white box  2",
        "theirs  white box  3",
    ]
    assert as_markdown(sheet).count("ours") == 2


def test_a_sheet_in_markdown() -> None:
    lines = as_markdown(SHEET).splitlines()
    assert lines[:4] == ["### A &amp; B", "", "in %", ""]
    assert lines[4:] == [
        "| name | one, a | one, b | two, c |",
        "| --- | --- | --- | --- |",
        r"| x\|y | 1 | 2 |  |",
        r"| \$z\$ | 3 |  | 4 |",
    ]


def test_a_sheet_in_html() -> None:
    text = as_html(SHEET)
    assert '<th></th><th colspan="2">one</th><th>two</th>' in text
    assert '<th scope="row">x|y</th><td>1</td><td>2</td><td></td>' in text
    assert "A &amp; B" in text


def test_a_sheet_in_latex() -> None:
    text = as_latex(SHEET)
    assert r"\caption{A \& B. in \%.}" in text
    assert r"\begin{tabular}{lrrr}" in text
    assert r" & \multicolumn{2}{c}{one} & two \\" in text
    assert r"\cmidrule(lr){2-3} \cmidrule(lr){4-4}" in text
    assert r"\$z\$ & 3 &  & 4 \\" in text
    assert [text.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == sorted(
        text.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")
    )
    assert in_latex(r"a\b~c^{d}#_") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}\{d\}\#\_"


@pytest.mark.parametrize("style", ["text", "markdown", "html", "latex"])
def test_every_style_holds_every_number(style: str) -> None:
    text = table(frame(*TINY), style=style)
    for value in re.findall(r"\d+\.\d \% \[", table(frame(*TINY))):
        assert value.replace("%", r"\%" if style == "latex" else "%") in text


def test_another_style_is_an_error_that_lists_them() -> None:
    with pytest.raises(UnknownNameError, match="markdown"):
        table(frame(*TINY), style="word")


def test_csv_keeps_every_digit_and_opens_no_formula() -> None:
    results = Results(frame(*SIDE_BY_SIDE, OURS | {"system": "=1+1", "right_adv": [1, 0, 0, 0]}))
    compared = comparison_table(results)
    read = pd.read_csv(io.StringIO(as_csv(compared)))
    assert list(read["system"]) == ["undefended", "ours", "'=1+1"]
    assert read["robust: white_box"].tolist()[:2] == compared["robust", "white_box", "accuracy"].tolist()[:2]
    assert read["white_box: margin-40 high"].iloc[1] == compared["white_box", "margin-40", "high"].iloc[1]
    assert {"clean", "clean n", "psnr", "differentiable", "eps", "norm"} <= set(read)
    tidy = accuracy_table(results)
    again = pd.read_csv(io.StringIO(as_csv(tidy)), keep_default_na=False)
    assert again["accuracy"].tolist() == tidy["accuracy"].tolist()


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


def odd_rows() -> pd.DataFrame:
    mine = {"dataset": "folder:/home/me/my photos"}
    odd = [OURS | mine | {"system": ODD[i // 4], "attack": name} for i, name in enumerate(ODD)]
    return frame(*odd, OURS | mine | {"system": ODD[9]}, BARE | mine)


@pytest.mark.parametrize("style", ["text", "markdown", "html", "latex"])
def test_odd_names_are_told_apart_and_harmless_in_every_style(style: str) -> None:
    for text in (table(odd_rows(), style=style), compare(odd_rows(), style=style)):
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
        assert "n" * 50 not in text
        assert "/home/me" not in text
        if style in ("markdown", "html"):
            assert "<script" not in text
        if style == "markdown":
            assert "$x$" not in text.replace(r"\$x\$", "")
            for part in text.split("###"):
                lines = [line for line in part.splitlines() if line[:1] == "|"]
                assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1
    assert Results(odd_rows()).readable().cells["attack"].nunique() == len(ODD) + 1  # and FGSM


def test_what_looks_alike_is_not_made_one() -> None:
    alike = ["a" * 30 + c + "b" * 30 for c in "xy"]
    found = names.readable({"system": [*alike, "undefended"], "attack": ["clean", "fgsm", "x"]}, 24)
    assert len(set(found["system"].values())) == 2
    assert "undefended" not in found["system"]
    assert found["attack"] == {"clean": "clean (2)"}  # what tables say themselves
    assert names.readable({"system": list(found["system"].values())}, 24) == {}
    assert names.renamed({"system": alike[0], "eps": 1}, found) == {"system": found["system"][alike[0]], "eps": 1}


def test_names_in_one_line_and_their_width() -> None:
    assert names.one_line("a\r\n b\u202ec\ud800") == "a bc"
    assert names.one_line("abcdefghijkl", 9) == "abcde…jkl"
    assert names.columns("日本") == 4
    assert names.columns(names.one_line("日本語" * 30, 24)) <= 24
    assert in_markdown("_a_b_ [x](y) *&<") == r"\_a_b\_ [x]\(y) \*&amp;&lt;"
    assert names.in_file_name("Ä/8", "日本") != names.in_file_name("Ä/8", "防御")
    lines = table(frame(*(cell | {"attack": "日本語"} for cell in (BARE, OURS)))).splitlines()
    begins = [line.partition(" %")[0].rpartition(" ") for line in lines if line.startswith(("clean  ", "日本語, "))]
    assert [first.strip() for first, _, _ in begins] == ["clean", "日本語, eps 0.3"]
    assert len({names.columns(first) for first, _, _ in begins}) == 1


def test_splits_and_attackers_as_people_say_them() -> None:
    assert [names.split_name(s) for s in ("test", "test:100@0", "a:b")] == ["test", "100 of test", "a:b"]
    assert [names.attacker_name(k) for k in ("none", "bpda", "other")] == ["noise", "BPDA", "other"]
