"""Results: what follows from rows alone, ordered once, whatever lies beside them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from made_rows import columns, frame
from unperturb.results import Results, schema
from unperturb.results.results import Block

BARE = {"system": "net", "defended": False, "right_clean": [1, 1, 1, 0], "right_adv": [0, 0, 1, 0]}
OURS = {"system": "ours", "right_clean": [1, 1, 0, 1], "right_adv": [1, 1, 1, 0]}


def test_cells_stand_in_the_order_of_reading() -> None:
    rows = frame(
        OURS | {"knowledge": "white_box"},
        OURS | {"attack": "square", "knowledge": "black_box"},
        OURS | {"attack": "pgd-40", "attack_repr": "PGD()"},
        OURS,
        BARE | {"classifier": "b"},
        BARE,
    )
    cells = Results(rows).cells
    assert list(zip(cells["classifier"], cells["system"], cells["knowledge"], cells["attack"])) == [
        ("a", "net", "oblivious", "fgsm"),  # what is undefended first, by whatever name
        ("a", "ours", "oblivious", "fgsm"),
        ("a", "ours", "oblivious", "pgd-40"),
        ("a", "ours", "black_box", "square"),
        ("a", "ours", "white_box", "fgsm"),
        ("b", "net", "oblivious", "fgsm"),
    ]
    assert list(cells["name"])[:3] == ["fgsm, eps 0.3", "fgsm, eps 0.3", "pgd-40, eps 0.3"]


def test_blocks_and_systems_in_the_order_that_they_were_asked_for() -> None:
    rows = frame(BARE | {"classifier": "b"}, *(OURS | {"system": name} for name in "xyz"), BARE)
    about = {("digits", name): {} for name in ("z", "net", "x")}
    results = Results(rows, about=about)
    assert results.blocks == [Block("digits", "test", "b"), Block("digits", "test", "a")]
    assert results.systems == {results.blocks[0]: ["net"], results.blocks[1]: ["net", "z", "x", "y"]}


def test_two_records_of_one_name_are_numbered_and_never_pooled() -> None:
    again = OURS | {"attack_repr": "FGSM(loss='margin')", "right_adv": [0, 0, 0, 1]}
    cells = Results(frame(OURS, again, again | {"eps": 0.1})).cells
    assert sorted(zip(cells["short"], cells["name"])) == [
        ("fgsm", "fgsm, eps 0.1"),
        ("fgsm", "fgsm, eps 0.3"),
        ("fgsm #2", "fgsm, eps 0.3 #2"),
    ]


def test_outcomes_are_one_per_cell_draw_and_image() -> None:
    seen = {
        "gradients": [10, 10, 0, -1],
        "zero_gradients": [0, 4, 0, -1],
        "made_by": ["", "", "pgd", ""],
        "made_with": ["", "", "oblivious", ""],
        "pred_pure_adv_8bit": [1, 2, 1, -2],
        "linf": [0.1, 0.2, 0.3, 0.4],
        "l2": 1.5,
        "l0": 7,
        "draw": 3,
    }
    results = Results(frame(OURS | seen, BARE))
    mine = results.outcomes[results.outcomes["cell"] == 1]
    assert mine["index"].tolist() == [0, 1, 2, 3]
    assert mine["draw"].tolist() == [3] * 4
    assert mine["clean_right"].tolist() == [True, True, False, True]
    assert mine["right"].tolist() == [True, True, True, False]
    assert mine["right_8bit"].tolist()[:3] == [True, False, True]
    assert mine["right_8bit"].isna().tolist() == [False, False, False, True]
    assert mine["inherited"].tolist() == [False, False, True, False]
    assert mine["made_with"].tolist() == ["", "", "oblivious", ""]
    assert mine["zero_gradients"].tolist()[:2] == [0, 0.4]
    assert mine["zero_gradients"].isna().tolist() == [False, False, True, True]
    assert mine["linf"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (mine["l2"].iloc[0], mine["l0"].iloc[0]) == (1.5, 7)


def test_where_keeps_cells_and_says_what_there_is() -> None:
    free = OURS | {"attack": "cw", "attack_repr": "CW()", "eps": np.nan}
    results = Results(
        frame(BARE, OURS, free, OURS | {"knowledge": "white_box"}), about={("digits", "ours"): {"pflop": 2}}
    )
    assert len(results.where(system="ours").cells) == 3
    assert list(results.where(system="ours", knowledge=["none", "white_box"]).cells["knowledge"]) == ["white_box"]
    assert list(results.where(eps=None).cells["attack"]) == ["cw"]
    assert len(results.where(eps=0.3).cells) == 3  # as float32 has it
    assert len(results.where(eps=(0.3, None), defended=True).cells) == 3
    assert results.where(system="ours").about("ours") == {"pflop": 2}
    with pytest.raises(ValueError, match="no cell has system theirs; there are: net, ours"):
        results.where(system="theirs")
    with pytest.raises(ValueError, match="cells have no 'colour'; they have dataset, split"):
        results.where(colour="red")


def test_parts_of_a_split_are_put_together_under_its_name() -> None:
    one, other = OURS | {"split": "test:4@0"}, OURS | {"split": "test:5@0", "index": np.arange(3, 7)}
    results = Results(frame(one, other))
    assert len(results.blocks) == 2
    whole = results.whole_splits()
    assert whole.blocks == [Block("digits", "test", "a")]
    assert whole.outcomes["index"].tolist() == list(range(7))  # image 3, that both have, once
    assert not whole.outcomes["right"].iloc[3]  # as the first run had it


def test_the_budgets_of_a_block_that_of_most_cells_first() -> None:
    cells = [OURS | {"attack": f"a{i}", "eps": eps} for i, eps in enumerate((0.1, 8 / 255, 8 / 255, 0.2))]
    far = OURS | {"norm": "l2", "eps": 3.0}
    results = Results(frame(*cells, far, OURS | {"attack": "cw", "eps": np.nan}))
    (block,) = results.blocks
    budgets = results.budgets(block)
    assert [norm for norm, _ in budgets] == ["linf", "linf", "linf", "l2"]
    assert [eps for _, eps in budgets] == pytest.approx([8 / 255, 0.2, 0.1, 3])


def test_what_is_known_of_a_system_besides_follows_its_name() -> None:
    long = "ours" * 30
    about = {("folder:/home/me/photos", long): {"pflop": 1.0}}
    rows = frame(OURS | {"dataset": "folder:/home/me/photos", "system": long})
    results = Results(rows, about=about, probes={("", "", long): {"seconds": 1}})
    short = results.readable(12)
    (name,) = short.systems[short.blocks[0]]
    assert short.blocks[0].dataset == "photos"
    assert len(name) == 12
    assert short.about(name) == {"pflop": 1.0}
    assert short.probe(name) == {"seconds": 1}
    assert short.names == {"dataset": {"photos": "folder:/home/me/photos"}, "system": {name: long}}
    assert short.readable(6).names["system"].popitem()[1] == long  # however often it is shortened
    assert results.readable().readable().names == results.readable().names


def test_several_data_sets_have_systems_of_the_same_name() -> None:
    about = {("digits", "ours"): {"pflop": 1}, ("mnist", "ours"): {"pflop": 2}}
    results = Results(frame(OURS, OURS | {"dataset": "mnist"}), about=about)
    assert results.about("ours", "mnist") == {"pflop": 2}
    with pytest.raises(ValueError, match="say which of digits, mnist"):
        results.about("ours")


def test_results_are_made_of_whatever_holds_some(tmp_path: Path) -> None:
    path = tmp_path / "rows" / schema.cell_folder("a", "undefended", "fgsm", "oblivious") / "0000.parquet"
    schema.write_rows(path, columns(3, dataset="digits", classifier="a", attack="fgsm", attack_repr="FGSM()"))
    for source in (tmp_path, str(tmp_path), [tmp_path], schema.read_rows(tmp_path), Results.read(tmp_path)):
        results = Results.of(source)
        assert len(results.rows) == 3
        assert results.runs == (tmp_path,)
        assert results.where(attack="fgsm").runs == (tmp_path,)
    with pytest.raises(ValueError, match="at least one run folder"):
        Results.of([])


def test_what_are_no_rows_is_said() -> None:
    with pytest.raises(ValueError, match=r"there are no rows to make tables of.*unperturb evaluate"):
        Results(frame(OURS).iloc[:0])
    with pytest.raises(ValueError, match=r"they have no column 'defended'; `read_rows` gives some"):
        Results(frame(OURS).drop(columns="defended"))


def test_nothing_heavy_is_loaded_before_it_is_used_and_torch_never(tmp_path: Path) -> None:
    path = tmp_path / "rows" / "cell" / "0000.parquet"
    schema.write_rows(path, columns(3, dataset="digits", classifier="a", attack="pgd", attack_repr="PGD()"))
    code = (
        "import sys, unperturb.results as r; "
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'jinja2', 'scipy') if m in sys.modules]); "
        f"r.table({str(tmp_path)!r}), r.compare({str(tmp_path)!r}), r.robust_table(r.Results.read({str(tmp_path)!r})); "
        "print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["[]", "[]"]
