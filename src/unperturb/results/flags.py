"""Doubts: what rows and a short probe say against believing a result. No robust accuracy stands without its flags."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from unperturb.intervals import wilson
from unperturb.results.cases import LEAST, WHOLE, Ahead, Case, cases_of, slack
from unperturb.results.names import budget_name, norm_name
from unperturb.threat_models import KNOWLEDGE

if TYPE_CHECKING:
    import pandas as pd

    from unperturb.results.results import Results

Severity = Literal["broken", "doubt", "note"]
SEVERITIES: tuple[Severity, ...] = ("broken", "doubt", "note")

# Fractions of the images.
BEATEN = 0.002  # by so much a weaker attacker may be ahead: AutoAttack's own check of Square
POINT = 0.01  # by so much a search may differ from its repetition
LARGE = 0.05  # a contradiction of this size makes a number worthless, not doubtful
MASKED = 0.1  # of the gradients: a ReLU net has none that are exactly zero, rounding and saturation nearly all
DRAWS = 10  # with fewer, the worst of N says little
LISTED = 5  # images that a sentence names

# What explains other flags stands before them.
_CAUSES = ("batch-dependent", "random-answers", "exact-pixels", "wrong-gradient", "gradient-masked")
_MINIMAL = ("CW", "DDN", "DeepFool", "EAD", "FAB", "FMN")  # attacks by gradients without any budget
_NEAREST = (*_MINIMAL, "HopSkipJump", "RayS", "JSMA")  # stop at the boundary, and give the image back where they fail


@dataclass(frozen=True)
class Flag:
    """One doubt about one system.

    number, name: of `FLAGS`. severity: "broken": the number or the system is not what it seems; "doubt": the number may
    be too high; "note": to be known when reading it. says: one sentence, with numbers. evidence: these numbers.
    dataset, classifiers: where it was seen; `says` is of the worst.
    """

    number: int
    name: str
    severity: Severity
    system: str
    says: str
    evidence: dict[str, Any] = field(default_factory=dict)
    dataset: str = ""
    classifiers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What a check found: a sentence, its numbers, how much of the images is concerned, in [0, 1] (larger first), and a
    severity of its own where it is less grave than the flag's."""

    says: str
    evidence: dict[str, Any]
    weight: float
    severity: Severity | None = None


Check = Callable[[Case], Finding | None]


@dataclass(frozen=True)
class FlagKind:
    """One entry of `FLAGS`. severity: the gravest that it takes. meaning: one line; `docs/flags/NAME.md` says more.
    check: what decides."""

    number: int
    name: str
    severity: Severity
    meaning: str
    check: Check


FLAGS: dict[str, FlagKind] = {}


def flags_of(results: Results) -> list[Flag]:
    """Every doubt about the systems of `results`, the most damning first; of one system and kind one, the worst."""
    found = list[tuple[float, Flag]]()
    for block, case in cases_of(results):
        for kind in FLAGS.values():
            if (finding := kind.check(case)) is not None:
                severity = finding.severity or kind.severity
                flag = Flag(kind.number, kind.name, severity, case.system, finding.says, finding.evidence)
                found.append((finding.weight, replace(flag, dataset=block.dataset, classifiers=(block.classifier,))))
    found.sort(key=lambda entry: _gravity(*entry))
    merged: dict[tuple[str, str, str], Flag] = {}
    for _, flag in found:
        key = (flag.dataset, flag.system, flag.name)
        worst = merged.setdefault(key, flag)
        if worst is not flag:
            merged[key] = replace(worst, classifiers=(*worst.classifiers, *flag.classifiers))
    return list(merged.values())


def _gravity(weight: float, flag: Flag) -> tuple[int, int, float, int]:
    cause = _CAUSES.index(flag.name) if flag.name in _CAUSES else len(_CAUSES)
    return SEVERITIES.index(flag.severity), cause, -weight, flag.number


def _flag(number: int, name: str, severity: Severity, meaning: str) -> Callable[[Check], Check]:
    def keep(check: Check) -> Check:
        FLAGS[name] = FlagKind(number, name, severity, meaning, check)
        return check

    return keep


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _budget(norm: str, eps: float) -> str:
    return f"{norm_name(norm)} {budget_name(eps)}"


