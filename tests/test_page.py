"""The report: whole, self-contained, remade byte for byte, and honest on its first screen."""

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
from PIL import Image

from made_rows import frame
from made_runs import MARGINS, make_run
from unperturb.results import Results, robust_accuracy
from unperturb.results.embedded import LARGEST, flag_page, image_data
from unperturb.results.flags import Flag
from unperturb.results.page import write_report
from unperturb.results.samples import read_samples
from unperturb.results.schema import read_rows
from unperturb.threat_models import ThreatModel

TINY = (
    {"right_clean": [1, 1, 1, 0], "right_adv": [0, 0, 1, 0]},
    {"right_clean": [1, 1, 1, 0], "right_adv": [0, 1, 0, 0], "attack": "pgd-40", "attack_repr": "PGD()"},
    {"system": "ours", "right_clean": [1, 1, 0, 1], "right_adv": [1, 1, 1, 0]},
    {"system": "ours", "right_clean": [1, 1, 0, 1], "right_adv": [1, 0, 1, 1], "attack": "pgd-40"},
    {"system": "ours", "right_clean": [1, 1, 0, 1], "right_adv": [0, 0, 0, 1], "knowledge": "white_box"},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run", samples=1)


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_report(run, tmp_path_factory.mktemp("page") / "one", flags=[])


def page_of(*cells: dict[str, Any], out: Path, flags: Any = (), **options: Any) -> str:
    return write_report(frame(*cells), out, flags=flags, **options)["page"].read_text(encoding="utf-8")


def front(page: str) -> str:
    """What is read first: up to the pictures."""
    return page[page.index("<h1>") : page.index("<figure")]


def test_the_report_is_whole_self_contained_and_remade_byte_for_byte(
    written: dict[str, Path], run: Path, tmp_path: Path
) -> None:
    again = write_report([run], tmp_path, flags=[])
    assert written.keys() == again.keys()
    for name, path in written.items():
        assert path.read_bytes() == again[name].read_bytes(), name
        assert again[name] == tmp_path / ("report.html" if name == "page" else name)
    kinds = {name.partition("-")[0] for name in written if name.startswith("figures/")}
    assert kinds == {"figures/accuracy", "figures/ladder", "figures/restored", "figures/confidence"}
    text = written["page"].read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*(?!["']data:)|https?://|@import|url\(|<script|<link""", text)
    # The ladder, wide and narrow, and the accuracies; of each attack of an attacker one image in three views.
    attackers = len(set(MARGINS["ours"]))
    cells = len([d for d in (run / "rows").iterdir() if ".ours." in d.name])
    assert attackers < cells
    assert text.count("data:image/webp;base64,") == 3 + 3 * cells
    for said in ("every attacker tried", "0123abc", "torch 2.13.0", "CW()", "seed 0", "n 30"):
        assert said in text


def test_the_first_screen_is_robust_accuracy(written: dict[str, Path], run: Path) -> None:
    text = front(written["page"].read_text(encoding="utf-8"))
    results = Results.read(run)
    for system, knowledge in (("undefended", "white_box"), ("ours", "oblivious"), ("ours", "white_box")):
        found = robust_accuracy(results, ThreatModel("linf", 0.3, knowledge), system=system)
        assert f"{100 * found.accuracy:.1f} %" in text
        assert f"[{100 * found.low:.1f}, {100 * found.high:.1f}], n {found.n}" in text


def test_tables_are_numbers_in_csv_and_to_be_read_in_markdown(written: dict[str, Path], run: Path) -> None:
    names = {name for name in written if name.startswith("tables/")}
    both = {
        f"tables/{k}.{e}" for k in ("accuracy", "robust", "comparison", "quality", "conditions") for e in ("csv", "md")
    }
    assert both == names
    table = pd.read_csv(written["tables/robust.csv"])
    found = robust_accuracy(Results.read(run), ThreatModel("linf", 0.3), system="ours")
    (line,) = table[(table["system"] == "ours") & (table["knowledge"] == "white_box")].to_dict("records")
    assert (line["n"], line["accuracy"], line["low"]) == (found.n, found.accuracy, pytest.approx(found.low))
    assert f"{100 * found.accuracy:.1f} %" in written["tables/robust.md"].read_text(encoding="utf-8")


def test_a_report_of_rows_finds_its_pictures_by_their_runs(run: Path, tmp_path: Path) -> None:
    rows = read_rows(run)
    rows.attrs.clear()
    assert not any("restored" in name for name in write_report(rows, tmp_path, flags=[]))
    rows.attrs["runs"] = [str(run)]
    assert any("restored" in name for name in write_report(Results(rows), tmp_path, flags=[]))


def test_the_first_screen_does_not_make_the_naive_claim(tmp_path: Path) -> None:
    text = front(page_of(*TINY[:4], out=tmp_path))
    assert "Nobody who knows of it was tried" in text
    assert "not tried" in text
    knowing = front(page_of(*TINY[:2], TINY[4], out=tmp_path))
    assert '<b class="value adaptive">25.0 %</b> stand under every attack by attackers who know of it' in knowing
    text = front(page_of(*TINY, out=tmp_path))
    assert "Nobody who knows" not in text
    # Oblivious attacks leave image 0, the white box image 3: together they leave none, which neither does alone.
    assert '<b class="value oblivious">25.0 %</b>' in text
    assert '<b class="value adaptive">0.0 %</b>' in text


def test_a_range_over_classifiers_is_a_range(tmp_path: Path) -> None:
    other = [cell | {"classifier": "b", "right_clean": [1] * 4, "right_adv": [1] * 4} for cell in TINY]
    text = front(page_of(*TINY, *other, out=tmp_path))
    assert "25.0 to 100.0 %" in text
    assert "0.0 to 100.0 %" in text


def test_a_system_that_keeps_less_than_none_is_said_first(tmp_path: Path) -> None:
    keeps = {"right_clean": [1] * 4, "right_adv": [1, 1, 0, 0]}
    worse = keeps | {"system": "ours", "right_adv": [1, 0, 0, 0]}
    text = front(page_of(keeps, worse, out=tmp_path))
    assert "ours 25.0 % against 50.0 % (oblivious; the intervals overlap)." in text
    assert text.index("Worse than no defense") < text.index("stand under every attack")
    assert "Worse" not in page_of(keeps, worse | {"right_adv": [0, 1, 1, 0]}, out=tmp_path)
    # An attack that the undefended was not given does not count against the system.
    assert "Worse" not in page_of(keeps, worse | {"attack": "strong"}, out=tmp_path)
    assert "(white box" in front(page_of(keeps, worse | {"knowledge": "white_box"}, out=tmp_path))
    # Nor do as many, but other images.
    assert "Worse" not in page_of(keeps, worse | {"index": np.arange(4) + 7}, out=tmp_path)


def test_each_line_says_how_many_images_it_is_of(tmp_path: Path) -> None:
    few = {"system": "few", "right_clean": [1, 1], "right_adv": [1, 0]}
    cells = [*TINY, TINY[2] | few, TINY[4] | few]
    found = write_report(frame(*cells), tmp_path, flags=[])
    table = pd.read_csv(found["tables/robust.csv"])
    assert set(zip(table["system"], table["n"])) == {("undefended", 4), ("ours", 4), ("few", 2)}
    text = front(found["page"].read_text(encoding="utf-8"))
    sizes = [re.findall(r"\], n (\d+)", line) for line in text.split("<tr>") if ">few<" in line]
    assert ["4", "2", "2"] in sizes  # the undefended one beside it saw four
    assert "| few | 2 |" in found["tables/robust.md"].read_text(encoding="utf-8")
    assert "50.0 [9.5, 90.5] n 2" in found["tables/comparison.md"].read_text(encoding="utf-8")


def test_runs_of_other_numbers_of_images_are_read_together(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run-{n}", n=n, samples=1) for n in (30, 10)]
    found = write_report(runs, tmp_path / "out", flags=[])
    table = pd.read_csv(found["tables/robust.csv"])
    assert set(zip(table["split"], table["n"])) == {("test:30@0", 30), ("test:10@0", 10)}
    side_by_side = pd.read_csv(found["tables/comparison.csv"])
    assert set(side_by_side["clean n"]) == {30}  # one split: the ten are among the thirty


def test_flags_stand_beside_the_numbers_that_they_are_against(tmp_path: Path) -> None:
    flags = [
        Flag(4, "black-box-wins", "broken", "ours", "queries <win>", dataset="digits", classifiers=("a",)),
        Flag(2, "probabilities", "doubt", "theirs", "elsewhere", dataset="mnist"),
    ]
    other = [cell | {"system": "theirs"} for cell in TINY[2:]]
    text = front(page_of(*TINY, *other, out=tmp_path, flags=flags))
    assert "2 flags raised" in text
    assert "queries &lt;win&gt;" in text
    rows = dict(re.findall(r'<th scope="row">(\w+)<br>(.*?)</th>', text))
    assert "broken" in rows["ours"]
    assert "doubt" not in rows["theirs"]  # its flag is of another data set
    kept = pd.read_csv(tmp_path / "tables" / "flags.csv")
    assert kept["name"].tolist() == ["black-box-wins", "probabilities"]
    assert "No flag was raised" in page_of(*TINY, out=tmp_path / "none")


def test_without_flags_of_ones_own_all_are_raised(tmp_path: Path) -> None:
    better = TINY[4] | {"right_adv": [1, 1, 0, 1]}  # the white box leaves what who knows less turned
    page = write_report(frame(*TINY[:4], better), tmp_path)["page"].read_text(encoding="utf-8")
    assert "which knows more, does not break" in front(page)
    assert f"<b>What to do.</b> {dict(flag_page('knows-more-does-worse'))['What to do']}" in front(page)


def test_a_report_of_the_undefended_alone_and_of_odd_names(tmp_path: Path) -> None:
    text = page_of(*TINY[:2], out=tmp_path / "bare")
    assert "<table" not in text[text.index("<h1>") : text.index("<figure")]
    mine = {"dataset": "folder:/home/me/my photos"}
    odd = ("<b>ours</b>", "a|b", "$x$", "a\nb", "\x1b[31m", "日本語", "n" * 300, "=1+1", "../up")
    cells = [TINY[2] | mine | {"system": odd[i // 3], "attack": name} for i, name in enumerate(odd)]
    found = write_report(
        frame(*cells, TINY[0] | mine), tmp_path, title="<b>mine</b>", note="one & two\nthree", flags=[]
    )
    page = found["page"].read_text(encoding="utf-8")
    assert "<b>ours" not in page
    assert "&lt;b&gt;ours" in page
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", page)
    assert "<title>&lt;b&gt;mine&lt;/b&gt;</title>" in page
    assert "<p>one &amp; two</p>\n<p>three</p>" in page
    assert "n" * 50 not in page[: page.index("Conditions")]
    assert page.count("/home/me") == 1  # whole among the conditions
    assert all(re.fullmatch(r"(tables/|figures/)?[a-z0-9.-]+", name) for name in found)


def test_cost_is_drawn_where_there_are_systems_enough(tmp_path: Path) -> None:
    others = [TINY[2] | {"system": name, "seconds_purify": 0.001} for name in ("b", "c")]
    found = write_report(frame(*TINY, *others), tmp_path, flags=[])
    assert "figures/cost-digits.png" in found
    assert "Cost on digits" in found["page"].read_text(encoding="utf-8")


def test_of_many_systems_no_sentence_is_said_and_tables_are_folded(tmp_path: Path) -> None:
    others = [TINY[2] | {"system": name} for name in ("b", "c", "d")]
    few, many = (page_of(*TINY, *others[:n], out=tmp_path / str(n)) for n in (2, 3))
    assert ("stand under every attack by" in few, "stand under every attack by" in many) == (True, False)
    assert ("<details open>" in few, "<details open>" in many) == (True, False)
    assert few.count("<h2>Systems side by side") == many.count("<h2>Systems side by side") == 1


# Strips -------------------------------------------------------------------------------------------------------------


def opened(address: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
        return np.asarray(picture.convert("RGB"))


def test_small_images_are_kept_to_the_pixel_and_large_ones_made_small(run: Path) -> None:
    _, tensors = read_samples(run)[0]
    assert np.array_equal(opened(image_data(tensors["adversarial"][0]))[:, :, 0], tensors["adversarial"][0, 0].numpy())
    assert opened(image_data(torch.zeros(3, 400, 300, dtype=torch.uint8))).shape == (LARGEST, LARGEST * 3 // 4, 3)


def test_strips_are_open_of_who_knows_least_and_most_and_systems_share_images(tmp_path: Path) -> None:
    systems = dict.fromkeys(("ours", "theirs"), MARGINS["ours"]) | {"undefended": MARGINS["undefended"]}
    attacks = [("fgsm", "FGSM", 0.3, ("oblivious", "bpda", "white_box")), ("cw", "CW", float("nan"), ("oblivious",))]
    folder = make_run(tmp_path / "run", systems=systems, attacks=attacks, samples=1)
    page = write_report(folder, tmp_path / "out", flags=[])["page"].read_text(encoding="utf-8")
    looks = page[page.index("What it looks like") : page.index("Systems side by side")]
    seen, folded = looks.split("<details>")
    assert re.findall("<h3>(.*?)</h3>", seen) == ["fgsm, eps 0.3, oblivious", "fgsm, eps 0.3, white box"]
    assert re.findall("<h3>(.*?)</h3>", folded) == ["cw, oblivious", "fgsm, eps 0.3, BPDA"]
    lines = re.findall('<th scope="row">(.*?)</th>', seen)
    whose = ["attacked, by who knows ours", "ours", "attacked, by who knows theirs", "theirs"]
    assert [line for line in lines if line.startswith("attacked, by")] == whose[::2]


def test_every_table_slides_in_its_own_box_or_becomes_cards(written: dict[str, Path]) -> None:
    text = written["page"].read_text(encoding="utf-8")
    found = re.findall(r'(<div class="scroll">)?\s*(<table[^>]*>)', text)
    assert len(found) >= 4
    assert all(box or "cards" in table for box, table in found)


def test_the_report_loads_nothing_heavy_before_it_is_used() -> None:
    heavy = {"torch", "pandas", "matplotlib", "jinja2", "scipy", "pyarrow", "PIL"}
    modules = ", ".join(f"unperturb.results.{name}" for name in ("page", "card", "figures", "cost_figure"))
    code = f"import sys, {modules}; print(sorted({heavy!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
