"""The playground: what is offered, the image, what an attacker does to it, what is said of it; and the page itself."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from digit_nets import digit_net, known
from unperturb import zoo
from unperturb.app import choices, images, one_image, says
from unperturb.app.images import Chosen
from unperturb.attackers import Attacker
from unperturb.attacks import attacks, create_attack
from unperturb.data.sets import DataError
from unperturb.defenses import Defense, create_defense, defenses, load_defense
from unperturb.runs import RunError
from unperturb.serving import Limits
from unperturb.systems import System
from unperturb.threat_models import KNOWLEDGE, ThreatModel

RESNET, FINETUNE = "zoo:mnist-resnet8", "zoo:finetune-mnist"


def digit(place: int = 0, label: bool = True) -> Chosen:
    """A digit of 16x16 that the small net gets right."""
    x, y = known(place + 1)
    return Chosen((x[place] * 255).round().to(torch.uint8), int(y[place]) if label else None, place, "a digit")


def behind(defense: str, **options: Any) -> System:
    return System("ours", digit_net(), create_defense(defense, **options).eval())


# What is offered ------------------------------------------------------------------------------------------------------


def test_every_classifier_of_the_zoo_is_offered_and_loads_with_each_of_its_purifiers() -> None:
    offered = choices.offered()
    assert next(iter(offered)) == "mnist"
    assert offered["digits"] == offered["mnist"]
    named = [name for nets in offered.values() for name in nets.classifiers]
    assert {n.removeprefix("zoo:") for n in named} == {
        n for n, f in zoo.folders().items() if zoo.kind_of(f) != "defense"
    }
    assert (offered["mnist"].classifiers[0], offered["mnist"].purifiers[0]) == (RESNET, FINETUNE)
    assert offered["imagenette"].purifiers == (*choices.FILTERS, choices.NO_PURIFIER)  # the zoo has none for it
    for purifier in offered["mnist"].purifiers:
        one = one_image.system("digits", RESNET, purifier)
        assert one.undefended == (purifier == choices.NO_PURIFIER)
        one.check_data(choices.test_images("digits"))


def test_the_filters_are_all_defenses_that_have_nothing_to_learn() -> None:
    trained = {
        load_defense(folder).spec["name"] for folder in zoo.folders().values() if zoo.kind_of(folder) == "defense"
    }  # type: ignore[index]
    learned = trained | {"identity", "pipeline", "feature_squeezing"}  # nothing, several, and a detector
    for name in set(defenses) - learned:
        try:
            load_defense(name)
        except RunError:
            assert name not in choices.FILTERS
        else:
            assert name in choices.FILTERS


def test_without_a_zoo_it_says_where_one_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "folders", dict)
    choices.offered.cache_clear()
    with pytest.raises(FileNotFoundError, match="there is no zoo here"):
        choices.offered()
    choices.offered.cache_clear()


def test_every_attack_that_is_offered_can_be_made_by_every_attacker_that_is() -> None:
    assert {"noise", "fgsm", "pgd", "apgd", "apgd-t", "square", "autoattack"} <= set(choices.attack_names())
    for name in choices.attack_names():
        effort = choices.effort_of(name)
        for norm in choices.norms_of(name):
            for knowledge in choices.knowledge_of(name):
                made = one_image.attacker(name, norm, "8/255", effort and 7, knowledge)
                assert type(made.attack) is attacks[name]
                assert (made.attack.eps, made.knowledge) == (8 / 255, knowledge)
                assert effort is None or getattr(made.attack, effort[0]) == 7
    for data in choices.offered():
        assert 0 < ThreatModel("linf", choices.budget_for(data, "linf")).eps <= 0.3
        assert ThreatModel("l2", choices.budget_for(data, "l2")).eps >= 0.5


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: one_image.system("mnist", "zoo:finetune-mnist", "median"), "unknown classifier"),
        (lambda: one_image.system("mnist", RESNET, "../../elsewhere"), "unknown purifier"),
        (lambda: one_image.system("folder:/etc", RESNET, "median"), "unknown data set"),
        (lambda: choices.test_images("hub:someone/something"), "unknown data set"),
        (lambda: one_image.attacker("pgd", "linf", "3", 5, "oblivious"), "a budget in Linf is at most 1"),
        (lambda: one_image.attacker("pgd", "linf", "much", 5, "oblivious"), "a budget is a number"),
        (lambda: one_image.attacker("pgd", "linf", "0.3", 5, "black_box"), "needs a gradient"),
        (lambda: one_image.attacker("rays", "l2", "0.3", 5, "black_box"), "rays knows the norm linf alone"),
    ],
)
def test_what_is_not_offered_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


# The image ------------------------------------------------------------------------------------------------------------


def png(pixels: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def test_an_image_of_the_set_is_that_image() -> None:
    data = choices.test_images("digits")
    chosen = images.from_set(data, 7)
    x, y = data.batch(torch.tensor([7]))
    assert torch.equal(chosen.batch, x)
    assert (chosen.label, chosen.index) == (int(y), int(data.index[7]))


def test_a_picture_is_read_as_it_is_and_resized_where_it_must_be(tmp_path: Path) -> None:
    data, file = choices.test_images("digits"), tmp_path / "picture"
    pixels = data.images[3, 0].numpy()
    file.write_bytes(png(pixels))
    chosen = images.from_file(file, data)
    assert torch.equal(chosen.pixels, data.images[3])
    assert (chosen.label, chosen.title) == (None, "your picture")
    file.write_bytes(png(np.full((60, 90, 3), 77, np.uint8), "JPEG"))
    chosen = images.from_file(file, data)
    assert chosen.pixels.unique().tolist() == [77]
    assert chosen.title == "your picture, resized from 90x60 to 28x28 pixels"


@pytest.mark.parametrize(
    ("content", "limits", "said"),
    [
        (png(np.zeros((9, 9), np.uint8), "GIF"), {}, "send a whole PNG or JPEG"),
        (b"<svg/>", {}, "send a whole PNG or JPEG"),
        (b"", {}, "send a whole PNG or JPEG"),
        (png(np.zeros((40, 40), np.uint8)), {"max_pixels": 1599}, "40x40 pixels, more than 1,599"),
        (png(np.zeros((40, 40), np.uint8)), {"max_bytes": 50}, "bytes, more than 50"),
        (png(np.zeros((40, 40), np.uint8))[:-30], {}, "not a whole picture"),
    ],
)
def test_what_is_no_such_picture_is_refused(content: bytes, limits: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(content)
    with pytest.raises(DataError, match=said):
        images.from_file(file, choices.test_images("digits"), Limits(**limits))


def test_a_drawing_lies_as_the_digits_of_mnist_do() -> None:
    canvas = np.full((280, 280), 255, np.uint8)
    canvas[200:240, 10:20] = 0  # a small dark bar in a corner
    drawn = images.from_drawing(canvas, choices.test_images("digits")).pixels[0].float()
    rows, columns = drawn.amax(1).nonzero(), drawn.amax(0).nonzero()
    assert (int(rows[0]), int(rows[-1])) == (4, 23)  # 20 of 28 pixels
    assert len(columns) == 5
    assert drawn.max() == 255
    middle = (torch.arange(28.0) * drawn.sum(1)).sum() / drawn.sum()
    assert abs(float(middle) - 13.5) <= 0.5


def test_an_empty_canvas_is_no_drawing() -> None:
    with pytest.raises(DataError, match="nothing is drawn yet"):
        images.from_drawing(np.full((280, 280), 255, np.uint8), choices.test_images("digits"))


def test_a_difference_is_amplified_as_far_as_it_can_be() -> None:
    clean = torch.full((1, 4, 4), 0.5)
    moved = clean.clone()
    moved[0, 0, 0] += 8 / 255
    shown, times = images.amplified(moved, clean)
    assert times == 15
    assert shown[0, 1, 1] == 0.5
    assert float(shown[0, 0, 0]) == pytest.approx(0.5 + 15 * 8 / 255)
    assert images.amplified(clean + 0.3, clean)[1] == 1.6
    assert images.amplified(clean, clean)[1] == 1


def test_pixels_are_enlarged_whole() -> None:
    image = torch.rand(3, 28, 28)
    shown = images.enlarged(image)
    assert shown.shape == (224, 224, 3)
    assert np.array_equal(shown[::8, ::8], (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    assert images.enlarged(torch.rand(1, 300, 300)).shape == (300, 300)
    assert images.enlarged(torch.rand(1, 128, 128)).shape == (256, 256)


# The attacker ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knowledge", ["oblivious", "bpda", "white_box"])
def test_an_attacked_image_is_that_of_the_attack_itself(knowledge: str) -> None:
    one, chosen = behind("median"), digit(1)
    who = Attacker(create_attack("pgd", eps=0.3, steps=5), knowledge)
    found = one_image.attacked(one, who, chosen)
    index = torch.tensor([chosen.index])
    adversarial = who.attack_for(one)(who.model_for(one), chosen.batch, torch.tensor([chosen.label]), index=index)
    assert one.purifier is not None
    purified = one.purifier(adversarial)
    with torch.no_grad():
        assert torch.equal(found.adversarial.image, adversarial[0])
        assert torch.equal(found.restored.image, purified[0])
        assert torch.allclose(found.adversarial.probabilities, one.classifier(adversarial).softmax(1)[0])
        assert torch.allclose(found.restored.probabilities, one.classifier(purified).softmax(1)[0])
    assert found.far["linf"] <= 0.3 + 1e-6
    assert found.fooled_alone == (found.adversarial.prediction != chosen.label)
    assert found.broken == (found.restored.prediction != chosen.label)


def test_the_class_that_nobody_knows_is_what_the_classifier_says() -> None:
    who = Attacker(create_attack("fgsm", eps=0.1), "oblivious")
    told, untold = (one_image.attacked(behind("jpeg"), who, digit(2, label=label)) for label in (True, False))
    assert told.label == untold.label  # it gets the digit right
    assert torch.equal(told.adversarial.image, untold.adversarial.image)


class Coin(Defense):
    """A purifier that is black in about half of the calls."""

    random = True

    def purify(self, images: torch.Tensor) -> torch.Tensor:
        return images * (torch.rand(()) < 0.5)


def test_a_random_system_is_broken_where_every_draw_is_wrong() -> None:
    one = System("ours", digit_net(), Coin())
    black = int(digit_net()(torch.zeros(1, 1, 16, 16)).argmax())
    chosen = next(digit(k) for k in range(9) if digit(k).label != black)
    assert chosen.label is not None
    seen = one_image.look(one, chosen.batch, draws=40)
    assert set(seen.classes) == {black, chosen.label}
    assert seen.wrong(chosen.label) == seen.classes.count(black)
    assert one_image.look(one, chosen.batch, draws=40).classes == seen.classes  # the seeds are fixed
    found = one_image.attacked(one, Attacker(create_attack("noise", eps=0.01), "none"), chosen)
    assert not found.broken
    assert replace(found, label=next(k for k in range(10) if k not in (black, chosen.label))).broken
    assert f"{found.restored.wrong(chosen.label)} of 10 draws are wrong" in says.verdict(
        found, [str(k) for k in range(10)]
    )


def test_an_attack_that_takes_too_long_is_stopped_and_leaves_the_model_as_it_was() -> None:
    one = System("ours", digit_net().train())
    who = Attacker(create_attack("pgd", eps=0.3, steps=10_000), "oblivious")
    with pytest.raises(one_image.TooLongError, match=r"stopped after 0\.2 seconds"):
        one_image.attacked(one, who, digit(), seconds=0.2)
    assert one.classifier.training
    one.classifier.eval()


# The ladder -----------------------------------------------------------------------------------------------------------


def test_the_ladder_is_that_of_an_evaluation_without_what_comes_twice() -> None:
    threat = ThreatModel("linf", 0.3)
    defended = one_image.rungs(behind("median"), threat, 10)
    kinds = [(rung.label, rung.knowledge) for rung in defended]
    assert kinds[0] == ("noise", "none")
    assert {kind for _, kind in kinds} == {"none", "oblivious", "bpda", "white_box", "black_box"}
    bare = [(rung.label, rung.knowledge) for rung in one_image.rungs(System("bare", digit_net()), threat, 10)]
    assert len(bare) == len(set(bare))
    assert {kind for _, kind in bare} == {"none", "oblivious", "black_box"}


def test_the_ladder_is_climbed_one_by_one_and_goes_on_after_who_took_too_long() -> None:
    one, chosen, threat = behind("median"), digit(3), ThreatModel("linf", 0.3)
    attackers = one_image.rungs(one, threat, 10)
    attackers[1] = replace(attackers[1], attacker=Attacker(create_attack("pgd", eps=0.3, steps=10**6), "oblivious"))
    climbed = list(one_image.climb(one, attackers[:4], chosen, seconds=5))
    assert [found is None for found in climbed] == [False, True, False, False]
    names = [str(k) for k in range(10)]
    table = says.ladder(climbed, attackers[:4], names, threat)
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 4
    assert "too long" in lines[3]
    for rung, found, line in zip(attackers, climbed, lines[2:]):
        assert KNOWLEDGE[rung.knowledge].title in line
        assert found is None or ("broken" if found.broken else "stands") in line
    broken = [rung for rung, found in zip(attackers, climbed) if found is not None and found.broken]
    assert f"{len(broken)} of 3 attackers break it" in table or (not broken and "stands against 3" in table)
    assert "1 took too long" in table
    half = says.ladder(climbed[:2], attackers[:4], names, threat)
    assert "Attacker 3 of 4 is at work" in half
    assert "Attacker 3 of 4 was stopped" in says.stopped(half)


# What is said ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alone", "purified", "said"),
    [
        (3, 3, "Not fooled"),
        (5, 3, "Fooled, and restored"),
        (5, 4, "Fooled, and not restored"),
        (3, 4, "Only behind the purifier is it fooled"),
    ],
)
def test_the_headline_is_what_happened(alone: int, purified: int, said: str) -> None:
    def view(label: int) -> one_image.View:
        return one_image.View(
            torch.zeros(1, 2, 2), torch.nn.functional.one_hot(torch.tensor(label), 10).float(), [label], False
        )

    who = Attacker(create_attack("pgd", eps=0.3), "white_box")
    found = one_image.Attacked(
        3, view(3), view(alone), view(purified), view(3), True, who, {"linf": 0.3, "l2": 2.0}, 1, 1, 0.5
    )
    names = [f"<b>{k}" for k in range(10)]
    text = says.verdict(found, names)
    assert text.startswith(f"### {said}\n")
    assert f"behind the purifier **&lt;b>{purified}** (100 %)" in text
    assert "<b>" not in text  # names come from outside
    bare = says.verdict(replace(found, defended=False, restored=view(alone)), names)
    assert bare.startswith(f"### {'Not fooled' if alone == 3 else 'Fooled'}\n")
    assert "purifier" not in bare


# The command ----------------------------------------------------------------------------------------------------------


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['gradio'] = None; sys.argv = ['unperturb', 'app', '--no-open', '--port', '0'];"
        "from unperturb.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert 'gradio is not installed; for the playground: pip install "unperturb[app]"' in done.stderr
    assert "Traceback" not in done.stderr


# The page -------------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLACE = 6  # among the digits that are offered first, one whose verdicts are far from any other
MINUTE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    from unperturb.app import running

    with running(device="cpu") as where:
        yield where


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    library = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser is driven")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: nobody looks at the page")
    with library.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Visitor:
    """Who looks at the page, notes whom the browser asks, and what goes wrong."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.asked, self.faults = page, set[str](), list[str]()
        page.set_default_timeout(2 * MINUTE)
        page.on("request", lambda request: self.asked.add(request.url.split("/")[2]) if "://" in request.url else None)
        page.on("console", lambda line: self.faults.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.goto(url)
        self.sees("#title", "image")

    def sees(self, where: str, text: str) -> None:
        self.page.locator(where, has_text=text).wait_for()

    def chooses(self, label: str, option: str) -> None:
        self.page.get_by_label(label, exact=True).click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def says(self, tile: str) -> str:
        """The class that a tile shows."""
        return str(self.page.locator(f"#{tile} [data-testid='label-output-value']").inner_text()).strip()


@pytest.fixture
def visitor(browser: Any, url: str) -> Iterator[Visitor]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    found = Visitor(page, url)
    yield found
    page.close()
    assert found.asked <= {url.removeprefix("http://")}
    assert found.faults == []


@pytest.mark.slow
def test_in_a_browser_the_purifier_restores_an_image_and_falls_to_who_knows_it(visitor: Visitor) -> None:
    page = visitor.page
    visitor.chooses("Images", "digits")
    visitor.sees("#title", "of digits")
    page.locator("#pictures button.thumbnail-item").nth(PLACE).click()
    visitor.sees("#title", "of digits, class 5")
    assert visitor.says("clean") == "5"
    page.get_by_role("button", name="Attack", exact=True).click()
    visitor.sees("#verdict", "Fooled, and restored")
    assert [visitor.says(tile) for tile in ("clean", "restored")] == ["5", "5"]
    assert visitor.says("adversarial") != "5"
    visitor.sees("#amplified", "amplified 1.6 times")
    page.get_by_label("white box").check()
    page.get_by_role("button", name="Attack", exact=True).click()
    visitor.sees("#verdict", "Fooled, and not restored")
    assert visitor.says("clean") == "5"
    assert visitor.says("restored") != "5"
    visitor.chooses("Purifier", "none")
    visitor.sees("#verdict", "Nobody has attacked it yet")  # what was found of another system is taken away
    page.get_by_role("button", name="Climb the ladder").click()
    visitor.sees("#ladder", "attackers break it")


@pytest.mark.slow
def test_in_a_browser_a_picture_is_taken_and_a_mistake_is_told(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    visitor.chooses("Images", "digits")
    visitor.sees("#title", "of digits")
    page.get_by_role("tab", name="Upload").click()
    (tmp_path / "no.png").write_bytes(b"no picture")
    page.locator("input[type=file]").last.set_input_files(tmp_path / "no.png")
    visitor.sees("body", "send a whole PNG or JPEG")
    row = int((choices.test_images("digits").labels == 5).nonzero()[0])
    (tmp_path / "five.png").write_bytes(png(choices.test_images("digits").images[row, 0].numpy()))
    page.locator("input[type=file]").last.set_input_files(tmp_path / "five.png")
    visitor.sees("#title", "your picture")
    page.get_by_label("Budget").fill("8")
    page.get_by_role("button", name="Attack", exact=True).click()
    visitor.sees("body", "a budget in Linf is at most 1")
