"""The verbs that make something of what was trained or found: export, compare, report, reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unperturb.cli.options import Device, DryRun, Number, Threads, use_threads
from unperturb.cli.terminal import progress_bar, say


def export(
    model: Annotated[str, typer.Argument(help="A purifier or a classifier: a run folder, zoo:NAME, or module:object.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.onnx", help="The file to write.")],
    classifier: Annotated[
        str | None, typer.Option(help="What stands behind the purifier; the file then answers with logits.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Images to compare on (default: the data it was trained on).")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side that pictures are resized to.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many test images are compared.")] = 64,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit convolutions, ranged on training images.")] = False,
    threads: Threads = None,
) -> None:
    """Write an ONNX file of a purifier, alone or before its classifier, compared with torch image by image."""
    from unperturb.export import export_named

    use_threads(threads)
    say(export_named(model, out, classifier=classifier, data=data, size=size, n=n, int8=int8))


def compare(
    first: Annotated[Path, typer.Argument(help="A run folder of an evaluation or a benchmark.")],
    second: Annotated[Path, typer.Argument(help="Another, or the same.")],
    system: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="The system of both runs to compare; given twice, that of each."),
    ] = None,
) -> None:
    """Two runs side by side on the same images, with McNemar's exact test."""
    from unperturb.results import Results
    from unperturb.results.render import compare_pair

    names = system or []
    if len(names) > 2:
        raise ValueError(f"--system names one system of both runs or one of each, not {len(names)}")
    one, other = Results.read(first), Results.read(second)
    if names:
        one, other = one.where(system=names[0]), other.where(system=names[-1])
    say(compare_pair(one, other))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of evaluations.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("report"),
    title: Annotated[str | None, typer.Option(help="The page's heading.")] = None,
    note: Annotated[str | None, typer.Option(help="What the page says below its heading.")] = None,
) -> None:
    """Remake every table, figure and the page from rows and samples alone."""
    from unperturb.results import Results, compare, table
    from unperturb.results.page import write_report

    with progress_bar("writing tables, figures and the page"):
        results = Results.read(*runs)
        written = write_report(results, out, title=title, note=note)
    say(table(results))
    if any(len(systems) > 2 for systems in results.systems.values()):
        say(compare(results))
    parts = [name.partition("/")[0] for name in written]
    say(
        f"\nwrote {written['page']}, with {parts.count('figures')} figures and {parts.count('tables')} tables beside it"
    )


def reproduce(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PART]...", help="mnist, table1-mnist, figure1, ...: see docs/reproduce.md. Default: all."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where tables, figures and pages go.")] = Path(
        "report/paper"
    ),
    n: Number = None,
    device: Device = "auto",
    threads: Threads = None,
    dry_run: DryRun = False,
) -> None:
    """Make the paper's tables and figures; train and evaluate what they lack. Stopped, it goes on where it was."""
    from unperturb.paper.reproduce import Plan
    from unperturb.paper.reproduce import reproduce as run

    use_threads(threads)
    if dry_run:
        for line in Plan.of(parts or [], n).told(device):
            say(line)
        return
    done = run(parts or [], out=out, n=n, device=device, show=say, bar=progress_bar)
    say(f"\nthe index: {done.page}")
    if done.failed:
        raise ValueError(f"not everything could be made; failed: {', '.join(done.failed)}. Called again, it goes on")