def _listed(index: Iterable[Any]) -> str:
    """The first few images, in words: `images 3, 8 and others`."""
    numbers = [int(i) for i in index]
    return f"images {', '.join(map(str, numbers[:LISTED]))}" + (" and others" if len(numbers) > LISTED else "")


def _surpassed(ahead: Ahead | None, says: str) -> Finding | None:
    """A finding from who is ahead of whom; `says` has places for `{weak}`, `{images}` and `{strong}`."""
    if ahead is None:
        return None
    who = says.format(weak=ahead.weak, strong=ahead.strong, images=f"{len(ahead.images)} of {ahead.n} images")
    text = f"{who} at {_budget(ahead.norm, ahead.eps)}: {_listed(ahead.images)}"
    evidence = {"images": ahead.images[:LISTED], "count": len(ahead.images), "n": ahead.n, "fraction": ahead.fraction}
    evidence |= {"norm": ahead.norm, "eps": ahead.eps, "weak": ahead.weak, "strong": ahead.strong}
    return Finding(text, evidence, ahead.fraction, None if ahead.fraction >= LARGE else "doubt")


def _worst(found: list[Finding]) -> Finding | None:
    return max(found, key=lambda f: f.weight, default=None)


# What the probe alone can tell, or rows -------------------------------------------------------------------------------


@_flag(
    1, "random-answers", "broken", "Two calls give different answers, and the system does not say that it is random."
)
def random_answers(case: Case) -> Finding | None:
    apart = case.probe.get("repeat_difference", 0.0)
    if case.random or apart <= 1e-4:
        return None
    says = f"answers to the same images differ by {_percent(apart)} of the logits' range from call to call, and the "
    says += "system does not say that it is random: gradients were not averaged, and one draw was judged"
    return Finding(says, {"repeat_difference": apart}, 1.0)


@_flag(2, "probabilities", "doubt", "The outputs are probabilities, where attacks expect logits.")
def probabilities(case: Case) -> Finding | None:
    fraction = case.probe.get("probabilities", 0.0)
    if fraction < 0.99:  # logits may look so once, not image after image
        return None
    says = "outputs lie in [0, 1] and sum to 1: attacks apply a second softmax, whose gradient is small or none"
    return Finding(says, {"probabilities": fraction}, fraction)


@_flag(3, "gradient-masked", "broken", "Gradients are exactly zero, not finite or missing: attacks stand still.")
def gradient_masked(case: Case) -> Finding | None:
    if case.probe.get("no_gradient"):
        says, moved = "the system gives no gradient: attacks by gradients cannot move", case.seeing(*WHOLE)
        # Where none was sent, no number claims to have stood one.
        return Finding(says, {"no_gradient": 1}, 1.0, None if moved["gradients"].any() else "doubt")
    return _worst([*_zero_in_rows(case), *_zero_in_probe(case)])


def _zero_in_rows(case: Case) -> Iterable[Finding]:
    """Of images that an attack did not break: another needs no gradient, nor does one that has reached its target."""
    attacks = case.attacks[~case.attacks["attack_repr"].str.contains("targets='")]
    images = case.of(attacks).dropna(subset="zero")
    images = images[(images["wrong"] < 0.5) & (images["clean"] > 0.5) & ~images["inherited"]]
    for cell, part in images.groupby("cell"):
        zero = float(part["zero"].mean())
        if zero > MASKED and len(part) >= LEAST:
            says = f"{_percent(zero)} of the gradients of {attacks['called'][cell]} were exactly zero on the "
            says += f"{len(part)} images that it did not break"
            yield Finding(says, {"zero_gradients": zero, "robust": len(part)}, zero)


def _zero_in_probe(case: Case) -> Iterable[Finding]:
    kinds = {
        "zero_gradient_clean": "exactly zero",
        "zero_gradient_perturbed": "exactly zero after a small perturbation",
        "nan_gradient": "not finite",
    }
    for key, kind in kinds.items():
        fraction = case.probe.get(key, 0.0)
        if fraction > MASKED and fraction * case.probed >= LEAST:
            says = f"the gradient of {_percent(fraction)} of the {case.probed} images probed is {kind}"
            one_hot = case.probe.get("saturated", 0.0)
            says += ": the softmax is saturated" if one_hot > MASKED else ""
            yield Finding(says, {key: fraction, "saturated": one_hot}, fraction)


