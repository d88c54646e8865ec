"""Verbs: help, dry runs, and a user's mistakes answered in a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unperturb import cli
from unperturb.registry import UnknownNameError
from unperturb.runs import RunError

runner = CliRunner()
VERBS = sorted(c.name or c.callback.__name__.replace("_", "-") for c in cli.app.registered_commands)


def run(*arguments: str, code: int = 0) -> str:
    """The program as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "unperturb.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
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
    shown = run("train", "protect-mnits", code=2)
    assert "Did you mean 'protect-mnist'?" in shown
    assert "Traceback" not in shown


def test_a_wrong_key_names_the_nearest() -> None:
    shown = run("train-classifier", "classifier-digits", "--set", "training.epoch=3", code=2)
    assert "training.epochs" in shown
    assert "Traceback" not in shown


def test_a_wrong_type_is_refused() -> None:
    shown = run("train-classifier", "classifier-digits", "--set", "training.batch=many", code=2)
    assert "training.batch" in shown
    assert "many" in shown


def test_a_recipe_of_another_kind_is_refused() -> None:
    assert "'defense' recipe; this needs a 'classifier' recipe" in run("train-classifier", "protect-digits", code=2)


def test_a_classifier_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = json.dumps([str(tmp_path / "nothing")])
    shown = run("train", "protect-digits", "--set", f"classifiers={missing}", code=2)
    assert str(tmp_path / "nothing") in shown
    assert "Traceback" not in shown


def test_dry_run_shows_recipe_and_cost_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shown = run("train-classifier", "classifier-digits", "--dry-run", "--threads", "1", "--out", str(out))
    assert '"precision"' in shown
    assert "auto" not in shown.split('"precision"')[1].split(",")[0]
    assert "PFLOP" in shown
    assert "minutes" in shown
    assert not out.exists()


def test_a_wrong_option_is_answered_by_the_parser() -> None:
    assert "No such option" in run("train", "protect-mnist", "--epochs", "3", code=2)
    assert "No such command" in run("trian", code=2)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train-classifier", "classifier-digits", "--out", str(out), "--threads", "1"]
    command += ["--set", "training.epochs=9999", "--set", "training.checkpoint_seconds=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "unperturb.cli", *command],
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
    assert "Go on with: unperturb train-classifier" in shown
    assert shown.strip().endswith("--resume")


def test_list_names_what_is_registered() -> None:
    shown = run("list", "attacks")
    assert "pgd" in shown
    assert "mim" in shown
    assert "Did you mean" in run("list", "atacks", code=2)


def test_prepare_says_what_is_there_in_plain_lines(tmp_path: Path) -> None:
    said = run("prepare", "digits", "--out", str(tmp_path))
    for line in ("digits: ", "fingerprint    train ", "contact sheet  "):
        assert line in said
    assert "PosixPath" not in said
    assert (tmp_path / "digits.png").exists()


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "not a demo" in run("demo", "--out", str(tmp_path), code=2)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_report_without_rows_says_how_to_make_them(tmp_path: Path) -> None:
    assert "unperturb evaluate" in run("report", str(tmp_path), "--out", str(tmp_path / "report"), code=2)


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


def test_a_stop_by_kill_ends_as_one_by_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(**_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(cli, "app", stopped)
    monkeypatch.setattr(sys, "argv", ["unperturb", "train", "protect-mnist"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 130
    assert "stopped. Go on with: unperturb train protect-mnist --resume" in capsys.readouterr().err


def test_our_errors_are_told_from_bugs() -> None:
    def ours() -> None:
        from unperturb.registry import Registry

        Registry("thing")["x"]

    with pytest.raises(UnknownNameError) as raised:
        ours()
    assert cli._is_ours(raised.value)
    with pytest.raises(ZeroDivisionError) as bug:
        _ = 1 / 0
    assert not cli._is_ours(bug.value)
    assert issubclass(RunError, RuntimeError)
