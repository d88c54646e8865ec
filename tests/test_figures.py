"""Figures: what they say, what they draw, and that names from outside stay on them and apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from made_rows import frame
from made_runs import MARGINS, make_run
from unperturb import runs
from unperturb.results import Results
from unperturb.results.cost_figure import Cost, cost_figure, costs, pareto, words
from unperturb.results.figures import (
    WIDEST,
    accuracy_figure,
    confidence_figure,
    looks,
    restored_figure,
    save,
    spread_out,
)
from unperturb.results.ladder_figure import eps_curve, eps_figure, ladder, ladder_figure
from unperturb.results.robust import Judged, every_system, robust_accuracy
from unperturb.results.samples import read_samples
from unperturb.threat_models import KNOWLEDGE, ThreatModel

TINY = (
    {"right_clean": [1, 1, 1, 0], "right_adv": [0, 0, 1, 0]},
    {"system": "ours", "right_clean": [1, 1, 1, 1], "right_adv": [1, 1, 1, 0]},
    {"system": "ours", "right_clean": [1, 1, 1, 1], "right_adv": [1, 1, 0, 1], "knowledge": "bpda"},
    {"system": "ours", "right_clean": [1, 1, 1, 1], "right_adv": [1, 0, 1, 1], "knowledge": "white_box"},
)


def tiny(*more: dict[str, Any], about: Any = None) -> Results:
    return Results(frame(*TINY, *more), about=about)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("figures"))


@pytest.fixture(scope="module")
def made(run: Path) -> Results:
    return Results.read(run)


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for axes in figure.axes for t in axes.texts] + [t.get_text() for t in figure.texts]


def boxes(figure: Figure, said: str) -> list[Any]:
    """Where the words that match `said` stand."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    found = [t for axes in figure.axes for t in axes.texts if re.search(said, t.get_text())]
    return [t.get_window_extent(renderer) for t in found]


def apart(found: list[Any]) -> bool:
    return not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])


# Samples ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["defense_gan", "adversarial_large", "denoised_smoothing", "adversariallytrained"])
def test_the_name_of_a_system_stays_on_the_figure(name: str, run: Path) -> None:
    cell, tensors = read_samples(run)[0]
    (axes,) = restored_figure({**cell, "system": name}, tensors).axes
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    (label,) = (t for t in axes.texts if t.get_text().replace("\n", "") == name)
    first = min(image.get_window_extent(renderer).x0 for image in axes.images)
    box = label.get_window_extent(renderer)
    assert 0 <= box.x0 < box.x1 <= first


def test_restored_figure_says_what_was_predicted(run: Path) -> None:
    for cell, tensors in read_samples(run):
        (axes,) = restored_figure(cell, tensors).axes
        said = [t.get_text() for t in axes.texts]
        assert [t for t in said if t in ("Normal", "Adv", cell["system"])] == ["Normal", "Adv", cell["system"]]
        answers = [t for t in said if re.search("^[^ ]+ [✓✗]$", t)]
        label, predicted = tensors["label"].tolist(), tensors["prediction"].tolist()
        expected = [f"{p[v]} {'✓' if p[v] == t else '✗'}" for v in (0, 1, 3) for p, t in zip(predicted, label)]
        assert answers == expected
        assert np.array_equal(axes.images[-1].get_array(), tensors["restored"][2, 0].numpy())


def test_confidence_figure_shows_images_that_the_attack_turned(run: Path) -> None:
    for cell, tensors in read_samples(run):
        label, predicted = tensors["label"], tensors["prediction"]
        attacked = 1 if cell["knowledge"] in ("none", "transfer", "oblivious") else 3
        turned = ((predicted[:, 0] == label) & (predicted[:, attacked] != label)).nonzero().flatten().tolist()
        chosen = turned or [0, 1, 2]
        said = "\n".join(t.get_text() for t in confidence_figure(cell, tensors).axes[0].texts)
        expected = [100 * float(tensors["confidence"][i, v]) for v in (0, 1, 3) for i in chosen]
        assert [float(found) for found in re.findall(r": ([\d.]+) %", said)] == pytest.approx(expected, abs=0.051)