@_flag(4, "black-box-wins", "broken", "Queries break images that the white-box attacks do not.")
def black_box_wins(case: Case) -> Finding | None:
    ahead = case.ahead(case.seeing("black_box"), case.sees_most(), BEATEN)
    return _surpassed(ahead, "by answers alone {weak} breaks {images} that {strong} does not break")


@_flag(5, "autograd-inside", "doubt", "The forward pass runs backward passes of its own.")
def autograd_inside(case: Case) -> Finding | None:
    calls = case.probe.get("autograd_calls", 0)
    if not calls:
        return None
    says = f"one forward pass runs {calls} backward passes of its own, through which an attack's gradient may not flow"
    return Finding(says, {"autograd_calls": calls}, 0.0)


@_flag(
    6, "knows-more-does-worse", "broken", "An attacker who knows less breaks images that one who knows more does not."
)
def knows_more_does_worse(case: Case) -> Finding | None:
    # Flags of their own: queries, which see outputs of the whole (4), and surrogate gradients (13).
    less = [kind for kind in KNOWLEDGE if kind not in (*WHOLE, "black_box")]
    ahead = case.ahead(case.seeing(*less), case.sees_most(), BEATEN)
    return _surpassed(ahead, "{weak} breaks {images} that {strong}, which knows more, does not break")


@_flag(7, "single-step-wins", "broken", "One step breaks images that many steps do not.")
def single_step_wins(case: Case) -> Finding | None:
    # Only where the whole is attacked: on another net's images one step often transfers better.
    for kind in WHOLE:
        attacks = case.seeing(kind)
        attacks = attacks[attacks["gradients"] & (attacks["norm"] != "")]
        ahead = case.ahead(attacks[attacks["steps"] == 1], attacks[attacks["steps"] > 1], POINT)
        if ahead:
            return _surpassed(ahead, "{weak} breaks {images} that {strong}, which takes more steps, does not break")
    return None


@_flag(8, "not-monotone", "broken", "A larger budget leaves more, or half of the pixel range more than guessing.")
def not_monotone(case: Case) -> Finding | None:
    found = list[Finding]()
    for who, n, curve in _curves(case):
        limit = case.guessing(n)
        for eps, accuracy in curve:
            if eps >= 0.5 - 1e-6 and accuracy > limit:
                says = (
                    f"{who} leaves {_percent(accuracy)} at Linf {budget_name(eps)}, where every image can be made gray "
                )
                says += f"(guessing: at most {_percent(limit)})"
                found.append(Finding(says, {"eps": eps, "accuracy": accuracy, "n": n}, accuracy))
        for (eps, before), (larger, after) in itertools.pairwise(curve):
            # The few long steps of a large budget miss some images that short ones had found.
            if after - before > LARGE and (after - before) * n > LEAST:
                says = f"{who} leaves {_percent(after)} at Linf {budget_name(larger)}, and {_percent(before)} at "
                evidence = {"eps": [eps, larger], "accuracy": [before, after], "n": n}
                found.append(Finding(says + budget_name(eps), evidence, after - before))
    return _worst(found)


def _curves(case: Case) -> Iterable[tuple[str, int, list[tuple[float, float]]]]:
    """(who, images, [(eps, accuracy)] by rising eps) of the probe, and of every iterative attack that has several."""
    swept = list(zip(case.probe.get("sweep_eps", ()), case.probe.get("sweep_accuracy", ())))
    yield "PGD of the probe", case.probed, swept
    attacks = case.seeing(*WHOLE)
    for _, part in attacks[(attacks["steps"] > 1) & (attacks["norm"] == "linf")].groupby(["sees", "settings", "steps"]):
        counts = [(float(part["eps"][i]), case.robust(part.loc[[i]])) for i in part["eps"].sort_values().index]
        n = min(seen for _, (_, seen) in counts)
        yield str(part["short"].iloc[0]), n, [(eps, robust / n) for eps, (robust, seen) in counts if seen == n]


@_flag(9, "unbounded-fails", "broken", "Attacks without any budget do not break all images.")
def unbounded_fails(case: Case) -> Finding | None:
    attacks = case.seeing(*WHOLE)
    attacks = attacks[attacks["kind"].isin(_MINIMAL) & (attacks["norm"] == "")]
    if not len(attacks):
        return None
    robust, n = case.robust(attacks)
    if robust < LEAST or robust <= LARGE * n:  # with few steps a minimal-norm attack misses some of an honest net's
        return None
    names = ", ".join(dict.fromkeys(attacks["short"]))
    says = f"{robust} of {n} images withstand {names} at any distance, though every image can be made another"
    return Finding(says, {"robust": robust, "n": n}, robust / n)


