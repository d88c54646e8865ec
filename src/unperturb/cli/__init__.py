"""The command line: each verb a thin shell over one public function."""

from __future__ import annotations

import contextlib
import io
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

from unperturb.cli.attacking import attack, benchmark, evaluate
from unperturb.cli.certifying import certify
from unperturb.cli.reporting import compare, export, report, reproduce
from unperturb.cli.serving import playground, serve
from unperturb.cli.stock import cache, demo, list_things, prepare, show
from unperturb.cli.terminal import complain, say
from unperturb.cli.training import train, train_classifier

app = typer.Typer(
    name="unperturb",
    help="A learned purifier in front of an image classifier: adversarial noise out, clean images kept, the classifier "
    "untouched.\n\nNew here? Run: unperturb demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
RESUMABLE = ("train", "train-classifier", "evaluate", "attack", "benchmark", "certify")


def _version(asked: bool) -> None:
    if asked:
        from unperturb import __version__

        say(f"unperturb {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and stop.")
    ] = False,
) -> None:
    pass


# In the order of the help.
_VERBS: list[Callable[..., None]] = [show, prepare, train_classifier, train, attack, evaluate, benchmark, certify]
_VERBS += [export, serve, compare, report, reproduce, cache]
app.command()(demo)
app.command(name="list")(list_things)  # `list` itself is Python's
for _verb in _VERBS:
    app.command()(_verb)
    if _verb is serve:
        app.command(name="app")(playground)  # `app` is the command line itself


def _again() -> str:
    """The command that goes on where this one stopped."""
    again = " ".join(shlex.quote(a) for a in ["unperturb", *sys.argv[1:]])
    goes_on = sys.argv[1:2] and sys.argv[1] in RESUMABLE and "--resume" not in sys.argv
    return f"{again} --resume" if goes_on else again


def main() -> None:
    """Run the command line; a user's mistake is answered in a sentence, not in a traceback.

    Exit codes: 0 done; 2 a mistake, or a machine that has no room, said in a sentence; 130 stopped by Ctrl-C and 143 by
    SIGTERM, with how to go on; 1 a fault of the program, with its traceback.
    """
    from unperturb.mistakes import ModelError, interrupted, sentence

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a letter shows its number
            stream.reconfigure(errors="backslashreplace")
    terminated = False
    told: set[str] = set()

    def tell(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in told:  # data that is read twice says the same twice
            told.add(str(message))
            complain(f"note: {message}", style="yellow")

    show_warning, warnings.showwarning = warnings.showwarning, tell

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(ValueError):  # in a thread of another program signals are that program's
        signal.signal(signal.SIGTERM, terminate)
    try:
        code = app(prog_name="unperturb", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if interrupted(error):
            code = 130
        elif hasattr(error, "show"):  # a wrong verb or option, in the words of the parser
            where = context.command_path if (context := getattr(error, "ctx", None)) else "unperturb"
            complain(f"error: {error.format_message()} See: {where} --help")  # type: ignore[attr-defined]
            raise SystemExit(2) from None
        elif said := sentence(error):
            goes_on = f". What was finished is kept; go on with: {_again()}" if isinstance(error, ModelError) else ""
            complain(f"error: {said}{goes_on}")
            raise SystemExit(2) from None
        else:
            raise
    finally:
        warnings.showwarning = show_warning
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)
    if code == 130:
        complain(f"\nstopped. Go on with: {_again()}", style="")
    raise SystemExit(143 if code == 130 and terminated else code if isinstance(code, int) else 0)
