"""The card: its numbers are robust accuracy's own, its flags stand beside them, and it is the same in three formats."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from made_rows import frame
from made_runs import make_run
from unperturb import runs
from unperturb.results import Results, paper_accuracy, robust_accuracy
from unperturb.results.card import Card
from unperturb.results.embedded import flag_page
from unperturb.results.flags import Flag, flags_of
from unperturb.threat_models import KNOWLEDGE, ThreatModel

TINY = (
    {"right_clean": [1, 1, 1, 0], "right_adv": [0, 0, 1, 0]},
    {"system": "ours", "right_clean": [1, 1, 1, 1], "right_adv": [1, 1, 1, 0]},
    {"system": "ours", "right_clean": [1, 1, 1, 1], "right_adv": [1, 0, 0, 1], "knowledge": "white_box"},
)
BROKEN = Flag(4, "black-box-wins", "broken", "ours", "3 of 30 images fall to queries", {"n": 30})
NOTE = Flag(5, "autograd-inside", "note", "ours", "one backward pass inside <b>forward</b>", {"calls": 1})
SETTINGS = {"budget": "quick", "attacks": [{"name": "pgd", "eps": 0.3}, {"name": "cw"}], "n": 30, "restarts": [1, 2]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("card"))


@pytest.fixture(scope="module")
def card(run: Path) -> Card:
    return Card(Results.read(run), flags=[BROKEN, NOTE], settings=SETTINGS)


def tiny(*more: dict[str, Any]) -> Results:
    return Results(frame(*TINY, *more))


def test_the_headline_is_robust_accuracy(card: Card, run: Path) -> None:
    results, data = Results.read(run), card.data
    assert data["system"] == "ours"  # the one that is defended
    (bare,) = data["undefended"]
    assert bare["system"] == "undefended"
    for system, of in (("ours", data["result"]), ("undefended", bare)):
        whole = robust_accuracy(results, ThreatModel("linf", 0.3), system=system)
        oblivious = robust_accuracy(results, ThreatModel("linf", 0.3, "oblivious"), system=system)
        paper = paper_accuracy(results, system, eps=0.3)
        for name, found in (("robust", whole), ("oblivious", oblivious), ("paper", paper)):
            assert [of[name][k] for k in ("accuracy", "low", "high")] == [
                round(v, 6) for v in (found.accuracy, found.low, found.high)
            ]
        assert of["n"] == whole.n
        assert of["clean"]["accuracy"] == round(whole.clean, 6)
    assert data["ladder"]["ours"][-1]["accuracy"] == data["result"]["robust"]["accuracy"]
    at = data["against_eps"]["eps"].index(0.3)
    assert data["against_eps"]["accuracy"]["ours"]["white_box"][at] == data["result"]["robust"]["accuracy"]
    assert data["threat_model"] == {"norm": "linf", "eps": 0.3, "knowledge": "white_box"}


def test_a_threat_model_of_ones_own(run: Path) -> None:
    results = Results.read(run)
    data = Card(results, flags=[], threat_model=ThreatModel("linf", 0.5, "oblivious")).data
    expected = robust_accuracy(results, ThreatModel("linf", 0.5, "oblivious"), system="ours")
    assert data["result"]["robust"]["accuracy"] == round(expected.accuracy, 6)
    text = Card(results, flags=[], threat_model=ThreatModel("linf", 0.5, "oblivious")).markdown()
    assert "**Robust accuracy, Linf 0.5, oblivious: " in text
    assert "attack was tried" not in text  # nobody asked for more


@pytest.mark.parametrize("style", ["html", "markdown"])
def test_every_format_says_the_same(card: Card, style: str) -> None:
    text = getattr(card, style)()
    data = json.loads(card.json())
    assert data == card.data
    for name in ("clean", "oblivious", "robust", "paper"):
        for of in (data["result"], *data["undefended"]):
            assert f"{100 * of[name]['accuracy']:.1f} %" in text
            assert f"[{100 * of[name]['low']:.1f}, {100 * of[name]['high']:.1f}]" in text
    for said in ("Linf 0.3", "budget", "quick", "n 30", "0.4 ms", "0.05 PFLOP", "60 s", "0123abc", "torch 2.13.0"):
        assert said in text
    for attack in data["attacks"]:
        assert attack["name"] in text
        record = attack["record"]
        assert (record if style == "markdown" else record.replace("'", "&#39;")) in text
    for flag in data["flags"]:
        assert flag["severity"] in text
        assert flag["meaning"] in text
    assert "name pgd, eps 0.3" in text
    assert "1, 2" in text


def test_flags_stand_beside_the_headline_and_others_do_not(run: Path) -> None:
    results = Results.read(run)
    others = [Flag(1, "random-answers", "broken", "theirs", "theirs only")]
    others.append(Flag(1, "random-answers", "broken", "ours", "elsewhere only", dataset="mnist"))
    others.append(Flag(1, "random-answers", "broken", "ours", "of another net", dataset="digits", classifiers=("x",)))
    mine = Flag(2, "probabilities", "doubt", "ours", "of this net", dataset="digits", classifiers=("x", "conv"))
    card = Card(results, flags=[BROKEN, *others, mine])
    assert [flag["says"] for flag in card.data["flags"]] == [BROKEN.says, mine.says]
    page = card.html()
    top = page[page.index("<h1>") : page.index("The ladder")]
    assert BROKEN.says in top
    assert 'class="number broken"' in top
    assert "not what it seems" in top
    honest = Card(results, flags=[]).html()
    assert "No flag was raised" in honest
    assert "not what it seems" not in honest
    assert 'class="number broken"' not in honest


def test_without_flags_of_ones_own_all_are_raised() -> None:
    # White box leaves image 0 standing that who knows less turns.
    masked = tiny({"system": "theirs", "right_clean": [1] * 4, "right_adv": [0, 0, 0, 0], "knowledge": "bpda"}, {
        "system": "theirs", "right_clean": [1] * 4, "right_adv": [1] * 4, "knowledge": "white_box"
    })  # fmt: skip
    expected = [flag.name for flag in flags_of(masked) if flag.system == "theirs"]
    assert expected
    assert [flag["name"] for flag in Card(masked, system="theirs").data["flags"]] == expected


def test_the_same_rows_give_the_same_bytes_but_for_times(card: Card, run: Path, tmp_path: Path) -> None:
    again = Card(Results.read(run), flags=[BROKEN, NOTE], settings=SETTINGS)
    written = [made.write(tmp_path / name) for made, name in ((card, "a"), (again, "b"))]
    assert written[0].keys() == written[1].keys() >= {"html", "md", "json", "card-ladder", "card-eps"}
    for name, path in written[0].items():
        assert path.read_bytes() == written[1][name].read_bytes(), name
    later = tmp_path / "later"
    shutil.copytree(run, later)
    environment = runs.read_json(later / "environment.json")
    runs.write_json(later / "environment.json", {**environment, "date": "2021-06-01"})
    about = runs.read_json(later / "systems.json")
    runs.write_json(later / "systems.json", {k: {**v, "seconds": 99.0} for k, v in about.items()})
    moved = Card(Results.read(later), flags=[BROKEN, NOTE], settings=SETTINGS)
    assert moved.data != card.data
    assert {k: v for k, v in moved.data.items() if k != "times"} == {k: v for k, v in card.data.items() if k != "times"}


def test_the_page_asks_nothing_of_the_network(card: Card) -> None:
    page = card.html()
    assert not re.search(r"""(src|href)\s*=\s*(?!["']data:)|https?://|@import|url\(|<script|<link""", page)
    assert page.count("data:image/webp;base64,") == 2 * 2 + 2 * 3 * 3  # charts; attackers, images and views
    assert 'name="viewport"' in page
    tables = re.findall(r'(<div class="scroll">)?\s*<table class="([^"]*)"', page)
    assert all(box or kind in ("headline", "plain") for box, kind in tables)  # those two are fixed to the page


def test_markdown_tables_keep_their_columns(card: Card, tmp_path: Path) -> None:
    text = card.write(tmp_path)["md"].read_text(encoding="utf-8")
    for block in text.split("\n\n"):
        lines = [line for line in block.strip().splitlines() if line.startswith("|")]
        if lines:
            assert len(lines) == len(block.strip().splitlines())
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
            assert set(lines[1]) <= {"|", "-", " "}
    for picture in re.findall(r"\]\(([^)]+)\)", text):
        assert (tmp_path / picture).exists()


def test_samples_are_of_the_strongest_attack_within_the_budget(card: Card) -> None:
    oblivious, white_box = card.data["samples"]
    assert (oblivious["attacker"], oblivious["attack"]) == ("oblivious", "fgsm, eps 0.3")  # none turns more within 0.3
    assert white_box["attacker"] == "white box"
    for sample in card.data["samples"]:
        assert len(sample["images"]) == 3
        for image in sample["images"]:
            assert [view["what"] for view in image["views"]] == ["clean", "adversarial", "restored"]
            assert all(0 <= view["confidence"] <= 1 for view in image["views"])
            assert all(view["right"] == (view["class"] == image["label"]) for view in image["views"])


def test_a_card_of_what_is_undefended_speaks_of_no_defense(run: Path) -> None:
    card = Card(Results.read(run), system="undefended", flags=[])
    assert card.data["undefended"] == []
    assert {attack["attacker"] for attack in card.data["attacks"]} == {"noise", "transfer", "direct"}
    (sample,) = card.data["samples"]
    assert [view["what"] for view in sample["images"][0]["views"]] == ["clean", "adversarial"]
    text = card.markdown()
    assert "oblivious attackers" not in text
    assert "(not tried)" not in text


def test_what_nobody_tried_is_said() -> None:
    results = Results(frame(*TINY[:2]))
    card = Card(results, flags=[])
    assert not card.data["adaptive"]
    for text in (card.html(), card.markdown()):
        assert "Nobody who knows of the system attacked it" in text
        assert "not tried" in text
        assert "Robust accuracy, Linf 0.3, oblivious" in text
    assert "not tried" not in Card(tiny(), flags=[]).html().partition("The ladder")[0]


NOISE = {"attack": "noise", "attack_repr": "Noise()", "knowledge": "none"}
QUERIES = {"attack": "square-300", "attack_repr": "Square()", "knowledge": "black_box"}


def test_what_was_asked_by_queries_alone_is_no_white_box() -> None:
    """What gives no gradient meets noise and queries only."""
    cells = [TINY[0] | NOISE | {"right_adv": [1, 1, 0, 0]}, TINY[0] | QUERIES | {"right_adv": [0, 1, 0, 0]}]
    card = Card(Results(frame(*cells)), flags=[])
    assert card.data["result"]["tried"] == ["black_box"]
    assert card.data["result"]["robust"]["accuracy"] == 0.25
    for text in (card.html(), card.markdown()):
        assert "Robust accuracy, Linf 0.3, black box" in text
        assert "No white box attack was tried: it may leave less." in text
        assert text.count("white box") == 1
        assert "up to black box" in text
    lines = card.markdown().partition("## The ladder")[2].partition("##")[0]
    assert [line.split("|")[1].strip() for line in lines.splitlines() if line.startswith("|")][2:] == [
        "clean",
        "noise",
        "black box",
    ]
    # The undefended net beside a defended one is no better off.
    beside = Card(Results(frame(*cells, *(cell | {"system": "ours"} for cell in cells), TINY[2])), flags=[])
    assert "Linf 0.3, white box" in beside.markdown()
    (bare,) = beside.data["undefended"]
    assert (bare["tried"], bare["oblivious"]) == (["black_box"], None)
    assert "25.0 % [4.6, 69.9], up to black box |" in beside.markdown()


def test_of_noise_alone_nothing_is_said_that_an_attacker_left() -> None:
    card = Card(Results(frame(*(cell | NOISE for cell in TINY[:2]))), flags=[])
    assert (card.data["adaptive"], card.data["result"]["oblivious"]) == (False, None)
    assert not card.data["undefended"][0]["adaptive"]
    text = card.markdown()
    assert "Linf 0.3, noise" in text
    assert "| oblivious attackers | not tried | not tried |" in text
    assert "| every attacker tried | not tried | not tried |" in text


def test_systems_of_other_numbers_of_images_say_their_own() -> None:
    few = {"system": "ours", "right_clean": [1, 1], "right_adv": [1, 0], "knowledge": "white_box"}
    card = Card(Results(frame(TINY[0], few)), flags=[])
    assert '<th scope="col">undefended <small>n 4</small></th>' in card.html()
    assert "| accuracy under | ours | undefended, n 4 |" in card.markdown()
    assert "undefended <small>" not in Card(tiny(), flags=[]).html()


def test_a_number_is_struck_out_where_it_can_be_too_high() -> None:
    none_left = tiny(TINY[2] | {"attack": "pgd-40", "right_adv": [0, 0, 0, 0]})
    for results, left in ((tiny(), 0.25), (none_left, 0.0)):
        card = Card(results, flags=[BROKEN])
        assert card.data["result"]["robust"]["accuracy"] == left
        assert ('class="number broken"' in card.html()) == ("not what it seems" in card.html()) == (left > 0)


def test_accuracy_against_eps_is_shown_where_there_are_several(card: Card, tmp_path: Path) -> None:
    one = Card(tiny(), flags=[])
    small = [cell | {"eps": 0.1, "linf": 0.1, "attack": "fgsm-small"} for cell in TINY]
    two = Card(tiny(*small), flags=[])
    free = Card(tiny(TINY[2] | {"eps": float("nan"), "attack": "cw", "attack_repr": "CW()"}), flags=[])
    for of, name in ((one, "one"), (two, "two"), (free, "free")):
        shown = name != "one"
        written = of.write(tmp_path / name)
        assert ("card-eps" in written, of.data["against_eps"] is not None) == (shown, shown)
        assert ("Accuracy against eps" in of.html(), "Accuracy against eps" in of.markdown()) == (shown, shown)


def test_what_a_flag_means_is_on_the_card(card: Card) -> None:
    page = card.html()
    assert page.count("<details><summary>What to do</summary>") == 2
    assert "docs/" not in page.partition("The ladder")[0]
    # From docs/flags/black-box-wins.md, with its code as code.
    for name in ("black-box-wins", "autograd-inside"):
        said = dict(flag_page(name))
        assert list(said) == ["When raised", "What it means", "What to do", "Source"]
        assert said["What to do"].replace("`", "") in re.sub("</?code>", "", page)
        assert said["What to do"] in card.markdown()
    assert flag_page("no-such-flag") == []


def test_a_random_system_has_a_mean_and_a_worst() -> None:
    draws = [TINY[1] | {"draw": i, "right_adv": right} for i, right in enumerate(([1, 1, 0, 0], [1, 0, 1, 0]))]
    card = Card(Results(frame(*draws)), flags=[])
    of = card.data["result"]
    assert (of["draws"], of["n"], of["robust"]["accuracy"], of["worst"]["accuracy"]) == (2, 4, 0.5, 0.25)
    assert "mean of 2 draws; right in all of them are 25.0 %" in card.markdown()


def test_which_system_is_meant_must_be_clear() -> None:
    two = tiny(TINY[1] | {"system": "theirs"})
    with pytest.raises(ValueError, match="say which: undefended, ours, theirs"):
        Card(two, flags=[])
    assert Card(two, system="theirs", flags=[]).data["system"] == "theirs"
    with pytest.raises(ValueError, match="no system 'gone'"):
        Card(two, system="gone", flags=[], threat_model=ThreatModel("linf", 0.3))
    free = Results(frame(TINY[1] | {"eps": float("nan"), "attack": "cw", "attack_repr": "CW()"}))
    with pytest.raises(ValueError, match="had a budget"):
        Card(free, flags=[])
    assert Card(free, flags=[], threat_model=ThreatModel("linf", 0.3)).data["result"]["robust"]["accuracy"] == 0.75


def test_names_from_outside_do_no_harm(tmp_path: Path) -> None:
    name, net = "<script>alert(1)</script>|$x$", "n" * 300
    odd = [cell | {"classifier": net} for cell in TINY]
    odd = [cell | ({"system": name} if "system" in cell else {}) for cell in odd]
    flag = Flag(4, "black-box-wins", "broken", name, "<img src=x> | $y$", {})
    card = Card(Results(frame(*odd)), system=name, flags=[flag], settings={"<u>": "a|b"})
    written = card.write(tmp_path)
    page, text = (written[k].read_text(encoding="utf-8") for k in ("html", "md"))
    assert not re.search("<script|<img src=x|<u>", page)
    assert not re.search(r"<script|<img|<u>|(?<!\\)\$x", text)
    assert len(card.data["flags"]) == 1
    assert set(KNOWLEDGE) >= {attack["knowledge"] for attack in card.data["attacks"]}
    assert net in text  # whole among the settings
    assert net not in page[: page.index("Settings")]
