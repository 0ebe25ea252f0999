"""One row makes an option: on the command line, in the checks, in the manifest, in the README."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import pytest

from iq_export import options
from iq_export.errors import BundleError, UsageError
from iq_export.options import CompileOptions, option


@dataclass(frozen=True)
class Extended(CompileOptions):
    """As if one option had been added to the table."""

    colour: str = field(
        default="blue",
        metadata=option(
            "of the report", about="of `report.html`", group="look", choices=("blue", "red"),
            noun="paint", kept="repeated",
        ),
    )  # fmt: skip


def parsed(*arguments: str, kind: type[CompileOptions] = CompileOptions) -> CompileOptions:
    parser = argparse.ArgumentParser()
    options.add_all(parser, kind)
    return options.from_arguments(parser.parse_args(["MODEL", "OUT", *arguments]), kind)


def test_a_row_is_all_that_an_option_needs() -> None:
    assert parsed(kind=Extended).colour == "blue"  # type: ignore[attr-defined]
    asked = parsed("--colour", "red", kind=Extended)
    assert asked == Extended("MODEL", Path("OUT"), colour="red")
    with pytest.raises(UsageError, match="unknown paint 'green': use blue, red"):
        options.check_values(Extended("MODEL", Path("OUT"), colour="green"))
    recorded = options.record(asked)
    assert recorded["colour"] == "red"
    assert options.repeated(recorded, Path("manifest.json"), Extended)["colour"] == "red"
    with pytest.raises(BundleError, match=r"manifest.json records no colour that can be used"):
        options.repeated({**recorded, "colour": 3}, Path("manifest.json"), Extended)
    assert "| `--colour blue\\|red` | `blue` | of `report.html` |" in options.markdown(Extended)
    assert "--colour" not in options.markdown()


def test_the_command_line_has_the_defaults_of_the_dataclass() -> None:
    assert parsed() == CompileOptions("MODEL", Path("OUT"))


def test_every_field_has_a_row_and_every_row_a_cell() -> None:
    table = options.markdown()
    for entry in fields(CompileOptions):
        row = entry.metadata["option"]
        assert row.help and "%" not in row.about
        flags = list(row.parts) or [row.flag or f"--{entry.name.replace('_', '-')}"]
        assert row.positional or all(f"`{flag}" in table for flag in flags)
        assert not row.permits or row.kept != "repeated"
    with pytest.raises(ValueError, match="never read from a file"):
        option("run anything", kept="repeated", permits=True)


def test_what_is_repeated_comes_back_from_json_as_it_was() -> None:
    asked = parsed(
        "--recipe", "w4a16", "--samples", "3", "--length", "64", "--seed", "5", "--device", "cuda",
        "--dtype", "fp32", "--insertion", "kv", "--max-relative-deviation", "0.5", "--opset", "24",
        "--calibration", "text", "--tokenizer", "T", "--part", "text", "--budget", "1.5",
        "--trust-remote-code", "--accept-terms", "--task", "fill-mask", "--preprocessor", "P",
    )  # fmt: skip
    recorded = json.loads(json.dumps(options.record(asked)))
    found = options.repeated(recorded, Path("manifest.json"))
    assert found == {name: getattr(asked, name) for name in found}
    kept = {entry.name: entry.metadata["option"].kept for entry in fields(CompileOptions)}
    assert found.keys() == {name for name, how in kept.items() if how == "repeated"}
    # Each of them was given another value than its default: none is compared with itself alone.
    defaults = {e.name: e.default for e in fields(CompileOptions) if e.default is not MISSING}
    assert not [name for name in found if name != "model" and found[name] == defaults[name]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed -1 must not be negative"),
        ({"max_relative_deviation": 1.0}, "max_relative_deviation lies between 0 and 1"),
        ({"budget": 1.0}, "a budget of 1 is not above 1"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8': use fp16, fp32"),
        ({"device": "tpu"}, "unknown device 'tpu': use cpu, cuda"),
        ({"plugin": "maybe"}, "unknown plugin mode 'maybe': use auto, on, off"),
        ({"insertion": "both"}, "unknown insertion 'both': use norm, kv, auto"),
    ],
)
def test_bad_values_are_refused_from_python_too(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options.check_values(CompileOptions("MODEL", Path("OUT"), **wrong))  # type: ignore[arg-type]