@_flag(10, "not-converged", "doubt", "More steps or restarts break images that the evaluation does not.")
def not_converged(case: Case) -> Finding | None:
    attacks = case.seeing(*WHOLE)
    for _, part in attacks[attacks["steps"] > 1].groupby(["sees", "settings", "eps"], dropna=False):
        longest = part["steps"].max()
        if (part["steps"] <= longest / 2).any():
            most = part[part["steps"] == longest]
            ahead = case.ahead(most, case.attacks.drop(most.index), POINT)
            if ahead:
                return _surpassed(ahead, "{weak} breaks {images} that no other attack breaks, nor it in fewer steps")
    return _probe_goes_further(case, attacks)


def _probe_goes_further(case: Case, attacks: pd.DataFrame) -> Finding | None:
    """Whether the probe's plain PGD breaks more than the evaluation's attacks of that budget, or was not at its end."""
    norm, eps, accuracy = (case.probe.get(key) for key in ("norm", "eps", "steps_accuracy"))
    if not accuracy or norm is None or eps is None:
        return None
    attacks = attacks[(attacks["norm"] == norm) & ((attacks["eps"] - eps).abs() <= 1e-6)]
    if not len(attacks):
        return None
    (few, many), n, (robust, seen) = accuracy, case.probed, case.robust(attacks, norm, eps)
    left, budget = robust / seen, _budget(norm, eps)
    evidence = {"left": left, "n": seen, "steps_accuracy": list(accuracy), "probed": n}
    if wilson(robust, seen)[0] > wilson(round(many * n), n)[1]:  # other images: intervals are compared
        says = f"a plain PGD of {case.probe['steps'][-1]} steps leaves {_percent(many)} of {n} images at {budget}, "
        return Finding(f"{says}the evaluation's white-box attacks {_percent(left)} of {seen}", evidence, left - many)
    if few - many > LARGE and (few - many) * n > LEAST and left >= many:
        says = f"doubling the steps of PGD takes accuracy from {_percent(few)} to {_percent(many)} at {budget}, and "
        return Finding(f"{says}the evaluation, at {_percent(left)}, goes no further", evidence, few - many)
    return None


@_flag(11, "noise-does-as-well", "broken", "Random noise breaks as many images as the attack.")
def noise_does_as_well(case: Case) -> Finding | None:
    noises = case.attacks[(case.attacks["kind"] == "Noise") & (case.attacks["norm"] != "")]
    searches = case.seeing(*WHOLE)
    searches = searches[searches["gradients"] & (searches["norm"] != "")]
    for norm, eps in sorted(set(zip(noises["norm"], noises["eps"]))):
        noise, search = (a[(a["norm"] == norm) & ((a["eps"] - eps).abs() <= 1e-6)] for a in (noises, searches))
        images = case.of(noise)
        both = sorted(set(images.loc[images["clean"] > 0.5, "index"]) & set(case.of(search)["index"]))
        if not both:
            continue
        by_noise, by_search = (float(case.broken(a, norm, eps)[both].mean()) for a in (noise, search))
        least = max(POINT, LEAST / len(both))
        # Where noise breaks nothing, or the attack all but what guessing leaves, being even says nothing.
        if by_noise >= least and by_search - by_noise < least and 1 - by_search > case.guessing(len(both)):
            says = (
                f"noise breaks {_percent(by_noise)} of {len(both)} images at {_budget(norm, eps)}, white-box attacks "
            )
            evidence = {"noise": by_noise, "attacks": by_search, "n": len(both)}
            return Finding(says + _percent(by_search), evidence, 1 - by_search)
    return None


@_flag(12, "frozen-withstands", "broken", "With its draws held fixed, a random system withstands a huge budget.")
def frozen_withstands(case: Case) -> Finding | None:
    accuracy, limit = case.probe.get("frozen_accuracy"), case.guessing(case.probed)
    if accuracy is None or accuracy <= limit:
        return None
    says = f"with its draws held fixed, PGD leaves {_percent(accuracy)} at Linf 0.5 (guessing: at most "
    return Finding(
        f"{says}{_percent(limit)}): what stops the attack is not randomness", {"frozen_accuracy": accuracy}, accuracy
    )


