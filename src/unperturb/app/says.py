"""What the page says of an attacked image, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from unperturb.app.one_image import Attacked, Rung, View
from unperturb.results.names import budget_name, norm_name
from unperturb.results.sheet import Sheet, as_markdown, in_markdown
from unperturb.threat_models import KNOWLEDGE, ThreatModel

AT_WORK = "is at work"


def verdict(found: Attacked, names: Sequence[str]) -> str:
    """What one attacker did to one image. names: of the classes."""
    alone, behind, who, far = found.adversarial, found.restored, found.attacker, found.far
    lines = [f"### {_headline(found)}"]
    said = f"Of the adversarial image the classifier alone says {_says(alone, names)}"
    said += f", behind the purifier {_says(behind, names)}." if found.defended else "."
    lines.append(f"The class is {_name(found.label, names)}. {said}")
    if found.clean.prediction != found.label:
        lines.append("The classifier alone was wrong about the clean image already.")
    if found.defended and found.restored_clean.prediction != found.label:
        lines.append(f"The purifier spoils the clean image, too: then it is {_says(found.restored_clean, names)}.")
    if behind.rejected:
        lines.append("A detector of the purifier rejects the adversarial image.")
    if (draws := len(behind.classes)) > 1:
        wrong = behind.wrong(found.label)
        lines.append(f"The purifier draws at random: {wrong} of {draws} draws are wrong. The first is shown.")
    lines.append(
        f"The attacker ({KNOWLEDGE[who.knowledge].title}) moved the image by {far['linf']:.3g} in Linf and "
        f"{far['l2']:.3g} in L2, with {found.forwards:,} forward and {found.backwards:,} backward passes in "
        f"{found.seconds:.1f} s."
    )
    lines.append(f"`{who.attack}`")
    return "\n\n".join(lines)


def _headline(found: Attacked) -> str:
    if not found.defended:
        return "Fooled" if found.fooled_alone else "Not fooled"
    if found.broken:
        return "Fooled, and not restored" if found.fooled_alone else "Only behind the purifier is it fooled"
    return "Fooled, and restored" if found.fooled_alone else "Not fooled"


def ladder(
    climbed: Sequence[Attacked | None], attackers: Sequence[Rung], names: Sequence[str], threat: ThreatModel
) -> str:
    """The ladder as far as it was climbed. climbed: what the first of `attackers` did, None where one took too long."""
    defended = any(found is not None and found.defended for found in climbed)
    heads = ["attack", "knows", "outcome", "classifier alone", *(["purified"] if defended else []), "seconds"]
    lines = []
    for rung, found in zip(attackers, climbed):
        line = [rung.label, KNOWLEDGE[rung.knowledge].title]
        if found is None:
            lines.append([*line, "too long", *[""] * (len(heads) - 3)])
            continue
        views = [_plain(view, names) for view in (found.adversarial, *([found.restored] if defended else []))]
        draws = len(found.restored.classes)
        of = f", {found.restored.wrong(found.label)} of {draws} draws wrong" if draws > 1 else ""
        lines.append([*line, ("broken" if found.broken else "stands") + of, *views, f"{found.seconds:.1f}"])
    head = f"### This image against the quick ladder, {norm_name(threat.norm)} {budget_name(float(threat.eps))}"
    table = as_markdown(Sheet("", "", [""] * len(heads), heads, lines)) if lines else ""
    return f"{head}\n\n{_summary(climbed, attackers)}\n\n{table}"


def _summary(climbed: Sequence[Attacked | None], attackers: Sequence[Rung]) -> str:
    if len(climbed) < len(attackers):
        return f"Attacker {len(climbed) + 1} of {len(attackers)} {AT_WORK}: {_who(attackers[len(climbed)])}."
    done = [(rung, found) for rung, found in zip(attackers, climbed) if found is not None]
    broken = [rung for rung, found in done if found.broken]
    late = f" {len(climbed) - len(done)} took too long." if len(done) < len(climbed) else ""
    if not broken:
        return f"It stands against {len(done)} attackers.{late}"
    return f"{len(broken)} of {len(done)} attackers break it. The weakest of them: {_who(broken[0])}.{late}"


def stopped(text: str) -> str:
    """What `ladder` said, once nobody waits for the attacker that was at work."""
    return text.replace(AT_WORK, "was stopped")


def _who(rung: Rung) -> str:
    return ", ".join(dict.fromkeys((rung.label, KNOWLEDGE[rung.knowledge].title)))


def _says(view: View, names: Sequence[str]) -> str:
    return f"{_name(view.prediction, names)} ({_percent(view)})"


def _plain(view: View, names: Sequence[str]) -> str:
    return f"{names[view.prediction]} ({_percent(view)})"


def _percent(view: View) -> str:
    return f"{100 * float(view.probabilities.max()):.0f} %"


def _name(label: int, names: Sequence[str]) -> str:
    return f"**{in_markdown(names[label])}**"
