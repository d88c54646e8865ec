"""Training: the loop resumes to the same weights, says what went wrong, and counts what it costs."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from unperturb import runs
from unperturb.attacks import create_attack
from unperturb.classifiers import create_classifier, load_classifier, save_classifier, wrap
from unperturb.config import (
    AdversarialBatchesConfig,
    Augmentation,
    ComponentConfig,
    RecipeError,
    Training,
    mixture,
    resolve,
)
from unperturb.data import Splits, load_dataset
from unperturb.defenses import Defense, create_defense, load_defense, save_defense
from unperturb.devices import FlopCounter, Speed, pick_device, probe, set_threads
from unperturb.registry import UnknownNameError
from unperturb.systems import System
from unperturb.training import jobs, loop, profiling
from unperturb.training.adversarial_batches import AdversarialBatches, Mixture, Sampler, hardest
from unperturb.training.loop import learning_rate, make_optimizer, total_steps, train
from unperturb.training.muon import Muon, orthogonalized
from unperturb.training.objectives import PlainClassifier
from unperturb.training.state import BEFORE, LAST, DivergedError, TrainingState

RATES = {(p, m): 10.0 for p in ("float32", "bfloat16") for m in ("contiguous", "channels_last")}
KNOWN = functools.cache(lambda device="cpu": Speed(RATES))


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    # How fast a large convolution is on this machine, and what each step costs, is beside the point here, and takes
    # longer to find out than these trainings last.
    monkeypatch.setattr(loop, "probe", KNOWN)
    monkeypatch.setattr(loop, "flop_per_image", lambda _: 1e6)
    monkeypatch.setattr(jobs, "probe", KNOWN)


@pytest.fixture(scope="module")
def data() -> Splits:
    return load_dataset("digits", size=8)


def settings(**training: Any) -> dict[str, Any]:
    fixed = {"steps": 8, "batch": 16, "precision": "float32", "memory_format": "contiguous", "lr": 3e-3, "warmup": 0.0}
    return {**fixed, "checkpoint_seconds": 0, "log_every": 2, **training}


def classifier_recipe(**training: Any) -> Any:
    return resolve(
        {
            "kind": "classifier",
            "dataset": "digits",
            "size": 8,
            "classifier": {"name": "resnet8"},  # batch norm: its statistics must come back too
            "augment": {"pad": 1, "flip": True, "cutout": 2},
            "training": settings(**training),
            "seed": 3,
        }
    )


def defense_recipe(classifier: str = "unused", **training: Any) -> Any:
    return resolve(
        {
            "kind": "defense",
            "dataset": "digits",
            "size": 8,
            "classifiers": [classifier],
            "defense": {
                "name": "paired_gan",
                "generator": {"name": "ape", "width": 4},
                "discriminator": {"name": "ape", "width": 4},
                "label_reading": "both",
                "generator_updates": 2,
                "weights": {"repair": 0.7, "label": 0.3, "recovery": 0.7, "isomorphic": 0.7},
            },
            "adversarial_batches": {
                "knowledge": "white_box",
                "attacks": [
                    {"attack": {"name": "fgsm", "eps": {"uniform": [0.1, 0.3]}}, "fraction": 0.4},
                    {"attack": {"name": "pgd", "eps": 0.2, "steps": {"uniform": [1, 2]}}, "fraction": 0.6},
                ],
                "augment": {"pad": 1},
            },
            "training": settings(
                **{"ema": 0.9, "validate_every": 0.025, "keep": "best", "clip": 1.0, "optimizer": "adam", **training}
            ),
            "seed": 4,
        }
    )


@pytest.fixture
def classifier() -> nn.Module:
    return create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])


def records(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    clock = {"seconds", "images_per_second", "gflops"}
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# A killed run --------------------------------------------------------------------------------------------------------

KILLED = """
import functools, json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import lightning_fabric
from unperturb.config import resolve
from unperturb.data import load_dataset
from unperturb.devices import Speed
from unperturb.training import jobs, loop

loop.probe = functools.cache(lambda device="cpu": Speed({("float32", "contiguous"): 10.0}))
loop.flop_per_image = lambda _: 1e6
data, at = load_dataset("digits", size=8), 5
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
saves, write_bytes = [], Path.write_bytes