@_flag(13, "wrong-gradient", "broken", "The gradient is not the slope of what the system computes.")
def wrong_gradient(case: Case) -> Finding | None:
    error, images = case.probe.get("difference_error", 0.0), case.probe.get("difference_images", 0)
    # Honest systems are at 0.03 at most, kinks and float32 included; a gradient that lost half of itself is at 0.5.
    if error > 0.25 and images >= 4:
        says = f"finite differences are off by {_percent(error)} from the gradient (median of {images} images): "
        return Finding(says + "attacks follow another function's slope", {"difference_error": error}, min(error, 1.0))
    ahead = case.ahead(case.seeing("bpda"), case.seeing("white_box"), BEATEN)
    return _surpassed(ahead, "by a surrogate's gradient {weak} breaks {images} that {strong} does not break")


@_flag(14, "gradients-not-aligned", "doubt", "Gradients at neighboring points have nothing in common.")
def gradients_not_aligned(case: Case) -> Finding | None:
    cosine, noise = case.probe.get("gradient_alignment"), case.probe.get("alignment_noise", 0.0)
    # Honest systems are at 0.2 and above so near an image; random directions at 0, give or take their noise.
    if cosine is None or cosine >= 3 * noise:
        return None
    says = (
        f"gradients a tenth of the budget apart have a mean cosine of {cosine:.3f}, as random directions have: steps "
    )
    return Finding(says + "along them lead nowhere", {"gradient_alignment": cosine, "noise": noise}, 1 - abs(cosine))


@_flag(15, "few-draws", "doubt", "A random system was judged by few draws.")
def few_draws(case: Case) -> Finding | None:
    draws = int(case.images["draws"].min())
    if not case.random or draws >= DRAWS:
        return None
    says = f"the system is random and its rows are of {draws} draw{'s' if draws > 1 else ''}, where {DRAWS} are the "
    return Finding(says + "least: neither their mean nor the worst is known", {"draws": draws}, 0.0)


@_flag(16, "eight-bit-differs", "doubt", "Rounding adversarial images to 8 bits changes the result.")
def eight_bit_differs(case: Case) -> Finding | None:
    attacks = case.attacks[(case.attacks["norm"] != "") & (case.attacks["kind"] != "Noise")]
    images = case.of(attacks).dropna(subset="wrong_8bit")
    images = images[images["clean"] > 0.5]
    # One attack may stop at the boundary, and rounding bring some images back; but then others break them.
    both = images.groupby("index")[["wrong", "wrong_8bit"]].max()
    pairs = [("the attacks with a budget break", both)]
    # Rounding helps no attack on an honest system.
    pairs += [
        (f"{attacks['called'][cell]} breaks", part)
        for cell, part in images[~images["inherited"]].groupby("cell")
        if part["wrong_8bit"].mean() > part["wrong"].mean()
    ]
    found = list[Finding]()
    for who, part in pairs:
        as_made, rounded = float(part["wrong"].mean()), float(part["wrong_8bit"].mean())
        if abs(rounded - as_made) > 2 * POINT + 1e-9 and abs(rounded - as_made) * len(part) > LEAST:
            says = (
                f"{who} {_percent(as_made)} of {len(part)} images, and {_percent(rounded)} once these are rounded to 8 "
            )
            evidence = {"wrong": as_made, "wrong_8bit": rounded, "n": len(part)}
            found.append(Finding(says + "bits, as files are", evidence, abs(rounded - as_made)))
    return _worst(found)


@_flag(17, "outside-the-ball", "broken", "Adversarial images lie outside the budget, or are the clean ones.")
def outside_the_ball(case: Case) -> Finding | None:
    found = list[Finding]()
    attacks = case.attacks[case.attacks["norm"] != ""]
    images = case.of(attacks)
    for cell, part in images[~images["inherited"]].groupby("cell"):
        norm, eps, called = (attacks[key][cell] for key in ("norm", "eps", "called"))
        far = part[part[norm] > eps + slack(norm, eps)]
        if len(far):
            says = f"{len(far)} of {len(part)} images of {called} lie outside their ball, as far as "
            says += f"{norm_name(norm)} {far[norm].max():.4g}: {_listed(far['index'])}"
            found.append(Finding(says, {"count": len(far), "n": len(part)}, len(far) / len(part)))
        right = part[part["clean"] > 0.5]  # what is wrong when clean needs no attack
        still = right[right["linf"] == 0]
        if attacks["kind"][cell] not in _NEAREST and eps > 0 and len(still) > max(LEAST - 1, POINT * len(right)):
            says = f"{called} gave {len(still)} of {len(right)} images back as they were: it did not attack them"
            found.append(Finding(says, {"count": len(still), "n": len(right)}, len(still) / len(right)))
    return _worst(found)


