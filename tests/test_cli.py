"""Verbs: help, dry runs, and a user's mistakes answered in a sentence."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import unperturb
from unperturb import cli
from unperturb.data import load_dataset
from unperturb.devices import Speed
from unperturb.mistakes import is_ours
from unperturb.registry import UnknownNameError
from unperturb.results.schema import read_rows
from unperturb.runs import RunError

runner = CliRunner()
VERBS = sorted(c.name or c.callback.__name__.replace("_", "-") for c in cli.app.registered_commands)


def called(*arguments: str, code: int = 0) -> str:
    """What the program says, in this process: no two seconds of importing torch."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        patch.setattr(sys, "argv", ["unperturb", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == code, out.getvalue()
    return out.getvalue()


def run(*arguments: str, code: int = 0) -> str:
    """The program as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "unperturb", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_that_says_what_it_does(verb: str) -> None:
    shown = runner.invoke(cli.app, [verb, "--help"])
    assert shown.exit_code == 0
    sentence = next(line.strip() for line in shown.output.splitlines() if line.strip() and "Usage" not in line)
    assert len(sentence) > 20
    assert sentence.endswith(".") or len(sentence) > 70  # wrapped by the terminal


def test_an_unknown_recipe_names_the_nearest_and_exits_2() -> None:
    shown = called("train", "protect-mnits", code=2)
    assert "Did you mean 'protect-mnist'?" in shown
    assert "Traceback" not in shown


def test_a_wrong_key_names_the_nearest() -> None:
    shown = called("train-classifier", "classifier-digits", "--set", "training.epoch=3", code=2)
    assert "training.epochs" in shown
    assert "Traceback" not in shown


def test_a_wrong_type_is_refused() -> None:
    shown = called("train-classifier", "classifier-digits", "--set", "training.batch=many", code=2)
    assert "training.batch" in shown
    assert "many" in shown


def test_a_recipe_of_another_kind_is_refused() -> None:
    assert "'defense' recipe; this needs a 'classifier' recipe" in called("train-classifier", "protect-digits", code=2)


def test_a_classifier_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = json.dumps([str(tmp_path / "nothing")])
    shown = called("train", "protect-digits", "--set", f"classifiers={missing}", code=2)
    assert str(tmp_path / "nothing") in shown
    assert "Traceback" not in shown


def test_dry_run_shows_recipe_and_cost_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ["--set", "training.batch=8", "--set", "size=8", "--threads", "1"]
    shown = called("train-classifier", "classifier-digits", "--dry-run", *small, "--out", str(out))
    assert "which precision and memory format is quickest here" in shown
    assert 'precision = "' in shown
    assert 'precision = "auto"' not in shown
    assert "PFLOP" in shown
    assert "minutes" in shown
    assert not out.exists()


def test_a_dry_run_is_told_as_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what has a recipe shows one."""
    said = {
        verb: " ".join(runner.invoke(cli.app, [verb, "--help"], env={"COLUMNS": "300"}).output.split())
        for verb in VERBS
    }
    with_recipe = {verb for verb, text in said.items() if "Show the resolved recipe and its cost" in text}
    assert with_recipe == {"train", "train-classifier", "evaluate", "reproduce"}
    without = {verb for verb, text in said.items() if "Check model and data, tell what it would cost here" in text}
    assert without == {"attack", "benchmark"}