def half_a_save(path, packed):
    saves.append(1)
    if len(saves) < at:
        return write_bytes(path, packed)
    write_bytes(path, packed[: len(packed) // 2])
    die()


def run(values, out, how):
    if how == "while_saving":
        Path.write_bytes = half_a_save
    recipe = resolve(values)
    job = jobs.train_classifier if recipe.kind == "classifier" else jobs.train_defense
    job(recipe, data=data, out=out, device="cpu", progress=lambda step, _: step == at and how == "between" and die())


for values, out, how in json.loads(sys.argv[1]):
    child = os.fork()  # what has been imported need not be imported again
    if not child:
        run(values, out, how)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders, by kind, of trainings that a SIGKILL ended."""
    out = tmp_path_factory.mktemp("killed")
    runs_ = [
        (recipes(classifier_folder)[kind].model_dump(mode="json"), str(out / kind), how)
        for kind, how in (("classifier", "while_saving"), ("defense", "between"))
    ]
    child = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(runs_)], capture_output=True, text=True, timeout=500
    )
    assert child.stdout.split() == [str(-signal.SIGKILL)] * 2, child.stderr
    return {kind: out / kind for kind in ("classifier", "defense")}


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifiers") / "digits-convnet"
    save_classifier(folder, create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35]))
    return folder


def recipes(classifier: Path) -> dict[str, Any]:
    return {"classifier": classifier_recipe(optimizer="muon"), "defense": defense_recipe(str(classifier))}


def step_of(folder: Path, name: str = LAST) -> int:
    """The step that a checkpoint was kept at."""
    return int(json.loads(runs.read_metadata(folder / name)["numbers"])["step"])


@pytest.mark.parametrize("kind", ["classifier", "defense"])
def test_a_killed_run_resumes_to_the_same_weights(
    kind: str, killed: dict[str, Path], classifier_folder: Path, data: Splits, tmp_path: Path
) -> None:
    recipe, folder, whole = recipes(classifier_folder)[kind], killed[kind], tmp_path / "whole"
    job: Any = jobs.train_classifier if kind == "classifier" else jobs.train_defense
    job(recipe, data=data, out=whole, device="cpu")
    assert not (folder / "model.safetensors").exists()
    assert bool(list(folder.glob(".checkpoint.*.tmp"))) == (kind == "classifier")
    assert (step_of(folder), step_of(folder, BEFORE)) == (4, 3)

    steps: list[int] = []
    job(recipe, data=data, out=folder, device="cpu", resume=True, progress=lambda step, _: steps.append(step))
    assert steps == [5, 6, 7, 8]
    assert weights(folder) == weights(whole)
    assert records(folder) == records(whole)
    assert [r["step"] for r in records(whole) if "lr" in r] == [2, 4, 6, 8]
    assert not list(folder.glob(".*.tmp"))
    last = runs.read_json(folder / "training.json")
    assert last["steps"] == 8
    assert last["test"] == ({} if kind == "defense" else {"accuracy": last["test"]["accuracy"], "n": 360})
    assert last["validation"] == runs.read_json(whole / "training.json")["validation"]
    assert last["kept_step"] == runs.read_json(whole / "training.json")["kept_step"]


def test_a_finished_run_is_resumed_at_once(data: Splits, tmp_path: Path) -> None:
    recipe = classifier_recipe(steps=2)
    jobs.train_classifier(recipe, data, out=tmp_path, device="cpu")
    before = weights(tmp_path)
    with pytest.raises(runs.RunError, match="already holds this run; go on with --resume"):
        jobs.train_classifier(recipe, data, out=tmp_path, device="cpu")
    jobs.train_classifier(
        recipe, data, out=tmp_path, device="cpu", resume=True, progress=lambda *_: pytest.fail("it trained on")
    )
    assert weights(tmp_path) == before
    # What changes no weight may differ; what does may not, precision neither.
    other = classifier_recipe(steps=2, log_every=7, checkpoint_seconds=5, precision="auto", memory_format="auto")
    jobs.train_classifier(other, data, out=tmp_path, device="cpu", resume=True)
    with pytest.raises(runs.RunError, match="already holds this run; go on with --resume"):
        jobs.train_classifier(other, data, out=tmp_path, device="cpu")
    for changed in ({"lr": 0.1}, {"precision": "bfloat16"}):
        with pytest.raises(runs.RunError, match=rf"another run: training.{next(iter(changed))} was "):
            jobs.train_classifier(classifier_recipe(steps=2, **changed), data, out=tmp_path, device="cpu", resume=True)
    assert weights(tmp_path) == before


def test_second_writer_is_refused(data: Splits, tmp_path: Path) -> None:
    with runs.lock(tmp_path), pytest.raises(runs.RunError, match=f"is being written by process {os.getpid()} since"):
        jobs.train_classifier(classifier_recipe(), data, out=tmp_path, device="cpu")


def damaged(whole: bytes, number: int) -> bytes:
    """`whole` with a bit flipped, a page zeroed or its end missing."""
    generator = random.Random(number)
    broken = bytearray(whole)
    at = generator.randrange(len(whole) - 4096)
    if number % 3 == 0:
        broken[at] ^= 1 << generator.randrange(8)
    elif number % 3 == 1:
        broken[at : at + 4096] = bytes(4096)
    else:
        del broken[at:]
    return bytes(broken)


def test_a_damaged_checkpoint_is_met_by_the_one_before(data: Splits, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "damaged"
    recipe = classifier_recipe(steps=3)
    jobs.train_classifier(recipe, data, out=whole, device="cpu")
    shutil.copytree(whole, out)
    (out / "model.safetensors").unlink()
    last, before = out / LAST, out / BEFORE
    last.write_bytes(damaged(last.read_bytes(), 0))
    with pytest.warns(UserWarning, match=r"checkpoint.safetensors is damaged: .*from the one before, at step 2"):
        jobs.train_classifier(recipe, data, out=out, device="cpu", resume=True)
    assert weights(out) == weights(whole)
    assert records(out) == records(whole)
    good, older = last.read_bytes(), before.read_bytes()
    for number in range(30):
        last.write_bytes(damaged(good, number))
        state = fresh_state(data, recipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state.load(out, 3)
        assert state.step == 2 or last.read_bytes() == good
    before.write_bytes(damaged(older, 1))
    with pytest.raises(
        runs.RunError, match=r"is (damaged|truncated).*No checkpoint is left to go on from; delete"
    ) as e:
        fresh_state(data, recipe).load(out, 3)
    assert "\n" not in str(e.value)


def test_a_checkpoint_of_another_run_is_refused(data: Splits, tmp_path: Path) -> None:
    recipe = classifier_recipe()
    fresh_state(data, recipe).save(tmp_path)
    tensors, numbers = runs.load_tensors(tmp_path / LAST), json.loads(runs.read_metadata(tmp_path / LAST)["numbers"])
    first = next(name for name in tensors if name.startswith("networks/classifier/"))

    def load(changed: Mapping[str, Any], **others: Tensor) -> None:
        written = {"numbers": json.dumps({**numbers, **changed})}
        runs.save_tensors(tmp_path / LAST, {**tensors, **others}, written)
        fresh_state(data, recipe).load(tmp_path, 8)

    load({"step": 5})
    for changed, others, said in (
        ({"step": 10**9}, {}, "not of this run: it is at step 1000000000 of 8"),
        ({"step": -1}, {}, "is not a checkpoint .* step Input should be greater than or equal"),
        ({"groups": {}}, {}, "is not a whole checkpoint"),
        ({}, {"networks/classifier/more": torch.zeros(1)}, "not of this run: its networks are others"),
        ({}, {first: torch.zeros(1)}, "not of this run: its networks are others"),
        ({}, {first: tensors[first] * torch.nan}, "weights that are NaN"),
    ):
        with pytest.raises(runs.RunError, match=said):
            load(changed, **others)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(runs.RunError, match="written by an older version; delete it to start over"):
        load({})


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_a_state_saves_and_loads_itself(optimizer: Any, data: Splits, tmp_path: Path) -> None:
    recipe = classifier_recipe(optimizer=optimizer)
    state = fresh_state(data, recipe)
    state.average = {"classifier": snapshot(state.networks["classifier"])}
    images, labels = data.train.batch(torch.arange(20))
    for _ in range(2):
        loss = F.cross_entropy(state.networks["classifier"](images), labels)
        loss.backward()
        state.optimizers["classifier"].step()
        state.add({"loss": loss})
        state.advance(0.5, 0.25)
    state.validated(lambda: {"score": 0.5}, keep_best=True)
    state.save(tmp_path)
    again = fresh_state(data, recipe.model_copy(update={"seed": 99}))
    assert described(again) != described(state)
    again.load(tmp_path, 2)
    assert described(again) == described(state)
    assert (again.step, again.seconds, again.best_score, again.kept_step) == (2, 0.5, 0.5, 2)
    nothing = fresh_state(data, recipe)
    before = described(nothing)
    nothing.load(tmp_path / "nowhere", 2)
    assert described(nothing) == before


def fresh_state(data: Splits, recipe: Any) -> TrainingState:
    networks = jobs.classifier_task(recipe, data).networks()
    return TrainingState(networks, {k: make_optimizer(net, recipe.training) for k, net in networks.items()})


def described(state: TrainingState) -> Any:
    """All of a state in values that can be compared."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value.state_dict() and plain(dict(value.state_dict())) if hasattr(value, "state_dict") else value

    return plain(vars(state))


class Payload:
    """What unpickling would run."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_checkpoint_is_never_unpickled(data: Splits, tmp_path: Path) -> None:
    jobs.train_classifier(classifier_recipe(steps=2), data, out=tmp_path / "run", device="cpu")
    (tmp_path / "run" / BEFORE).unlink()
    torch.save({"step": Payload(tmp_path / "owned")}, tmp_path / "run" / LAST)
    with pytest.raises(runs.RunError, match="not a safetensors file"):
        jobs.train_classifier(classifier_recipe(steps=2), data, out=tmp_path / "run", device="cpu", resume=True)
    assert not (tmp_path / "owned").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_keeps_the_last_checkpoint(data: Splits, tmp_path: Path) -> None:
    recipe, out, whole = classifier_recipe(steps=4), tmp_path / "full", tmp_path / "whole"
    jobs.train_classifier(recipe, data, out=whole, device="cpu")

    def no_room(_: Path, packed: bytes) -> int:
        with Path("/dev/full").open("wb") as file:
            return file.write(packed)

    def fill(step: int, _: int) -> None:
        if step == 2:  # from here on, what the next checkpoint is written to has no room
            full.setattr(Path, "write_bytes", no_room)

    said = r"disk is full: .*the last whole checkpoint.safetensors is still there"
    with pytest.MonkeyPatch.context() as full, pytest.raises(runs.RunError, match=said):
        jobs.train_classifier(recipe, data, out=out, device="cpu", progress=fill)
    assert step_of(out) == 1
    assert not list(out.glob(".*.tmp"))
    jobs.train_classifier(recipe, data, out=out, device="cpu", resume=True)
    assert weights(out) == weights(whole)
    assert records(out) == records(whole)


# What is refused, and what went wrong --------------------------------------------------------------------------------


def test_the_test_split_is_refused(data: Splits, classifier: nn.Module, tmp_path: Path) -> None:
    wrong = Splits(train=data.test, val=data.val, test=data.test, class_names=data.class_names, source="digits")
    with pytest.raises(ValueError, match="training on the 'test' split is refused"):
        jobs.train_classifier(classifier_recipe(), wrong, out=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="training on the 'test' split is refused"):
        jobs.train_defense(defense_recipe(), classifier, wrong, out=tmp_path, device="cpu")


def test_a_loss_that_is_no_number(data: Splits, tmp_path: Path) -> None:
    recipe = classifier_recipe(lr=1e30, checkpoint_seconds=1e9)
    said = (
        r"at step [12] a loss is not a number, cross_entropy = (nan|inf); there is no checkpoint yet\. "
        r"Go on with --resume and a lower training\.lr, or set training\.clip"
    )
    with pytest.raises(DivergedError, match=said):
        jobs.train_classifier(recipe, data, out=tmp_path, device="cpu")


def test_a_run_that_diverged_goes_on_with_a_lower_rate(data: Splits, tmp_path: Path) -> None:
    # The rate rises by 1,000 a step: the first weights are sound, the later ones finite, but nothing is learned.
    def recipe(lr: float, **training: Any) -> Any:
        return classifier_recipe(**{"lr": lr, "steps": 30, "warmup": 0.98, "log_every": 100, **training})

    with pytest.raises(DivergedError) as error:
        jobs.train_classifier(recipe(3e4), data, out=tmp_path, device="cpu")
    last = step_of(tmp_path)
    assert 1 <= last < 29
    said = f"at step {last + 1} .*no longer sound: .* reaches .*; the last good checkpoint is .*checkpoint.safetensors"
    assert re.search(said, str(error.value))
    kept = runs.load_tensors(tmp_path / LAST)
    assert max(float(v.abs().max()) for k, v in kept.items() if k.startswith("networks/") and "running" not in k) <= 1e5

    with pytest.raises(
        runs.RunError, match=r"another run: training.batch was \d+ and is 8 now\."
    ):  # slower, but not otherwise
        jobs.train_classifier(recipe(1e-3, batch=8), data, out=tmp_path, device="cpu", resume=True)
    steps: list[int] = []
    jobs.train_classifier(
        recipe(1e-3), data, out=tmp_path, device="cpu", resume=True, progress=lambda step, _: steps.append(step)
    )
    assert steps == list(range(last + 1, 31))
    there = runs.read_json(tmp_path / "recipe.json")
    assert there["training"]["lr"] == 1e-3
    assert there["changes"] == [{"diverged_at": last + 1, "training_before": {"lr": 3e4}}]
    jobs.train_classifier(recipe(1e-3), data, out=tmp_path, device="cpu", resume=True)
    with pytest.raises(runs.RunError, match=r"another run: training.lr was 0.001 and is 0.002 now\."):
        jobs.train_classifier(recipe(2e-3), data, out=tmp_path, device="cpu", resume=True)


def test_wrong_names_are_met_before_anything_is_trained(data: Splits, classifier: nn.Module, tmp_path: Path) -> None:
    values = defense_recipe().model_dump(mode="json")
    for attack, message in (
        ({"name": "fgms", "eps": 0.1}, "unknown attack 'fgms'. Did you mean 'fgsm'"),
        ({"name": "pgd", "eps": 0.1, "step": 3}, "option of attack 'pgd', 'step'. Did you mean 'steps'"),
    ):
        values["adversarial_batches"]["attacks"] = [attack]
        with pytest.raises(UnknownNameError, match=message):
            jobs.train_defense(resolve(values), classifier, data, out=tmp_path / "new", device="cpu")
    values["adversarial_batches"]["attacks"] = [{"name": "jsma"}]
    values["defense"] = {"name": "denoised_smoothing", "denoiser": {"width": 4}}
    with pytest.raises(ValueError, match="seeks the nearest point at which one answer changes, and a random model's"):
        jobs.train_defense(resolve(values), classifier, data, out=tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()


# The loop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_learning_rate(schedule: Any) -> None:
    of = Training(steps=110, lr=0.5, warmup=1 / 11, schedule=schedule)
    rates = [learning_rate(of, step, 110) for step in range(110)]
    assert rates[:11] == pytest.approx([0.5 * (k + 1) / 11 for k in range(10)] + [0.5])
    done = [k / 100 for k in range(100)]
    down = {
        "constant": [0.5] * 100,
        "cosine": [0.25 + 0.25 * math.cos(math.pi * d) for d in done],
        "linear": [0.5 - 0.5 * d for d in done],
    }
    assert rates[10:] == pytest.approx(down[schedule])


def test_length_of_a_run() -> None:
    assert total_steps(Training(steps=7), 1000) == 7
    assert total_steps(Training(epochs=2, batch=64), 1000) == 32  # 31.25 batches
    assert total_steps(Training(epochs=0.001, batch=64), 100) == 1


def small_task(data: Splits, batch: int = 16) -> PlainClassifier:
    torch.manual_seed(1)
    net = create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
    return PlainClassifier(net, Sampler(data.train, batch, 0, Augmentation(), torch.device("cpu")))


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def test_the_weight_average_against_its_recurrence(data: Splits, tmp_path: Path) -> None:
    task = small_task(data)
    path = [snapshot(task.classifier)]
    train(
        task,
        Training(**settings(steps=6, ema=0.5, memory_format="channels_last")),
        tmp_path,
        device="cpu",
        progress=lambda *_: path.append(snapshot(task.classifier)),
    )
    average = path[0]
    for step, now in enumerate(path[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = {k: decay * average[k] + (1 - decay) * now[k] for k in average}
    assert not torch.equal(path[-1]["net.0.weight"], path[0]["net.0.weight"])
    for key, value in task.classifier.state_dict().items():
        torch.testing.assert_close(value, average[key])


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_the_best_weights_are_kept(ema: float, data: Splits, tmp_path: Path) -> None:
    task = small_task(data)
    seen: list[dict[str, Tensor]] = []

    def validate() -> Mapping[str, float]:
        seen.append(snapshot(task.classifier))
        return {"score": [0.1, 0.7, 0.9, 0.9, 0.2][len(seen) - 1]}

    every = 2 * 16 / len(data.train)
    outcome = train(
        task,
        Training(**settings(steps=9, ema=ema, keep="best", validate_every=every)),
        tmp_path,
        device="cpu",
        validate=validate,
    )
    assert [r["step"] for r in records(tmp_path) if "validation" in r] == [2, 4, 6, 8, 9]
    assert (outcome.kept_step, outcome.validation) == (6, {"score": 0.9})
    assert all(torch.equal(v, seen[2][k]) for k, v in task.classifier.state_dict().items())
    assert not task.classifier.training


def test_one_clipped_step_of_plain_descent(data: Splits, tmp_path: Path) -> None:
    task = small_task(data)
    images, labels = task.batch(0)
    before = snapshot(task.classifier)
    loss = F.cross_entropy(task.classifier(images), labels)
    gradients = torch.autograd.grad(loss, list(task.classifier.parameters()))
    length = torch.stack([g.norm() for g in gradients]).norm()
    of = settings(steps=1, optimizer="sgd", betas=(0.0, 0.9), lr=0.1, schedule="constant", clip=0.01)
    train(task, Training(**of), tmp_path, device="cpu")
    assert float(length) > 0.01
    for (key, now), gradient in zip(task.classifier.named_parameters(), gradients):
        torch.testing.assert_close(now.detach(), before[key] - 0.1 * 0.01 / length * gradient, rtol=1e-4, atol=1e-7)


def test_vectors_do_not_decay(data: Splits, tmp_path: Path) -> None:
    task = small_task(data)
    groups = make_optimizer(task.classifier, Training(steps=1, weight_decay=0.3)).param_groups
    decayed = {p.dim() >= 2: g["weight_decay"] for g in groups for p in g["params"]}
    assert decayed == {True: 0.3, False: 0.0}
    assert sum(len(g["params"]) for g in groups) == len(list(task.classifier.parameters()))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (1, 5)])
def test_orthogonalized_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalized(matrix) @ vh.T
    values = inside.diagonal()
    assert float((inside - values.diag()).abs().max()) < 1e-4
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.25


def test_muon_moves_vectors_as_adamw_does_and_kernels_by_the_same_length() -> None:
    torch.manual_seed(0)
    vector, kernel = torch.randn(7), torch.randn(8, 4, 3, 3)
    ours, theirs = [[nn.Parameter(t.clone()) for t in (vector, kernel)] for _ in range(2)]
    muon = Muon(ours, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        before = ours[1].detach().clone()
        muon.step()
        adamw.step()
        step = (ours[1].detach() - before * (1 - 0.01 * 0.1)) / 0.01
        assert 0.12 < float(step.square().mean().sqrt()) < 0.25  # Adam's, of noise, is about 0.2 in the long run
    torch.testing.assert_close(ours[0], theirs[0])


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "world"), [(b, w) for b in (1, 5, 16, 37, 50, 100) for w in (1, 2, 3) if w <= b])
def test_each_image_exactly_once_an_epoch(batch: int, world: int, data: Splits) -> None:
    few = data.train.take(torch.arange(37))
    sampler = Sampler(few, batch, 5, Augmentation(), torch.device("cpu"))
    order: list[int] = []
    for step in range(-(-3 * 37 // batch)):
        # Device r takes every world-th place of the batch.
        places = [0] * batch
        for rank in range(world):
            places[rank::world] = sampler.rows(step, rank, world).tolist()
        order += places
        again = Sampler(few, batch, 5, Augmentation(), torch.device("cpu"))
        assert again.rows(step, 0, world).tolist() == places[::world]
    epochs = [order[k * 37 : (k + 1) * 37] for k in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


ENTRIES = mixture(
    [
        {"fraction": 0.25, "attack": {"name": "fgsm", "eps": {"uniform": [0.1, 0.3]}}},
        {"fraction": 0.25, "attack": {"name": "pgd", "eps": 0.3, "steps": {"uniform": [3, 8]}, "alpha": 0.01}},
        {"fraction": 0.5, "attack": {"name": "mim", "eps": 0.05}},
    ]
)


@pytest.mark.parametrize("n", [1, 7, 16, 128])
def test_fractions_of_a_mixture(n: int) -> None:
    parts = Mixture(ENTRIES, 0).split(n)
    assert [i for part in parts for i in range(n)[part]] == list(range(n))
    assert all(abs((part.stop - part.start) - part_of * n) <= 1 for part, part_of in zip(parts, (0.25, 0.25, 0.5)))


def test_ranges_are_drawn_afresh_each_step() -> None:
    drawn = [Mixture(ENTRIES, 3).at(step) for step in range(400)]
    eps = [a[0].eps for a in drawn]  # type: ignore[attr-defined]
    assert stats.kstest(eps, stats.uniform(0.1, 0.2).cdf).pvalue > 1e-3
    steps = [a[1].steps for a in drawn]  # type: ignore[attr-defined]
    assert stats.chisquare([steps.count(k) for k in range(3, 9)]).pvalue > 1e-3
    assert set(steps) == set(range(3, 9))
    assert {a[2] for a in drawn} == {create_attack("mim", eps=0.05)}
    assert Mixture(ENTRIES, 3).at(17) == drawn[17]
    assert Mixture(ENTRIES, 4).at(17) != drawn[17]
    assert hardest(ENTRIES[1]) == ("pgd", {"eps": 0.3, "steps": 8, "alpha": 0.01})
    ranged = mixture([{"name": "pgd", "eps": {"uniform": ["2/255", "8/255"]}, "steps": 2}])
    assert all(2 / 255 <= Mixture(ranged, 1).at(step)[0].eps <= 8 / 255 for step in range(9))  # type: ignore[attr-defined]
    assert hardest(ranged[0]) == ("pgd", {"eps": 8 / 255, "steps": 2})


def test_a_list_of_two_numbers_is_a_list(classifier: nn.Module) -> None:
    entries = mixture([{"name": "patch", "area": 0.2, "scale": [0.8, 1.1], "steps": {"uniform": [1, 2]}}])
    drawn = [Mixture(entries, 1).at(step)[0] for step in range(20)]
    assert {tuple(a.scale) for a in drawn} == {(0.8, 1.1)}  # type: ignore[attr-defined]
    assert {a.steps for a in drawn} == {1, 2}  # type: ignore[attr-defined]
    images, labels, index = torch.rand(4, 1, 8, 8), torch.arange(4), torch.arange(4)
    x_adv = Mixture(entries, 1)(System("net", classifier), images, labels, index, 0)
    assert not torch.equal(x_adv, images)


def test_a_mixture_that_does_not_fit() -> None:
    with pytest.raises(RecipeError, match=r"attacks.0: eps: a range goes up, \{ uniform = \[0.1, 0.3\] \}, not down"):
        mixture([{"name": "fgsm", "eps": {"uniform": [0.3, 0.1]}}])
    with pytest.raises(RecipeError, match=r"attacks.0.fraction: Input should be greater than 0"):
        mixture([{"attack": {"name": "fgsm", "eps": 0.1}, "fraction": 0}])
    with pytest.raises(ValueError, match=r"a budget is a number or a fraction such as '8/255', not \[0.1, 0.3\]"):
        Mixture(mixture([{"name": "fgsm", "eps": [0.1, 0.3]}]), 0)


def test_each_part_of_a_batch_meets_its_own_attack(classifier: nn.Module) -> None:
    attacks = Mixture(mixture([{"name": "fgsm", "eps": 0.2}, {"name": "pgd", "eps": 0.05, "steps": 2}]), 1)
    net = System("net", classifier)
    images, labels, index = torch.rand(8, 1, 8, 8) * 0.5 + 0.25, torch.arange(8), torch.arange(8) + 100
    x_adv = attacks(net, images, labels, index, 4)
    torch.testing.assert_close(
        x_adv[:4], create_attack("fgsm", eps=0.2)(classifier, images[:4], labels[:4]), rtol=0, atol=1e-6
    )
    assert float((x_adv - images)[4:].abs().max()) <= 0.05 + 1e-6
    assert not torch.equal(x_adv[4:], attacks(net, images, labels, index, 5)[4:])  # other draws at another step
    assert torch.equal(x_adv, attacks(net, images, labels, index, 4))


class Halved(Defense):
    """Half as bright, without a gradient to give."""

    differentiable = False

    def purify(self, images: Tensor) -> Tensor:
        return images.detach() / 2

    def surrogate_backward(self, images: Tensor) -> Tensor:
        return 1 - images


def test_pairs_are_made_against_what_the_attacker_knows(data: Splits, classifier: nn.Module) -> None:
    # FGSM by hand: against the net alone, against the whole by the identity's slope, by the surrogate's opposite one.
    system, defense = System("halved", classifier.eval(), Halved()), Halved()
    sampler = Sampler(data.train, 6, 0, Augmentation(), torch.device("cpu"))
    for knowledge, seen in (
        ("oblivious", lambda x: classifier(x)),
        ("bpda", lambda x: classifier(x + (x / 2 - x).detach())),
        ("white_box", lambda x: classifier(defense.surrogate_backward(x) + (x / 2 - (1 - x)).detach())),
    ):
        config = AdversarialBatchesConfig(attacks=mixture([{"name": "fgsm", "eps": 0.1}]), knowledge=knowledge)
        batch = AdversarialBatches(sampler, config, [system]).batch(0)
        at = batch.x_real.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(seen(at), batch.y, reduction="sum"), at)
        expected = (batch.x_real + 0.1 * slope.sign()).clamp(0, 1)
        torch.testing.assert_close(batch.x_adv, expected)


# Cost and precision --------------------------------------------------------------------------------------------------

# Multiply-accumulates of convnet at 8x8, layer by layer: 4x4 kernels at stride 2 onto 4x4 and 2x2, then two matrices.
MACS = [16 * 16 * 16, 32 * 4 * 16 * 16, 128 * 100, 100 * 10]
FORWARD = 2 * sum(MACS)
# Backward costs as much again for the weights, and for the inputs of all layers but the first.
TRAINING = FORWARD + 2 * sum(MACS) + 2 * sum(MACS[1:])


@pytest.mark.parametrize("objective", ["plain", "adversarial"])
def test_cost_against_a_count_by_hand(objective: str, data: Splits) -> None:
    values = classifier_recipe(steps=10**9).model_dump(mode="json")
    values["classifier"] = {"name": "convnet"}
    flop = TRAINING
    if objective == "adversarial":
        values["objective"] = {"name": objective, "attacks": [{"name": "pgd", "eps": 0.1, "steps": 3}]}
        flop += 4 * FORWARD + 3 * FORWARD  # backward to the image passes every layer, and no weight
    recipe = resolve(values)
    task = jobs.classifier_task(recipe, data)
    before = snapshot(task.classifier)
    cost = jobs.estimate(task, recipe.training)
    pflop = flop * 16 * 1e9 / 1e15
    assert (cost.steps, cost.convolution_gflops) == (10**9, 10.0)
    assert cost.pflop == pytest.approx(pflop, rel=0.01)
    assert cost.minutes == pytest.approx(pflop * 1e15 / (0.5 * 10e9) / 60, rel=0.01)
    assert all(torch.equal(v, before[k]) for k, v in task.classifier.state_dict().items())
    assert all(p.grad is None for p in task.classifier.parameters())
    assert task.sampler.batch == 16


def test_flop_counter_survives_a_gradient_at_the_input() -> None:
    layer = nn.Linear(5, 7, bias=False)
    x = torch.rand(3, 5, requires_grad=True)
    with FlopCounter() as counter:
        torch.autograd.grad(layer(x).sum(), x)
    assert counter.total == 2 * 2 * 3 * 5 * 7


def test_the_choice_of_precision_is_kept(data: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = classifier_recipe(steps=2, precision="auto", memory_format="auto")
    monkeypatch.setattr(jobs, "autotune_precision", lambda *_: ("float32", "channels_last"))
    _, outcome = jobs.train_classifier(recipe, data, out=tmp_path, device="cpu")
    assert (outcome.precision, outcome.memory_format) == ("float32", "channels_last")
    kept = runs.read_json(tmp_path / "recipe.json")["training"]
    assert (kept["precision"], kept["memory_format"]) == ("float32", "channels_last")
    # Resumed elsewhere, where another choice would be faster.
    monkeypatch.setattr(jobs, "autotune_precision", lambda _, *of: ("bfloat16", "contiguous") if "auto" in of else of)
    _, outcome = jobs.train_classifier(recipe, data, out=tmp_path, device="cpu", resume=True)
    assert (outcome.precision, outcome.memory_format) == ("float32", "channels_last")


def test_the_probe_decides_what_is_auto_and_nothing_else(data: Splits) -> None:
    task = small_task(data, 4)
    before = snapshot(task.classifier)
    precision, layout = profiling.autotune_precision(task)
    assert precision in ("float32", "bfloat16")
    assert layout in ("contiguous", "channels_last")
    assert profiling.autotune_precision(task, precision="bfloat16")[0] == "bfloat16"
    assert profiling.autotune_precision(task, memory_format="channels_last")[1] == "channels_last"
    assert all(torch.equal(v, before[k]) for k, v in task.classifier.state_dict().items())
    rates = probe("cpu", channels=2, size=4, batch=2).rates
    assert set(rates) == set(RATES)
    assert min(rates.values()) > 0


def test_bfloat16_trains_float32_weights(data: Splits, tmp_path: Path) -> None:
    recipe = classifier_recipe(steps=3, precision="bfloat16")
    net, _ = jobs.train_classifier(recipe, data, out=tmp_path, device="cpu")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    exact, _ = jobs.train_classifier(classifier_recipe(steps=3), data, out=tmp_path / "exact", device="cpu")
    apart = [float((a - b).detach().abs().max()) for a, b in zip(net.parameters(), exact.parameters())]
    assert 0 < max(apart) < 0.05  # other rounding, the same path


def test_devices() -> None:
    before = torch.get_num_threads()
    set_threads(None)
    set_threads(1)
    assert torch.get_num_threads() == before == 1
    for threads in (0, -3, 100_000):
        with pytest.raises(ValueError, match=rf"{threads} threads were asked for; expected 1 to [0-9]+"):
            set_threads(threads)
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="unknown device 'gpu'; expected auto, cpu, cuda"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="torch sees no CUDA GPU here; use --device cpu"):
            pick_device("cuda")


# Whole jobs ----------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A net of a user's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


def by_function(images: Tensor) -> Tensor:
    return torch.zeros(len(images), 10) + images.flatten(1).sum(1, keepdim=True)


def test_a_wrapped_classifier_goes_by_the_name_of_what_was_wrapped(data: Splits) -> None:
    recipe = resolve({**defense_recipe().model_dump(mode="json"), "defense": {"name": "jpeg", "quality": 30}})
    other = data.with_class_names([str(9 - k) for k in range(10)])
    assert (wrap(Own()).called, wrap(wrap(by_function)).called) == ("Own", "by_function")
    wrong = wrap(Own(), mean=[0.1] * 3, std=[0.1] * 3)
    with pytest.raises(ValueError, match=r"the classifier of 'Own' takes images of 3 channels"):
        jobs.defense_task(recipe, other, [wrong])


def test_what_was_used_is_what_is_kept(data: Splits, classifier: nn.Module, tmp_path: Path) -> None:
    data = data.with_class_names([str(9 - k) for k in range(10)])
    filter_ = {"name": "jpeg", "quality": 30}
    values = {**defense_recipe().model_dump(mode="json"), "dataset": "mnist", "size": None, "defense": filter_}
    values["adversarial_batches"]["attacks"] = [{"name": "fgsm", "eps": {"uniform": ["2/255", "8/255"]}}]
    recipe, own = resolve(values), Own()
    folder = tmp_path / "run"
    jobs.train_defense(recipe, [own, classifier], data, out=folder, device="cpu")
    kept = runs.read_json(folder / "recipe.json")
    assert (kept["dataset"], kept["size"], kept["classifiers"]) == ("digits", 8, ["in hand: Own", "in hand: convnet"])
    again = {key: kept[key] for key in ("dataset", "size", "class_names", "skip_damaged")}
    read_again = load_dataset(**resolve({**values, **again}).data_options)
    assert read_again.class_names == data.class_names
    assert torch.equal(read_again.test.labels, data.test.labels)
    assert kept["used"]["data"] == {"source": "digits", "fingerprint": data.train.fingerprint, "shape": [1, 8, 8]}
    first, second = kept["used"]["classifiers"]
    assert first == {"name": "Own", "spec": None, "weights": runs.digest_of(own.state_dict())[:16]}
    assert second["spec"]["name"] == "convnet"
    about = runs.read_json(folder / "defense.json")["about"]
    assert (about["dataset"], about["classifiers"]) == ("digits", kept["used"]["classifiers"])
    assert (
        load_defense(folder).outcome
        == jobs.train_defense(recipe, [own, classifier], data, out=folder, device="cpu", resume=True).outcome
    )
    with torch.no_grad():
        own.layer.bias.add_(1)
    with pytest.raises(runs.RunError, match=r"another run: classifiers.0.weights was \w+ and is \w+ now\."):
        jobs.train_defense(recipe, [own, classifier], data, out=folder, device="cpu", resume=True)
    again = recipe.model_copy(update={"start": str(folder)})
    with pytest.raises(runs.RunError, match=r"cannot start with .*, the folder that it is to write"):
        jobs.train_defense(again, [own, classifier], data, out=folder, device="cpu", resume=True)


def test_a_run_folder_rebuilds_what_was_trained(data: Splits, classifier: nn.Module, tmp_path: Path) -> None:
    images, labels = data.val.batch(torch.arange(len(data.val)))
    recipe = classifier_recipe(steps=40, batch=64, lr=0.01).model_copy(
        update={"classifier": ComponentConfig(name="convnet")}
    )
    trained, outcome = jobs.train_classifier(recipe, data, out=tmp_path / "c", device="cpu")
    assert torch.equal(load_classifier(tmp_path / "c")(images), trained(images))
    assert outcome.validation["score"] == pytest.approx(float((trained(images).argmax(1) == labels).float().mean()))
    assert outcome.validation["score"] > 0.3  # ten classes

    before = snapshot(classifier)
    defense = jobs.train_defense(defense_recipe(steps=2), classifier, data, out=tmp_path / "d", device="cpu")
    assert torch.equal(load_defense(tmp_path / "d").purify(images), defense.purify(images))
    assert all(torch.equal(v, before[k]) for k, v in classifier.state_dict().items())
    assert set(defense.outcome.validation) == {"clean", "fgsm-0", "pgd-1", "score"}
    terms = {"discrimination", "repair", "recovery", "isomorphic", "label", "adversarial"}
    assert terms <= set(records(tmp_path / "d")[0])


def test_a_run_starts_with_the_weights_of_another(data: Splits, classifier: nn.Module, tmp_path: Path) -> None:
    first = jobs.train_defense(defense_recipe(steps=2), classifier, data, out=tmp_path / "first", device="cpu")
    recipe = defense_recipe().model_copy(update={"start": str(tmp_path / "first")})
    task = jobs.defense_task(recipe, data, [classifier], "cpu")
    assert {k: v.tolist() for k, v in task.defense.state_dict().items()} == {
        k: v.tolist() for k, v in first.state_dict().items()
    }
    wider = recipe.defense.model_copy(update={"generator": {"name": "ape", "width": 8}})
    with pytest.raises(runs.RunError, match=r"first: its networks are not those of this recipe"):
        jobs.defense_task(recipe.model_copy(update={"defense": wider}), data, [classifier], "cpu")
    with pytest.raises(runs.RunError, match=r"nothing holds no trained defense"):
        jobs.defense_task(recipe.model_copy(update={"start": str(tmp_path / "nothing")}), data, [classifier], "cpu")


def test_a_run_may_start_without_a_part_that_adds_nothing_yet(tmp_path: Path) -> None:
    unet = {"name": "unet", "width": 4}
    first = create_defense("paired_gan", channels=1, generator=unet)
    torch.nn.init.normal_(first.generator.head.weight)  # type: ignore[union-attr,arg-type]
    save_defense(tmp_path, first, {})
    gated = create_defense("paired_gan", channels=1, generator={**unet, "gate": True})
    jobs.begin_with(gated, str(tmp_path))
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(gated.purify(images), first.purify(images))
    deeper = create_defense("paired_gan", channels=1, generator={**unet, "blocks": 2})  # a fresh block adds something
    with pytest.raises(runs.RunError, match="its networks are not those of this recipe"):
        jobs.begin_with(deeper, str(tmp_path))


def test_validation_judges_the_mixture_at_its_hardest(data: Splits, classifier: nn.Module, tmp_path: Path) -> None:
    recipe = defense_recipe(steps=2, keep="last", validate_every=None)
    defense = jobs.train_defense(recipe, classifier, data, out=tmp_path, device="cpu")
    images, labels = data.val.batch(torch.arange(len(data.val)))
    behind = nn.Sequential(defense, classifier.eval())
    shown = {"clean": images}
    for number, (name, options) in enumerate([("fgsm", {"eps": 0.3}), ("pgd", {"eps": 0.2, "steps": 2})]):
        attack = create_attack(name, **options)
        shown[f"{name}-{number}"] = attack(behind, images, labels, index=data.val.index)
    right = {k: float((behind(x).argmax(1) == labels).float().mean()) for k, x in shown.items()}
    found = defense.outcome.validation
    for key, value in right.items():
        assert found[key] == pytest.approx(value, abs=2.1 / len(images))  # the fused copy rounds otherwise
    assert found["score"] == pytest.approx(min(found[k] for k in right), abs=1e-4)  # of who looks, the lowest


def test_validation_by_attacks_of_its_own(data: Splits, classifier: nn.Module, tmp_path: Path) -> None:
    recipe = defense_recipe(steps=1, keep="last", validate_every=None)
    own = {"val_attacks": [{"name": "apgd", "eps": 0.3, "steps": 3, "loss": "margin"}], "knowledge": "oblivious"}
    batches = AdversarialBatchesConfig(**(recipe.adversarial_batches.model_dump() | own))
    recipe = recipe.model_copy(update={"adversarial_batches": batches})
    found = jobs.train_defense(recipe, classifier, data, out=tmp_path, device="cpu").outcome.validation
    assert set(found) == {"clean", "apgd-0", "score"}
    assert found["score"] == pytest.approx((found["clean"] + found["apgd-0"]) / 2, abs=1e-4)


def test_perturbations_of_pairs_grow_along_the_ramp(data: Splits, classifier: nn.Module) -> None:
    sampler = Sampler(data.train, 6, 0, Augmentation(), torch.device("cpu"))
    config = AdversarialBatchesConfig(attacks=mixture([{"name": "fgsm", "eps": 0.2}]), ramp=4)
    batches = AdversarialBatches(sampler, config, [System("net", classifier.eval())])
    far = [float((b.x_adv - b.x_real).abs().max()) for b in map(batches.batch, range(6))]
    assert far == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2], abs=1e-6)


TWO = """
import functools, json, os, sys
import torch
torch.set_num_threads(1)
from unperturb.classifiers import load_classifier
from unperturb.config import resolve
from unperturb.data import load_dataset
from unperturb.devices import Speed
from unperturb.training import jobs, loop


def autotune_precision(task, *of):
    if "auto" not in of:
        return of
    assert not int(os.environ.get("LOCAL_RANK", "0")), "each process chooses for itself"
    return "float32", "channels_last"


rates = {("float32", "contiguous"): 10.0, ("float32", "channels_last"): 10.0}
loop.probe, jobs.autotune_precision = functools.cache(lambda device="cpu": Speed(rates)), autotune_precision
data, out = load_dataset("digits", size=8), sys.argv[1]
for name, values in json.loads(sys.argv[2]).items():
    recipe = resolve(values)
    if recipe.kind == "classifier":
        jobs.train_classifier(recipe, data, out=f"{out}/{name}", device="cpu", devices=2)
    else:
        jobs.train_defense(recipe, load_classifier(f"{out}/net"), data, out=f"{out}/{name}", device="cpu", devices=2)
odd = resolve(values | {"training": values["training"] | {"batch": 15}})
try:
    jobs.train_defense(odd, load_classifier(f"{out}/net"), data, out=f"{out}/odd", device="cpu", devices=2)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(data: Splits, classifier: nn.Module, tmp_path: Path) -> None:
    fixed = {"optimizer": "sgd", "lr": 0.05, "steps": 3, "log_every": 1}
    net = classifier_recipe(**fixed, precision="auto", memory_format="auto")
    net = net.model_copy(update={"classifier": ComponentConfig(name="convnet")})  # without batch norm
    gan = defense_recipe(**{**fixed, "lr": 1e-3, "keep": "last", "ema": 0, "validate_every": None})
    hgd = gan.model_copy(update={"defense": ComponentConfig(name="hgd", denoiser={"width": 4})})
    recipes = {"classifier": net, "gan": gan, "hgd": hgd}
    two = tmp_path / "two"
    save_classifier(two / "net", classifier)
    (tmp_path / "two.py").write_text(TWO)
    written = json.dumps({name: recipe.model_dump(mode="json") for name, recipe in recipes.items()})
    command = [sys.executable, str(tmp_path / "two.py"), str(two), written]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 devices cannot share a batch of 15 evenly") == 2  # each process says so, none waits
    training = net.training.model_copy(update={"precision": "float32", "memory_format": "channels_last"})
    one, _ = jobs.train_classifier(
        net.model_copy(update={"training": training}), data, out=tmp_path / "classifier", device="cpu"
    )
    for name in ("gan", "hgd"):
        jobs.train_defense(recipes[name], load_classifier(two / "net"), data, out=tmp_path / name, device="cpu")
    for name in recipes:
        found, expected = records(two / name), records(tmp_path / name)
        assert [r["step"] for r in found] == [1, 2, 3]  # the first process alone keeps the log
        assert runs.read_json(two / name / "recipe.json") == runs.read_json(tmp_path / name / "recipe.json")
        # Batch norm sees the images of one process alone: of the GAN, the first step's losses are only near.
        rtol, steps = (0.05, 1) if name == "gan" else (1e-3, 3)
        for ours, theirs in list(zip(found, expected))[:steps]:
            assert ours == pytest.approx(theirs, rel=rtol, abs=1e-6)
    for a, b in zip(one.state_dict().values(), load_classifier(two / "classifier").state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
