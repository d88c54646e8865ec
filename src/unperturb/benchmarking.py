"""One call, one verdict: what a model is worth against the ladder of attackers, and how far to believe it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict, Unpack

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor, nn

    from unperturb.data import ImageSet
    from unperturb.defenses import Defense
    from unperturb.evaluation.costs import Cost
    from unperturb.evaluation.plan import Plan
    from unperturb.results.card import Card
    from unperturb.results.flags import Flag
    from unperturb.results.results import Results
    from unperturb.results.robust import RobustAccuracy
    from unperturb.systems import System

IMAGES = 1000  # that are judged where nobody says how many
UNDEFENDED = "undefended"  # what tables call the classifier that stands without its defense beside a defended system


@dataclass(frozen=True, eq=False)
class Benchmark:
    """What `benchmark` found. Numbers lie in [0, 1].

    system: its name. clean: accuracy when nobody attacks. robust: robust accuracy with its interval against everything
    that was tried. flags: why not to believe it, the worst first. results: all rows. settings: what fixes the run.
    cost: PFLOP at most, told beforehand. seconds: that it took, this time.
    """

    system: str
    clean: float
    robust: RobustAccuracy
    flags: list[Flag]
    results: Results
    settings: dict[str, Any]
    cost: Cost
    seconds: float
    _temporary: Any = None  # the folder of rows and samples, which goes with this object

    @property
    def card(self) -> Card:
        """All of it on one page."""
        from unperturb.results.card import Card

        threat = self.robust.threat_model
        return Card(self.results, system=self.system, threat_model=threat, flags=self.flags, settings=self.settings)

    def write_card(self, out: str | Path) -> dict[str, Path]:
        """The card as one self-contained page, as Markdown and as JSON (`card.html`, `card.md`, `card.json`) in the
        folder `out`; the paths by what they are."""
        return self.card.write(out)

    def __str__(self) -> str:
        from unperturb.results.figures import attacker_title
        from unperturb.results.ladder_figure import ladder
        from unperturb.results.names import attacker_name, budget_name, norm_name
        from unperturb.results.render import flag_text, percent, percent_of
        from unperturb.results.robust import Judged

        threat = self.robust.threat_model
        assert threat is not None
        judged = Judged.of(self.results, self.robust.block, self.system)
        budget = f"{norm_name(threat.norm)} {budget_name(float(threat.eps))}"
        lines = [f"{self.system}: {self.robust.n:,} images of {self.robust.block.dataset}, {budget}"]
        who = " and ".join(map(attacker_name, self.robust.tried))
        lines.append(f"  robust accuracy  {percent_of(self.robust)}, attackers up to {who}")
        if self.robust.draws > 1:
            lines.append(f"  worst of {self.robust.draws} draws  {percent(self.robust.worst)}")
        for step in ladder(judged, threat.norm, float(threat.eps)):
            if step.tried:
                name = attacker_title(step.knowledge, defended=judged.defended)
                lines.append(f"  {name:15}  {percent(step.accuracy, step.low, step.high)}{self._by(step.knowledge)}")
        lines += [f"  {flag_text(flag)}" for flag in self.flags] or ["  no flag was raised"]
        return "\n".join(lines)

    def _by(self, knowledge: str) -> str:
        """How the attacker of this knowledge has trained a purifier, if he has."""
        steps = self.settings.get("surrogate_defense", "")
        return f"  ({steps})" if steps and knowledge == "gray_box" else ""


class Options(TypedDict, total=False):
    """What fixes a benchmark beside model and data; see `benchmark`."""

    norm: Literal["linf", "l2"]
    eps: float | str
    budget: str
    n: int | None
    name: str
    base: nn.Module | None
    surrogate: nn.Module | None
    surrogate_defense: Defense | str | None
    draws: int
    seed: int
    batch: int
    device: str


def benchmark(
    model: Callable[[Tensor], Any] | System,
    data: Any,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    quiet: bool = False,
    **options: Unpack[Options],
) -> Benchmark:
    """Send the ladder of attackers against `model` and say what is left.

    model: what is deployed: any callable from images `(N, C, H, W)` in [0, 1] to logits `(N, K)` (see `wrap` for other
    answers), a `Protected`, or a `System`. data: test images with labels: an `ImageSet` such as
    `load_dataset("mnist").test`, or what `as_image_set` takes. out: run folder, in which a stopped benchmark goes on
    with `resume` (default: a temporary one). progress: gets (done, total, cell) in place of the bar shown unless
    `quiet`.

    options: norm (`"linf"`) and eps (`"8/255"`): every attacker's budget, the norm `"linf"` or `"l2"`. budget: what the
    attackers may spend: `"quick"`, `"standard"` (AutoAttack's settings in the white box; the default) or `"thorough"`.
    n: a fixed random subset of so many images (1,000, or all of fewer). name: what tables call the model. base: the
    undefended classifier, where `model` is another net in its place. surrogate: another classifier, for transfer.
    surrogate_defense: the attacker's own purifier, or its run folder, for the gray box; with `"retrain"` he trains one
    by the model's own recipe, with `"retrain:500"` in 500 steps. draws: how often each image is shown to a random model
    (10). seed, batch, device.

    Raises `TypeError` or `ValueError`, which say what to pass, before anything is computed, and `ModelError` where a
    model fails.
    """
    from unperturb.evaluation.costs import estimate
    from unperturb.evaluation.run import run_in_hand

    start = time.perf_counter()
    plan = benchmark_plan(model, data, **options)
    cost = estimate(plan)
    settings = _settings(plan, options)
    folder = tempfile.TemporaryDirectory() if out is None else None
    where = Path(out) if out is not None else Path(folder.name if folder else "") / "run"
    rows = run_in_hand(plan, where, settings=settings, resume=resume, progress=progress, quiet=quiet)
    return replace(_verdict(plan, rows, settings, cost, time.perf_counter() - start), _temporary=folder)


def benchmark_plan(model: Callable[[Tensor], Any] | System, data: Any, **options: Unpack[Options]) -> Plan:
    """What `benchmark` would do, checked; `unperturb.evaluation.plan.estimate` tells its cost."""
    from unperturb.data import as_image_set
    from unperturb.devices import pick_device
    from unperturb.evaluation.checks import check_number, subset, system_of
    from unperturb.evaluation.ladder import check_norm, ladder
    from unperturb.evaluation.plan import Cascade, Plan
    from unperturb.evaluation.surrogates import is_retrain, retrained, surrogates_of
    from unperturb.mistakes import named
    from unperturb.systems import System
    from unperturb.threat_models import ThreatModel

    check_norm(options.get("norm", "linf"))
    threat = ThreatModel(options.get("norm", "linf"), options.get("eps", "8/255"))
    numbers = {"draws": options.get("draws", 10), "seed": options.get("seed", 0), "batch": options.get("batch", 200)}
    for what, number in numbers.items():
        check_number(what, number, 0 if what == "seed" else 1)
    images, n = as_image_set(data), options.get("n")
    images = subset(images, min(IMAGES, len(images)) if n is None else n)
    system = system_of(model, options.get("name", "model"), options.get("base"))
    system.check_data(images)
    device = pick_device(options.get("device", "auto"))
    own = options.get("surrogate_defense")
    surrogates = surrogates_of(options.get("surrogate"), own)
    with named(f"{system.name!r}, at a first look,"):
        hidden = _hidden(system, images, device, options.get("surrogate"))
    if is_retrain(own) and "gray_box" in hidden:
        raise ValueError(f"surrogate_defense is {own!r}, but the undefended classifier gives no gradient to train with")
    attackers = ladder(
        threat,
        options.get("budget", "standard"),
        classes=images.classes,
        transfer="transfer" in surrogates,
        gray_box="gray_box" in surrogates or is_retrain(own),
        hidden=hidden,
    )
    return Plan(
        data=images,
        systems=[system] if system.undefended else [System(UNDEFENDED, system.bare), system],
        attackers=attackers,
        surrogates=surrogates,
        retrained=retrained(own, attackers, [system], images),
        cascade=Cascade(threat),
        device=device,
        draws=numbers["draws"],
        seed=numbers["seed"],
        batch=numbers["batch"],
    )


def model_from(
    entry: str,
    data: ImageSet,
    *,
    defense: str | None = None,
    weights: Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module | System:
    """The model that a command names: a run folder, `zoo:NAME`, an ONNX file, or `module:object`, which may be a
    `Protected` or a `System` too; behind the defense of that run folder or name, if any.

    weights, mean, std: of a model of one's own (`unperturb.unsaved.import_classifier`); a `Protected` takes weights, an
    ONNX file mean and std, and what is given to a model that does not take it is refused. Raises `ValueError` or
    `RunError`, which say what is wrong.
    """
    from unperturb.classifiers import load_classifier, wrap
    from unperturb.defenses import Protected, load_defense
    from unperturb.systems import System
    from unperturb.unsaved import import_classifier, import_object, is_import_path, load_weights

    def refuse(what: str, **given: object) -> None:
        if unused := [f"--{option}" for option, value in given.items() if value is not None]:
            raise ValueError(f"{entry} is {what}: leave out {', '.join(unused)}")

    if is_import_path(entry):
        model = import_object(entry)
        if isinstance(model, System):
            refuse("a System, which is judged as it is", weights=weights, mean=mean, std=std)
        elif isinstance(model, Protected):
            refuse("a Protected, whose classifier normalizes its own input", mean=mean, std=std)
            if weights is not None:
                load_weights(model, weights)
        else:
            model = import_classifier(entry, data, weights=weights, mean=mean, std=std)
    elif entry.endswith(".onnx"):
        refuse("an ONNX file, which holds its weights", weights=weights)
        model = wrap(entry, mean, std)
    else:
        refuse("no model of your own (module:object)", weights=weights, mean=mean, std=std)
        model = load_classifier(entry)
    return model if defense is None else Protected(model, load_defense(defense))


def _hidden(system: System, images: ImageSet, device: torch.device, surrogate: nn.Module | None) -> set[str]:
    """The kinds of knowledge that meet no gradient at all."""
    import torch

    x, _ = images.batch(torch.arange(1), device)
    found = set()
    if not _gives_gradient(system.bare.to(device), x):
        found |= {"oblivious", "gray_box"}
    if not _gives_gradient(system.classifier.to(device), x):
        found |= {"bpda", "white_box"}
    if not _gives_gradient(system.model.to(device), x):
        found.add("white_box")
    if surrogate is not None and not _gives_gradient(surrogate.to(device), x):
        raise ValueError("a transfer attack is made on the surrogate by its gradients, and this one gives none")
    return found


def _gives_gradient(model: nn.Module, images: Tensor) -> bool:
    import torch

    from unperturb.modules import ask, evaluating

    with torch.enable_grad(), evaluating(model.modules()):
        answer = ask(model, images.clone().requires_grad_())
    return bool(answer.requires_grad)


def _settings(plan: Plan, options: Options) -> dict[str, Any]:
    """What fixes the run, for its recipe and its card."""
    threat = plan.cascade.threat if plan.cascade else None
    assert threat is not None
    return {
        "kind": "benchmark",
        "budget": options.get("budget", "standard"),
        "norm": threat.norm,
        "eps": str(options.get("eps", "8/255")),
        "data": plan.data.source,
        "split": plan.data.name,
        "n": len(plan.data),
        "draws": plan.draws,
        "seed": plan.seed,
        **({"surrogate_defense": own.name} if (own := plan.retrained.get(plan.systems[-1].name)) else {}),
    }


def _verdict(plan: Plan, rows: pd.DataFrame, settings: dict[str, Any], cost: Cost, seconds: float) -> Benchmark:
    from unperturb.results.flags import flags_of
    from unperturb.results.results import Results
    from unperturb.results.robust import robust_accuracy

    results, system = Results(rows), plan.systems[-1].name
    assert plan.cascade is not None
    robust = robust_accuracy(results, plan.cascade.threat, system=system)
    flags = [flag for flag in flags_of(results) if flag.system == system]
    return Benchmark(system, robust.clean, robust, flags, results, settings, cost, seconds)