def test_a_wrong_option_is_answered_by_the_parser() -> None:
    assert "No such option" in called("train", "protect-mnist", "--epochs", "3", code=2)
    assert "No such command" in called("trian", code=2)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train-classifier", "classifier-digits", "--out", str(out), "--threads", "1"]
    command += ["--set", "training.epochs=9999", "--set", "training.checkpoint_seconds=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "unperturb", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts what runs in its background deaf to Ctrl-C, and deafness is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 90
    while not (out / "checkpoint.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert "Go on with: unperturb train-classifier" in shown
    assert shown.strip().endswith("--resume")


def test_list_names_what_is_registered() -> None:
    shown = called("list", "attacks")
    assert "pgd" in shown
    assert "mim" in shown
    assert "Did you mean" in called("list", "atacks", code=2)


def test_prepare_says_what_is_there_in_plain_lines(tmp_path: Path) -> None:
    said = called("prepare", "digits", "--out", str(tmp_path))
    for line in ("digits: ", "fingerprint    train ", "contact sheet  "):
        assert line in said
    assert "PosixPath" not in said
    assert (tmp_path / "digits.png").exists()


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "not a demo" in called("demo", "--out", str(tmp_path), code=2)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_report_without_rows_says_how_to_make_them(tmp_path: Path) -> None:
    assert "unperturb evaluate" in called("report", str(tmp_path), "--out", str(tmp_path / "report"), code=2)


def test_an_error_on_the_way_out_of_ctrl_c_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped_while_saving(**_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(cli, "app", stopped_while_saving)
    monkeypatch.setattr(sys, "argv", ["unperturb", "train", "protect-mnist"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130


def test_sigterm_says_how_to_go_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(**_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "app", stopped)
    shown = called("train", "protect-mnist", code=143)
    assert "stopped. Go on with: unperturb train protect-mnist --resume" in shown
    assert signal.getsignal(signal.SIGTERM) is before


def test_our_errors_are_told_from_bugs() -> None:
    def ours() -> None:
        from unperturb.registry import Registry

        Registry("thing")["x"]

    with pytest.raises(UnknownNameError) as raised:
        ours()
    assert is_ours(raised.value)
    with pytest.raises(ZeroDivisionError) as bug:
        _ = 1 / 0
    assert not is_ours(bug.value)
    assert issubclass(RunError, RuntimeError)


# The first hour ------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, without a zoo."""
    monkeypatch.setattr("unperturb.zoo.folders", dict)
    monkeypatch.chdir(tmp_path)
    speed = Speed({("float32", "contiguous"): 10.0})
    for module in ("unperturb.training.jobs", "unperturb.training.loop", "unperturb.evaluation.costs"):
        monkeypatch.setattr(f"{module}.probe", functools.cache(lambda *_: speed))
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.delitem(sys.modules, "own_net", raising=False)
    return tmp_path


QUICK = ["--size", "8", "--device", "cpu", "--threads", "1"]
TRAINING = ["--set", "training.epochs=0.01", "--set", "training.precision=float32", "--set", "training.batch=4"]
TRAINING += ["--set", "training.memory_format=contiguous"]
FILTER = ["train", "median-digits", "--set", 'adversarial_batches.attacks=[{ name = "fgsm", eps = 0.1 }]', *QUICK]


def test_version_and_python_m() -> None:
    assert run("--version").strip() == f"unperturb {unperturb.__version__}"


def test_show_prints_a_recipe_that_can_be_used(here: Path) -> None:
    shown = called("show", "protect-digits", "--set", "training.lr=0.5")
    assert shown.startswith("# Ours against attackers")
    assert "# Run it: unperturb train protect-digits\n" in shown
    assert "# missing: runs/digits-convnet; train one with: unperturb train-classifier classifier-digits\n" in shown
    (here / "mine.toml").write_text(shown)
    again, first = (text.partition("# Run it")[0] for text in (called("show", "mine.toml"), shown))
    assert again == re.sub(r"  # from [\w-]+$", "", first, flags=re.MULTILINE)  # what is written out has no base
    assert "  # from protect-mnist" in first
    for name in ("demo", "table2-mnist", "distilled-digits"):
        assert "# Run it" in called("show", name)


def test_a_dry_run_says_what_is_missing_and_how_to_make_it(here: Path) -> None:
    shown = called("train", "hgd-digits", *QUICK, *TRAINING, "--dry-run", "--set", "start=runs/protect-digits")
    for folder, how in (("digits-convnet", "-classifier classifier-digits"), ("protect-digits", " protect-digits")):
        assert f"missing: runs/{folder}; train one with: unperturb train{how}\n" in shown
    assert "cost: 4 steps" in shown
    shown = called("evaluate", "compare-digits", *QUICK, "--dry-run", "--n", "2", "--attack", "fgsm-x", code=2)
    assert "Did you mean" in shown
    shown = called(
        "evaluate", "compare-digits", *QUICK, "--dry-run", "--n", "2", "--attack", "fgsm", "--eot-samples", "3"
    )
    assert shown.count("missing: ") == 5
    assert "eot_samples = 3\n" in shown
    assert "cost: 7 cells of 2 images" in shown
    shown = called("train-classifier", "distilled-digits", "--dry-run")
    assert "missing: runs/teacher-digits; train one with: unperturb train-classifier teacher-digits" in shown
    assert "cost: not counted" in called("train", "hgd-digits", *QUICK, "--dry-run", "--classifier", "runs/own")
    assert not (here / "runs").exists()


@pytest.mark.parametrize("retrain", ["retrain", "retrain:20"])
def test_an_attacker_who_trains_is_no_folder_that_is_there(here: Path, retrain: str) -> None:
    shown = called("show", "compare-digits", "--set", f"surrogate_defense={retrain}", "--set", 'systems=["jpeg"]')
    assert f'surrogate_defense = "{retrain}"' in shown
    assert "there: jpeg" in shown
    assert "there: retrain" not in shown


def test_a_classifier_of_ones_own(here: Path) -> None:
    """Trained in front of and judged, by its import path alone."""
    own = ["--classifier", "own_net:net", "--mean", "0.1", "--std", "0.3"]
    assert "cost: " in called(*FILTER, *own, "--dry-run")
    assert "nothing to learn; validation: clean" in called(*FILTER, *own)
    assert json.loads((here / "runs/median-digits/recipe.json").read_text())["classifiers"] == ["in hand: own_net:net"]
    judged = ["evaluate", "compare-digits", *own, *QUICK, "--n", "6", "--attack", "fgsm", "--out", "runs/judged"]
    shown = called(*judged, "--set", 'systems=["undefended", "runs/median-digits"]')
    assert "own_net:net on digits (6 of test): accuracy" in shown
    assert set(read_rows(here / "runs/judged")["system"]) == {"undefended", "median"}
    for words, said in (
        (["--classifier", "own_net:nett"], "own_net:nett: own_net has no 'nett'; did you mean 'net'?"),
        (["--classifier", "own_net:net", "--mean", "a,b"], "--mean 'a,b'; expected a number a channel"),
        (["--weights", "w.pt"], "--weights say more of one model of your own"),
    ):
        assert said in called(*FILTER, *words, code=2)


def test_a_label_from_outside_neither_styles_nor_steers(here: Path) -> None:
    words = ["evaluate", "compare-digits", "--classifier", "own_net:net", *QUICK, "--n", "4", "--out", "runs/label"]

    def evaluated(label: str, code: int = 0) -> str:
        attack = '{ name = "fgsm", eps = 0.1 }'
        attacks = f'attacks=[{{ attack = {attack}, label = {json.dumps(label)}, knowledge = ["oblivious"] }}]'
        return called(*words, "--set", attacks, "--set", 'systems=["undefended"]', code=code)

    shown = evaluated("[/red]\x1b[2J", code=2)
    assert "'[/red]\\x1b[2J' holds control characters" in shown
    assert "\x1b" not in shown
    assert "[/red]" in evaluated("[/red]")
    assert "\\x1b" in called("train", "\x1b[31m[/red]", code=2)


def test_cache_lists_and_clears(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_CACHE", str(here / "kept"))
    load_dataset("digits", size=8)
    assert "in all              0.1 MB" in called("cache")
    assert "nobody here to ask; say --yes" in called("cache", "--clear", code=2)
    assert "Did you mean 'data'" in called("cache", "dota", code=2)
    assert "freed 0.0 MB" in called("cache", "adversarials", "--clear", "--yes")
    assert "freed 0.1 MB" in called("cache", "--clear", "--yes")
    assert "in all              0.0 MB" in called("cache")


def test_too_many_threads_are_refused() -> None:
    assert "100000 threads were asked for; expected 1 to" in called(
        "train-classifier", "classifier-digits", "--threads", "100000", code=2
    )


def raised(error: BaseException) -> Callable[..., object]:
    def app(**_: object) -> None:
        torch.zeros(1).apply_(lambda _: throw(error))  # deep in a library

    def throw(error: BaseException) -> float:
        exec(compile("raise error", "library.py", "exec"), {"error": error})
        return 0.0

    return app


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/out/rows"), "error: Permission denied: /out/rows"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "error: File name too long: xxx"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/out/a"),
            "error: the disk is full (/out/a): free some space",
        ),
        (MemoryError(), "error: out of memory: ask for fewer images at once"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "error: out of memory"),
    ],
)
def test_what_the_machine_lacks_is_a_sentence(error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", raised(error))
    assert called("list", code=2).startswith(said)


def test_a_full_disk_behind_another_error_and_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = RuntimeError("PytorchStreamWriter failed writing file")
    behind.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(cli, "app", raised(behind))
    assert called("list", code=2).startswith("error: the disk is full: free some space")
    for bug in (KeyError("x"), OSError("not said by the system"), RuntimeError("shape mismatch")):
        monkeypatch.setattr(cli, "app", raised(bug))
        with pytest.raises(type(bug)):
            cli.main()


def test_a_folder_that_cannot_be_written_is_a_sentence(here: Path) -> None:
    (here / "file").write_text("")
    shown = called("train-classifier", "classifier-digits", *TRAINING, "--set", "size=8", "--out", "file/run", code=2)
    assert "(not a directory); choose another folder" in shown
    assert "Traceback" not in shown


def test_a_warning_is_a_note_said_once_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    def app(**_: object) -> None:
        for _ in range(2):
            warnings.warn("folders left aside: \x1b[31mRED", stacklevel=1)

    monkeypatch.setattr(cli, "app", app)
    before = warnings.showwarning
    shown = called("list")
    assert shown.count("note: folders left aside: \\x1b[31mRED") == 1
    assert "\x1b" not in shown
    assert warnings.showwarning is before


def test_a_model_that_fails_at_work_is_one_sentence_and_how_to_go_on(here: Path) -> None:
    (here / "tiring.py").write_text(
        "import torch\nfrom pathlib import Path\nw = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))\n"
        "def net(images):\n    finished = list(Path('runs/tired/rows').glob('*/*.parquet'))\n"
        "    if len(finished) == 2 and not Path('mended').exists():\n"
        "        raise LookupError('no more')\n    return images.flatten(1) @ w\n"
    )
    words = ["benchmark", "tiring.py:net", "--data", "digits", "--n", "4", "--eps", "0.1", "--budget", "quick"]
    words += ["--name", "tired", "--out", "runs/tired", *QUICK]
    shown = called(*words, code=2)
    assert "Traceback" not in shown
    (said,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert re.match(
        r"error: 'tired', under \S+ with knowledge \w+, failed: .*tiring\.py, line 7: LookupError: no more\.", said
    )
    assert said.endswith(f". What was finished is kept; go on with: unperturb {' '.join(words)} --resume")
    (here / "mended").touch()
    assert "the card: runs/tired/card/card.html" in called(*words, "--resume")
