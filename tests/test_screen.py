"""What people see: harmless text, log lines, bars."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from unperturb import screen


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[/red] stays :heart:", "[/red] stays :heart:"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b2J\r\x07\x7f", "\\x9b2J\\r\\x07\\x7f"),
        ("two\nlines\tand", "two\nlines\tand"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("\udcff.png", "\\udcff.png"),
        ("数字 é 👩\u200d🔬", "数字 é 👩\u200d🔬"),
    ],
)
def test_text_from_outside_is_harmless(text: str, shown: str) -> None:
    assert screen.clean(text) == shown


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_nothing_steers_a_terminal(text: str) -> None:
    shown = screen.clean(text)
    shown.encode()  # also where a terminal would take no half character
    assert screen.clean(shown) == shown
    assert not {c for c in shown if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160}


def test_log_lines_are_for_people() -> None:
    record = {
        "step": 200, "epoch": 1.234, "lr": 0.00399, "repair": 0.12345, "label": 1e-5,
        "images_per_second": 1673.6, "gflops": 93.5, "pflop": 0.01, "seconds": 12.5,
    }  # fmt: skip
    line = screen.log_line(record)
    assert line == "step    200  epoch 1.23  repair 0.1235  label 1e-05  lr 0.00399  1,674 images/s"
    assert screen.log_line({"step": 7, "validation": {"clean": 0.994}}) == "step      7  validation  clean 99.40 %"


def drawn(what: str, text: str, width: int = 80) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width)
    with screen.bar(what, console) as update:
        assert out.getvalue() == ""  # not before there is something to say
        update(0, 0, text)
        update(3, 9, text)
    return out.getvalue().splitlines()


def test_a_bar_takes_any_label() -> None:
    shown = "".join(drawn("attacking", "[/red] \x1b[2J end"))
    assert "attacking: [/red] \\x1b[2J" in shown
    assert "3/9" in shown
    assert "\x1b[2J" not in shown


def test_a_bar_stays_on_its_line() -> None:
    lines = drawn("evaluating", "resnet8 · none · pgd-40 · oblivious " * 5, 60)
    assert not [line for line in lines if "\x1b[1A" in line.replace("\x1b[1A\x1b[2K", "", 1)]


def test_no_bar_without_a_terminal_or_in_a_second_process(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with screen.bar("training", Console(file=out)) as update:
        update(1, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with screen.bar("training", Console(file=out, force_terminal=True)) as update:
        update(1, 2)
    assert out.getvalue() == ""


def test_a_callers_own_progress_goes_before_the_bar() -> None:
    told: list[int] = []
    with screen.shown("training", lambda done, total: told.append(done)) as update:
        assert update is not None
        update(1, 2)
    assert told == [1]
    with screen.shown("training", quiet=True) as update:
        assert update is None
    with screen.shown("training") as update:
        assert update is not None