def test_answers_that_were_none_are_told(run: Path) -> None:
    cell, tensors = read_samples(run)[0]
    none = {**tensors, "prediction": torch.full_like(tensors["prediction"], -1)}
    for draw in (restored_figure, confidence_figure):
        assert any("no answer" in t for t in texts(draw(cell, none)))


@pytest.mark.filterwarnings("ignore:Glyph")  # where no font for them is installed
def test_figures_say_names_as_they_are_and_keep_them_apart(run: Path) -> None:
    cell, tensors = read_samples(run)[0]
    names = ["$x$", "日本語", "a_b" * 9, *map(str, range(7))]
    odd = {**cell, "system": "$a$\nb", "class_names": names}
    figure = restored_figure(odd, tensors)
    assert not any(t.get_parse_math() for t in figure.axes[0].texts)
    assert apart(boxes(figure, "[✓✗]$"))
    given = ("m" * 40, "pgd-l2-margin-100-steps", "日本語" * 9, "$x_1$")
    many = tiny(*(TINY[1] | {"system": name} for name in given))
    figure = accuracy_figure(many)
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert apart([t.get_window_extent(renderer) for t in figure.axes[0].get_xticklabels()])
    for figure in (ladder_figure(many), ladder_figure(many, width=3.6), eps_figure(many)):
        assert not any(t.get_parse_math() for axes in figure.axes for t in axes.texts)
        assert apart(boxes(figure, r"\d$|only\)$"))


# Accuracies ---------------------------------------------------------------------------------------------------------


def heights(figure: Figure) -> list[list[float]]:
    """Of each panel, its bars from left to right."""
    bars = [sorted((b.get_x(), b.get_height()) for b in axes.patches) for axes in figure.axes]
    return [[round(height, 6) for _, height in panel] for panel in bars]


def test_accuracy_figure_draws_the_strongest_attacker_that_was_tried(made: Results) -> None:
    (panel,) = heights(accuracy_figure(made))
    expected = []
    for system in ("undefended", "ours"):
        oblivious, all_of_it = (
            robust_accuracy(made, ThreatModel("linf", 0.3, k), system=system) for k in ("oblivious", "white_box")
        )
        expected += [100 * v for v in (oblivious.clean, oblivious.accuracy, all_of_it.accuracy)]
    assert panel == pytest.approx(expected, abs=1e-5)
    assert panel[4] > panel[5]  # of ours, once it is known
    figure = accuracy_figure(tiny())
    # Each attack on ours turns another image: together they leave one of four, which no single one says.
    assert heights(figure) == [[75, 25, 25, 100, 75, 25]]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["undefended", "ours"]


def test_accuracy_figure_says_where_nobody_who_knows_was_tried() -> None:
    unknown = TINY[1] | {"system": "theirs"}
    figure = accuracy_figure(tiny(unknown))
    assert heights(figure) == [[75, 25, 25, 100, 75, 25, 100, 75]]
    assert texts(figure).count("not tried") == 1


def test_accuracy_figure_has_a_panel_for_each_block_and_budget_and_is_no_wider_than_a_page() -> None:
    more = [TINY[1] | {"system": f"ours {i}"} for i in range(12)]
    more += [TINY[1] | {"classifier": "b", "eps": eps, "linf": eps} for eps in (0.1, 0.2)]
    figure = accuracy_figure(tiny(*more))
    assert len([axes for axes in figure.axes if axes.axison]) == 1 + 2
    assert figure.get_figwidth() <= WIDEST + 1


@pytest.mark.parametrize("count", [1, 2, 6, 9])
def test_the_legend_of_bars_stays_on_the_figure_and_off_its_titles(count: int) -> None:
    figure = accuracy_figure(Results(frame(*(TINY[1] | {"system": f"system-{i}"} for i in range(count)))))
    renderer = FigureCanvasAgg(figure).get_renderer()
    box, title = (part.get_window_extent(renderer) for part in (figure.legends[0], figure.axes[0]._left_title))
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert title.y1 <= box.y0 < box.y1 <= figure.bbox.y1