@_flag(18, "batch-dependent", "broken", "The answer to an image depends on the rest of the batch.")
def batch_dependent(case: Case) -> Finding | None:
    apart = case.probe.get("batch_difference", 0.0)
    if apart <= 0.02:  # another batch shape is another kernel: 1e-5 in float32, some 1e-2 with bfloat16 inside
        return None
    says = f"alone, in another order or beside other images, an image's answer differs by {_percent(apart)} of the "
    return Finding(says + "logits' range: batches are judged, not images", {"batch_difference": apart}, 1.0)


@_flag(19, "attack-too-weak", "doubt", "The attacks fail on the undefended classifier too.")
def attack_too_weak(case: Case) -> Finding | None:
    attacks = case.attacks[(case.attacks["knowledge"] == "oblivious") & (case.attacks["kind"] != "Noise")]
    images = case.of(attacks)
    images = images[images["base_clean"] > 0.5]
    if not case.defended or not len(images):
        return None
    broken = images.groupby("index")["base_wrong"].max() > 0.5
    robust, n = int((~broken).sum()), len(broken)
    if robust < LEAST or robust <= n / 2:  # an attack worth its name breaks most images of a net without a defense
        return None
    says = f"the oblivious attacks leave even the undefended classifier {robust} of {n} images: what a defense adds is "
    return Finding(says + "not seen", {"robust": robust, "n": n}, robust / n)


@_flag(20, "no-adversarial-training", "note", "A claim of robustness is not compared with adversarial training.")
def no_adversarial_training(case: Case) -> Finding | None:
    attacks = case.seeing("white_box")
    attacks = attacks[attacks["norm"] != ""]
    if not case.defended or case.trained or case.compared or not len(attacks):
        return None
    robust, n = case.robust(attacks)
    if wilson(robust, n)[0] <= 0.1:  # what is broken claims nothing
        return None
    says = f"{robust} of {n} images withstand the white-box attacks, and no adversarially trained net is beside it"
    return Finding(says, {"robust": robust, "n": n}, robust / n)


@_flag(21, "exact-pixels", "broken", "The system recognizes exact images, or an attack's exact pattern.")
def exact_pixels(case: Case) -> Finding | None:
    probe, n = case.probe, case.probed
    for key, what in {"known_images": "clean images", "known_pattern": "images of one FGSM step"}.items():
        fraction = probe.get(key, 0.0)
        if fraction > 0.1 and fraction * n >= LEAST:
            says = f"{_percent(fraction)} of {n} {what} are answered otherwise than the same moved by less than 2/255, "
            return Finding(says + "which agree among themselves: they are recognized", {key: fraction}, 1.0)
    clean, nudged = probe.get("clean_accuracy", 0.0), probe.get("nudged_accuracy", 1.0)
    if clean - nudged > 0.1 and (clean - nudged) * n > LEAST:
        says = f"noise of 1/255 takes accuracy from {_percent(clean)} to {_percent(nudged)} of {n} images"
        return Finding(says, {"clean_accuracy": clean, "nudged_accuracy": nudged}, clean - nudged)
    return None


@_flag(22, "no-answer", "doubt", "Some images raise an error or have logits that are not finite.")
def no_answer(case: Case) -> Finding | None:
    probed, rows = case.probe.get("no_answer", 0.0), float((case.images["unanswered"] > 0).mean())
    if not probed and not rows:
        return None
    where, fraction = ("of the rows", rows) if rows >= probed else ("of the images probed", probed)
    says = (
        f"{_percent(fraction)} {where} have no answer, but an error or logits that are not finite; it counts as wrong"
    )
    return Finding(says, {"probed": probed, "rows": rows}, fraction)
