"""Names to things, and what is said where there is no such name."""

from __future__ import annotations

from typing import Any

import pytest

from unperturb.registry import Registry, UnknownNameError, unknown


@pytest.fixture
def tools() -> Registry[Any]:
    registry: Registry[Any] = Registry("tool")

    @registry.register("saw")
    class Saw:
        def __init__(self, length: int, *, teeth: int = 20) -> None:
            self.length, self.teeth = length, teeth

    @registry.register("hammer")
    def hammer(**options: Any) -> dict[str, Any]:
        return options

    return registry


def test_things_by_name(tools: Registry[Any]) -> None:
    assert list(tools) == ["hammer", "saw"]
    assert "saw" in tools
    assert "file" not in tools
    saw = tools.create("saw", 30, teeth=5)
    assert (type(saw), saw.length, saw.teeth) == (tools["saw"], 30, 5)
    assert tools.create("hammer", anything=1) == {"anything": 1}  # one that takes any option checks them itself


def test_the_decorator_gives_back_what_it_files() -> None:
    registry: Registry[Any] = Registry("tool")

    def make() -> int:
        return 1

    assert registry.register("one")(make) is make


def test_a_double_name_is_an_error(tools: Registry[Any]) -> None:
    kept = tools["saw"]
    with pytest.raises(ValueError, match=r"two tools are called 'saw': .*Saw.* and .*int"):
        tools.register("saw")(int)
    assert tools["saw"] is kept


def test_an_unknown_name_lists_the_choices_and_the_nearest(tools: Registry[Any]) -> None:
    with pytest.raises(UnknownNameError) as error:
        tools["hamer"]
    assert str(error.value) == "unknown tool 'hamer'. Did you mean 'hammer'? Choices: hammer, saw."
    with pytest.raises(UnknownNameError) as error:
        tools.create("screwdriver")
    assert str(error.value) == "unknown tool 'screwdriver'. Choices: hammer, saw."
    assert issubclass(UnknownNameError, ValueError)


def test_an_unknown_option_lists_those_that_there_are(tools: Registry[Any]) -> None:
    with pytest.raises(UnknownNameError) as error:
        tools.create("saw", 30, tooth=5)
    assert str(error.value) == "unknown option of tool 'saw', 'tooth'. Did you mean 'teeth'? Choices: teeth."
    with pytest.raises(UnknownNameError, match="Choices: length, teeth"):
        tools.create("saw", color="red")


def test_nothing_to_choose_from() -> None:
    assert str(unknown("tool", "saw", [])) == "unknown tool 'saw'. Choices: none."
    assert str(unknown("tool", None, ["saw"])) == "unknown tool None. Choices: saw."