def test_systems_that_saw_other_images_say_how_many() -> None:
    few = {"right_clean": [1, 1], "seconds_purify": 0.001, "system": "few"}
    cells = [TINY[1] | few | {"right_adv": [1, 0]}, TINY[3] | few | {"right_adv": [1, 0]}]
    results = tiny(*cells)
    said = [re.sub(r"\s+", " ", t) for t in texts(ladder_figure(results))]
    assert {"undefended 25.0, n 4", "ours 25.0, n 4", "few 50.0, n 2"} <= set(said)
    labels = [t.get_text() for t in accuracy_figure(results).axes[0].get_xticklabels()]
    assert labels == ["undefended\nn 4", "ours\nn 4", "few\nn 2"]
    figure = cost_figure(tiny(*cells, *(cell | {"system": "third"} for cell in cells)))
    assert figure is not None
    assert {"undefended, n 4", "ours, n 4", "few, n 2", "third, n 2"} <= set(texts(figure))
    for same in (ladder_figure(tiny()), accuracy_figure(tiny())):
        assert not any("n 4" in t for t in [*texts(same), *(t.get_text() for t in same.axes[0].get_xticklabels())])


def test_a_figure_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    class Broken:
        def savefig(self, path: Path, **_: Any) -> None:
            path.write_bytes(b"half")
            raise OSError("no space")

    path = tmp_path / "a.png"
    path.write_bytes(b"whole")
    with pytest.raises(runs.RunError, match="no space"):
        save(Broken(), path)  # type: ignore[arg-type]
    assert path.read_bytes() == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_no_two_systems_look_alike() -> None:
    names = [f"s{i}" for i in range(40)]
    look = looks(["bare", *names], ["bare"])
    assert len({(of["color"], of["marker"]) for of in look.values()}) == 41
    assert {look[name]["color"] for name in names}.isdisjoint({look["bare"]["color"]})


def test_labels_are_spread_out_no_farther_than_they_must() -> None:
    assert spread_out([10, 50, 90], [5, 5, 5], 0, 100) == [10, 50, 90]
    assert spread_out([50, 50], [10, 20], 0, 100) == [40, 55]
    low = spread_out([0, 0, 0, 60], [10, 10, 10, 10], 0, 100)
    assert low == [5, 15, 25, 60]
    assert spread_out([100, 100], [10, 10], 0, 100) == [85, 95]
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted, tall = rng.uniform(0, 100, 9), rng.uniform(3, 10, 9)
        places = np.array(spread_out(wanted.tolist(), tall.tolist(), 0, 100))
        order = np.argsort(places)
        ends = (places - tall / 2)[order], (places + tall / 2)[order]
        assert (ends[0][1:] >= ends[1][:-1] - 1e-9).all()
        assert ends[0][0] >= -1e-9
        assert ends[1][-1] <= 100 + 1e-9


# The ladder ---------------------------------------------------------------------------------------------------------


def test_the_ladder_falls_step_by_step_to_robust_accuracy(made: Results) -> None:
    for judged in every_system(made):
        steps = ladder(judged, "linf", 0.3)
        assert [step.knowledge for step in steps] == ["clean", *KNOWLEDGE]
        left = [step.accuracy for step in steps]
        assert left == sorted(left, reverse=True)
        whole = robust_accuracy(made, ThreatModel("linf", 0.3), system=judged.system)
        assert (left[0], left[-1]) == (pytest.approx(whole.clean), whole.accuracy)
        assert (steps[-1].low, steps[-1].high) == (whole.low, whole.high)
        assert {step.knowledge for step in steps if step.tried} == {"clean", *judged.cells["knowledge"]}


