"""What an attacker knows, and what it may do: the words that attackers, rows and tables share. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from unperturb.registry import unknown

Norm = Literal["linf", "l2", "l0"]


def budget(value: float | str, norm: str | None = None) -> float:
    """A budget in [0, 1] pixel units from a number or a fraction such as `"8/255"`; raises `ValueError`.

    norm: a `"linf"` budget is at most 1, which is all that a pixel can move; an L2 budget may be larger.
    """
    try:
        number = float(Fraction(value)) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError, TypeError):
        raise ValueError(f"a budget is a number or a fraction such as '8/255', not {value!r}") from None
    if not 0 <= number < float("inf"):
        raise ValueError(f"a budget is finite and not negative, not {value!r}")
    if norm == "linf" and number > 1:
        raise ValueError(
            f"a budget in Linf is at most 1, for pixels lie in [0, 1], not {value!r}; "
            f"{number:g} levels of 255 are '{number:g}/255'"
        )
    return number


@dataclass(frozen=True)
class Knowledge:
    """One kind of knowledge. title: as tables say it. meaning: a phrase. includes: the kinds that who has this one has
    too, itself among them: more knowledge is never a weaker attacker. attacked: what the attack is made on, the
    undefended classifier, a surrogate of the attacker's own, or the system itself."""

    name: str
    title: str
    meaning: str
    includes: frozenset[str]
    attacked: Literal["classifier", "surrogate", "system"]


def _ordered(
    *kinds: tuple[str, str, str, Literal["classifier", "surrogate", "system"], tuple[str, ...]],
) -> dict[str, Knowledge]:
    found: dict[str, Knowledge] = {}
    for name, title, meaning, attacked, below in kinds:
        includes = frozenset({name}).union(*(found[k].includes for k in below))
        found[name] = Knowledge(name, title, meaning, includes, attacked)
    return found


KNOWLEDGE = _ordered(
    ("none", "noise", "noise: nothing is known", "classifier", ()),
    ("transfer", "transfer", "made on another classifier", "surrogate", ("none",)),
    ("oblivious", "oblivious", "made on the undefended classifier, the paper's protocol", "classifier", ("none",)),
    (
        "gray_box",
        "gray box",
        "made through a purifier that the attacker trained itself",
        "surrogate",
        ("transfer", "oblivious"),
    ),
    ("black_box", "black box", "made on the whole by its outputs alone", "system", ("transfer", "oblivious")),
    (
        "bpda",
        "BPDA",
        "made on the whole, a surrogate for the purifier's backward pass",
        "system",
        ("transfer", "oblivious"),
    ),
    (
        "white_box",
        "white box",
        "made on classifier and purifier together, exact gradient",
        "system",
        ("gray_box", "black_box", "bpda"),
    ),
)


def check_knowledge(name: str) -> str:
    """`name`, if it is a kind of knowledge; raises `UnknownNameError`, which lists them."""
    if name not in KNOWLEDGE:
        raise unknown("knowledge", name, KNOWLEDGE)
    return name


@dataclass(frozen=True)
class ThreatModel:
    """What is held against a system: every attack of at most this distance by an attacker of at most this knowledge.

    norm: `"linf"`, `"l2"` or `"l0"` (pixels; all channels of a place are one). eps: the largest distance between an
    image and its adversarial image that counts, in [0, 1] pixel units, a number or a fraction such as `"8/255"`.
    knowledge: a key of `KNOWLEDGE`; what it includes is admitted too.

    Raises `ValueError` for another norm or a budget that is none, `UnknownNameError` for another knowledge.
    """

    norm: Norm = "linf"
    eps: float | str = 8 / 255
    knowledge: str = "white_box"

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, not {self.norm!r}")
        eps = budget(self.eps, self.norm)
        object.__setattr__(self, "eps", eps)
        check_knowledge(self.knowledge)

    def admits(self, knowledge: str) -> bool:
        """Whether an attacker of `knowledge` is within this threat model, whatever its distance."""
        return knowledge in KNOWLEDGE[self.knowledge].includes