def test_each_step_is_under_all_attacks_before_it_counted_by_hand() -> None:
    (block,) = (results := tiny()).blocks
    steps = {step.knowledge: step for step in ladder(Judged.of(results, block, "ours"), "linf", 0.3)}
    assert [4 * steps[k].accuracy for k in ("clean", "transfer", "oblivious", "black_box", "bpda", "white_box")] == [
        *(4, 4, 3, 3, 2, 1)
    ]
    # Two that do not include one another are cumulated all the same.
    more = tiny(TINY[1] | {"knowledge": "black_box", "right_adv": [0, 1, 1, 1]})
    steps = {step.knowledge: step for step in ladder(Judged.of(more, block, "ours"), "linf", 0.3)}
    assert [4 * steps[k].accuracy for k in ("oblivious", "black_box", "bpda", "white_box")] == [3, 2, 1, 0]


def test_ladder_figure_names_each_system_with_what_is_left_of_it(made: Results) -> None:
    for width in (9.6, 3.6):
        said = [re.sub(r"\s+", " ", t) for t in texts(ladder_figure(made, width=width))]
        for system in MARGINS:
            left = 100 * robust_accuracy(made, ThreatModel("linf", 0.3), system=system).accuracy
            assert f"{system} {left:.1f}" in said
    steps = [t.get_text() for t in ladder_figure(made).axes[0].get_xticklabels()]
    assert steps == ["clean", "noise", "transfer", "oblivious", "black box", "BPDA", "white box"]  # no gray box tried
    assert any("Linf 0.1" in t for t in texts(ladder_figure(made, 0.1)))
    assert any("L2 2" in t for t in texts(ladder_figure(made, 2, norm="l2")))


def test_ladder_figure_says_where_it_ends_early() -> None:
    figure = ladder_figure(tiny(TINY[1] | {"system": "theirs"}))
    said = texts(figure)
    assert "theirs  75.0 (oblivious only)" in said
    assert "undefended  25.0" in said  # whoever attacks it knows all there is
    assert "ours  25.0" in said


def test_nine_systems_on_a_ladder_are_told_apart() -> None:
    systems = [TINY[i] | {"system": f"system-{j}"} for j in range(8) for i in (1, 2, 3)]
    for width in (9.6, 3.6):
        figure = ladder_figure(Results(frame(TINY[0], *systems)), width=width)
        found = boxes(figure, r"\d\.\d$")
        assert len(found) == 9
        assert apart(found)
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 + 1 for box in found)
        assert max(box.y1 for box in found) <= figure.axes[0].bbox.y1 + 4  # below the title


def test_there_is_a_ladder_for_each_block() -> None:
    figure = ladder_figure(tiny(TINY[1] | {"dataset": "mnist", "eps": 0.1, "linf": 0.1}))
    assert len(figure.axes) == 2
    assert any("mnist" in t and "Linf 0.1" in t for t in texts(figure))


def test_systems_judged_on_the_first_images_of_another_share_its_panel() -> None:
    few = [{**one, "system": name} for one, name in zip(TINY, ("undefended", "slow"))]
    few = [{k: v[:2] if isinstance(v, list) else v for k, v in one.items()} | {"split": "test:2@0"} for one in few]
    parts = [*({**one, "split": "test:4@0"} for one in TINY), *few]
    (axes,) = ladder_figure(Results(frame(*parts))).axes
    said = [t.get_text() for t in axes.texts]
    assert sum(t.startswith("undefended") for t in said) == 1
    assert any(t.startswith("slow") and "n 2" in t for t in said)
    other = [{**one, "split": one["split"].replace("@0", "@1")} for one in few]  # another order: other images
    assert len(ladder_figure(Results(frame(*parts[: len(TINY)], *other))).axes) == 2


# Against eps --------------------------------------------------------------------------------------------------------


def test_curves_are_robust_accuracy_at_each_eps(made: Results) -> None:
    for judged in every_system(made):
        for knowledge in ("oblivious", "white_box"):
            for eps in (0.08, 0.1, 0.2999, 0.3, 0.7):
                (left,) = eps_curve(judged, "linf", knowledge, [eps])
                threat = ThreatModel("linf", eps, knowledge)
                if judged.under(threat) is None:  # nothing came so near
                    assert left == judged.clean.mean()
                    continue
                assert left == robust_accuracy(made, threat, system=judged.system).accuracy


def test_a_minimal_attack_counts_from_where_its_images_lie() -> None:
    free = {"attack": "cw", "attack_repr": "CW()", "eps": float("nan"), "right_adv": [0, 0, 0, 0]}
    cell = {"right_clean": [1, 1, 1, 0], "linf": np.array([0.1, 0.2, 0.4, 0.0], np.float32)} | free
    results = Results(frame(cell))
    (judged,) = every_system(results)
    assert eps_curve(judged, "linf", "oblivious", [0.0, 0.05, 0.1, 0.15, 0.3, 0.5]) == [0.75, 0.75, 0.5, 0.5, 0.25, 0.0]
    assert eps_figure(results).axes[0].get_xlim()[1] >= 0.38  # where there is no budget, as far as its images lie


def test_eps_figure_has_a_line_for_each_kind_and_one_for_those_that_are_alike(made: Results) -> None:
    said = [re.sub(r"\s+", " ", t) for t in texts(eps_figure(made))]
    assert sum(t.startswith("undefended ") for t in said) == 1
    names = " ".join(said)
    for kind in ("noise", "transfer", "oblivious", "BPDA", "white box"):
        assert kind in names
    same = [TINY[1] | {"knowledge": k} for k in ("oblivious", "bpda", "white_box")]
    said = [re.sub(r"\s+", " ", t) for t in texts(eps_figure(Results(frame(*same))))]
    assert "oblivious, BPDA, white box 75.0" in said


# Cost ---------------------------------------------------------------------------------------------------------------


def test_the_pareto_front_is_what_nothing_beats() -> None:
    given = [0.0, 1.0, 1.0, 2.0, 3.0, 3.0], [0.2, 0.5, 0.4, 0.5, 0.9, 0.9]
    assert pareto(*given) == [0, 1, 4, 5]


def test_costs_are_medians_and_what_is_left_under_everything() -> None:
    slow = TINY[3] | {"seconds_purify": 9.0}
    results = Results(
        frame(TINY[0], *(cell | {"seconds_purify": 0.004} for cell in TINY[1:3]), slow),
        about={("digits", "ours"): {"pflop": 0.25}, ("digits", "undefended"): {"pflop": None}},
    )
    (block,) = results.blocks
    bare, ours = costs(results, block, "linf", 0.3)
    assert (ours.ms, ours.pflop) == (pytest.approx(4), 0.25)  # the median: the one that had to wait does not count
    assert np.isnan(bare.pflop)
    assert ours.left is not None
    assert ours.oblivious is not None
    assert (ours.left[0], ours.oblivious[0]) == (0.25, 0.75)
    unknown = Results(frame(TINY[0], TINY[1]))
    assert costs(unknown, block, "linf", 0.3)[1].left is None
    assert isinstance(bare, Cost)


def test_cost_figure_names_every_system_where_it_can_be_read() -> None:
    cells = [TINY[0] | {"seconds_purify": 1e-9}]
    for number in range(7):
        took = 2.0 if number == 6 else 0.0004 + 0.00001 * number
        cells += [cell | {"system": f"system_{number}", "seconds_purify": took} for cell in TINY[1:]]
    about = {("digits", f"system_{i}"): {"pflop": 0.07 * i if i else None} for i in range(7)}
    figure = cost_figure(Results(frame(*cells), about=about))
    assert figure is not None
    (axes,) = figure.axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    found = {t.get_text(): words(t, renderer) for t in axes.texts if t.get_text() != "no purifier"}
    assert set(found) == {"undefended", *(f"system_{i}" for i in range(7))}
    assert apart(list(found.values()))
    assert cost_figure(tiny()) is None
