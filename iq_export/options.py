"""What a compile is asked for: one row per option.

A field of `CompileOptions` with its `Row` is all there is of an option. From them come the command
line, the check of values, what the manifest records and `eval` reads back, and the README's table.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

from iq_export.engine.plugin import MODES
from iq_export.engine.profile import Profile
from iq_export.errors import BundleError, UsageError
from iq_export.run.ort import PROVIDERS

DEFAULT_TARGETS = ("rtx-ampere",)
# No window, count or seed is larger; a slip of the finger is.
_LARGEST = 10**9
_ROW = "option"
SHAPES = "engine shapes (tokens), e.g. batch:1,seq:128,past:0"  # title of a group


def whole(lowest: int, unit: str = "") -> Callable[[str], int]:
    """argparse type: an integer from `lowest` to a thousand millions."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is not at least {lowest}{unit}")
        if value > _LARGEST:
            raise argparse.ArgumentTypeError(f"{value} is more than {_LARGEST}{unit}")
        return value

    return read


positive = whole(1)
# The first token of a window is never predicted.
window_tokens = whole(2, " tokens")
seed = whole(0)


@dataclass(frozen=True)
class Row:
    """What an option is beyond its field's name, type and default.

    `help` is the command line's sentence, `about` the README's cell (Markdown; default: `help`) and
    `shown` its default there, where the field's own tells nothing. `flag` is by default the field's
    name; `positional` options have none, `repeatable` ones give a tuple or None, and one with
    `parts` (flag -> the word at the front of its help) is what `join` makes of their texts. `read`
    turns a text into the value, if the field's type does not. `refuse` says why a value is none,
    also to callers from Python. `kept` says what the manifest does with it: `repeated` options
    decide the graph and are read back where it is made again. What `permits` something is never
    read from a file.
    """

    help: str
    about: str = ""
    shown: str | None = None
    group: str = ""
    flag: str = ""
    metavar: str | None = None
    positional: bool = False
    repeatable: bool = False
    parts: Mapping[str, str] = field(default_factory=dict)
    join: Callable[..., Any] = lambda *texts: texts
    read: Callable[[str], Any] | None = None
    choices: tuple[str, ...] = ()
    noun: str = ""
    refuse: Callable[[Any], str | None] = lambda value: None
    kept: Literal["", "recorded", "repeated"] = ""
    permits: bool = False

    def __post_init__(self) -> None:
        if self.permits and self.kept == "repeated":
            raise ValueError("what permits something is never read from a file")


def option(help: str, **more: Any) -> Mapping[str, Row]:
    """A field's metadata: its `Row`."""
    return {_ROW: Row(help, **more)}


def _outside_unit(value: float) -> str | None:
    return None if 0 < value < 1 else "max_relative_deviation lies between 0 and 1."


def _negative(value: int) -> str | None:
    return f"seed {value} must not be negative." if value < 0 else None


def _no_budget(value: float | None) -> str | None:
    if value is None or value > 1:
        return None
    return f"a budget of {value:g} is not above 1: fp32 itself has 1."


@dataclass(frozen=True)
class CompileOptions:
    """What `iq-export compile` is asked for; see the README for each option's meaning.

    `samples` windows of `length` tokens calibrate (0: 512, or as many as the model has positions);
    `work` holds intermediate graphs (a temporary folder beside `out` if None), which `keep_work`
    leaves there for `iq-export eval`. `targets` None is DEFAULT_TARGETS: where it is known that
    their builder cannot build the model, the bundle is made without that engine, while a target
    that was asked for is refused.
    """

    model: str = field(
        metadata=option(
            "hub id, Hugging Face folder, .gguf, .onnx (with --tokenizer), smollm2-135m or "
            "gemma3-270m",
            positional=True, metavar="MODEL", kept="repeated",
        )
    )  # fmt: skip
    out: Path = field(
        metadata=option("output folder; must not exist", positional=True, metavar="OUT")
    )
    recipe: str = field(
        default="w8a8",
        metadata=option(
            "a file of graphs/recipes: w8a8 (default), w8a8-h512, w8a8-norot, w8a8kv8, w4a16, "
            "fp16",
            about="one of the [recipes](#recipes)", metavar="NAME", kept="repeated",
        ),
    )  # fmt: skip
    targets: tuple[str, ...] | None = field(
        default=None,
        metadata=option(
            f"device to build an engine for, repeatable (default {' '.join(DEFAULT_TARGETS)})",
            about="device of the engine, repeatable; [targets](docs/targets.md) lists them and "
            "says what each lacks",
            flag="--target", metavar="NAME", repeatable=True,
            shown=" ".join(DEFAULT_TARGETS),
        ),
    )  # fmt: skip
    calibration: str = field(
        default="builtin",
        metadata=option(
            "UTF-8 text (default: the manual pages that come with Python), or a folder of pictures "
            "or recordings",
            about="UTF-8 text of at most 64 MiB, or `<(...)`, which is read once; `builtin` is the "
            "manual that comes with Python, a third of it held out for `eval`. For a model that "
            "takes pictures or recordings, a folder of these",
            group="calibration", metavar="FILE|DIR|builtin", kept="repeated",
        ),
    )  # fmt: skip
    samples: int = field(
        default=16,
        metadata=option(
            "windows (default %(default)s)",
            about="calibration windows, with and without BOS",
            group="calibration", read=positive, kept="repeated",
        ),
    )  # fmt: skip
    length: int = field(
        default=0,
        metadata=option(
            "tokens per window (default 512, or as many as the model has positions)",
            about="tokens per window; by default never more than the model has positions",
            group="calibration", read=window_tokens, shown="512", kept="repeated",
        ),
    )  # fmt: skip
    profile: Profile = field(
        default_factory=Profile,
        metadata=option(
            "sizes of batch, seq and past; axes left out keep their default",
            about="as in trtexec, for three axes: `batch:1,seq:128,past:0`; `seq` and `past` "
            "together by default at most the model's positions",
            group=SHAPES, metavar="SHAPES",
            parts={"--minShapes": "minimum", "--optShapes": "optimum", "--maxShapes": "maximum"},
            join=Profile.parse, shown="",
        ),
    )  # fmt: skip
    opset: int = field(
        default=23,
        metadata=option("ONNX opset (default %(default)s)", about="no other yet", kept="repeated"),
    )
    dtype: str = field(
        default="fp16",
        metadata=option(
            "of model.onnx",
            about="of `model.onnx`; fp32 suits CPUs, and TensorRT for RTX builds no engine of it",
            choices=("fp16", "fp32"), noun="dtype", kept="repeated",
        ),
    )  # fmt: skip
    seed: int = field(
        default=0,
        metadata=option("of the calibration windows", refuse=_negative, kept="repeated"),
    )
    decisions: Path | None = field(
        default=None,
        metadata=option(
            "take all that a bundle of the same model decided, and calibrate nothing",
            about="a bundle of the same model: its decisions are taken and nothing is calibrated, "
            "for another target, or fp32 in place of fp16; its recipe is taken too",
            metavar="BUNDLE", kept="recorded",
        ),
    )  # fmt: skip
    plugin: str = field(
        default="auto",
        metadata=option(
            "sink ops as TensorRT plugin layers: auto if it can be compiled here (default)",
            about="sink ops as TensorRT plugin layers, or as the standard ops of their function "
            "bodies",
            choices=MODES, noun="plugin mode",
        ),
    )  # fmt: skip
    part: str | None = field(
        default=None,
        metadata=option(
            "of a checkpoint of several parts, the one to compile",
            about="of a checkpoint of several parts (a decoder beside a vision tower), the one to "
            "compile",
            group="source", choices=("text",), noun="part", kept="repeated",
        ),
    )  # fmt: skip
    tokenizer: Path | None = field(
        default=None,
        metadata=option(
            "folder of the tokenizer.json to use, needed for .onnx (default: the model's own)",
            about="folder with the `tokenizer.json` to use: needed for `.onnx`, else instead of "
            "the model's own",
            group="source", metavar="DIR", kept="repeated",
        ),
    )  # fmt: skip
    task: str | None = field(
        default=None,
        metadata=option(
            "what the model is for, as Hugging Face calls it (default: what its architecture says)",
            about="what the model is for, as Hugging Face calls it: `text-generation`, "
            "`feature-extraction`, `fill-mask`, `image-feature-extraction`, "
            "`image-classification`, `automatic-speech-recognition` (its encoder); by default what "
            "the architecture in `config.json` is for",
            group="source", metavar="TASK", kept="repeated",
        ),
    )  # fmt: skip
    preprocessor: Path | None = field(
        default=None,
        metadata=option(
            "preprocessor_config.json to use: how pictures or recordings become input (default: "
            "the model's own)",
            about="`preprocessor_config.json` to use, which says how pictures or recordings become "
            "input: needed for an `.onnx` with none beside it, else instead of the model's own",
            group="source", metavar="FILE", kept="repeated",
        ),
    )  # fmt: skip
    force: bool = field(
        default=False,
        metadata=option(
            "replace an existing bundle at OUT",
            about="replace a bundle, which may hold nothing but what its manifest lists",
            group="work",
        ),
    )  # fmt: skip
    keep_work: bool = field(
        default=False,
        metadata=option(
            "keep the traced graph (eval reuses it)",
            about="keep the work folder: `eval` reuses it",
            group="work",
        ),
    )  # fmt: skip
    work: Path | None = field(
        default=None,
        metadata=option(
            "folder for intermediate graphs",
            about="where the traced graph goes, and what a compile finished before it was "
            "interrupted, with which the same command goes on: a new or empty folder outside of "
            "OUT, or one of an earlier compile; it is kept",
            group="work", metavar="DIR", shown=".OUT.work",
        ),
    )  # fmt: skip
    device: str = field(
        default="cpu",
        metadata=option(
            "where ONNX Runtime runs (cuda needs the extra 'gpu'; default %(default)s)",
            about="where calibration runs",
            group="calibration", choices=tuple(PROVIDERS), noun="device", kept="repeated",
        ),
    )  # fmt: skip
    max_relative_deviation: float = field(
        default=0.10,
        metadata=option(
            "a lifecycle varying more than this is reported, not replaced (default 0.10)",
            about="a spike that varies more is reported and left alone",
            group="calibration", metavar="X", shown="0.10", refuse=_outside_unit, kept="repeated",
        ),
    )  # fmt: skip
    insertion: str = field(
        default="auto",
        metadata=option(
            "what replaces a sink: rows after the norms, or keys and values; auto measures both",
            about="what replaces a sink: templates after the norms, or keys and values at the "
            "attention and zeros after the norms; `auto` measures these and both together on the "
            "quantized graph, for each lifecycle",
            group="calibration", choices=("norm", "kv", "auto"), noun="insertion", kept="repeated",
        ),
    )  # fmt: skip
    budget: float | None = field(
        default=None,
        metadata=option(
            "leave the fewest products in half precision that keep the calibration perplexity "
            "within X times fp32's, e.g. 1.005",
            about="leave the fewest products in half precision that keep the calibration "
            "perplexity within X times fp32's, e.g. 1.005; `inspect` lists them",
            metavar="X", refuse=_no_budget, kept="recorded",
        ),
    )  # fmt: skip
    trust_remote_code: bool = field(
        default=False,
        metadata=option(
            "run the Python code that comes with a model",
            group="source", kept="recorded", permits=True,
        ),
    )  # fmt: skip
    accept_terms: bool = field(
        default=False,
        metadata=option(
            "you have read and accept the terms of a gated model (gemma3-270m)",
            group="source", permits=True,
        ),
    )  # fmt: skip


# Not a property of a compile, but asked for beside its options.
_DRY_RUN = Row(
    "print the plan and stop",
    about="check all that `config.json` tells (of a hub model nothing else is fetched), print the "
    "plan and stop",
    group="work",
)


@dataclass(frozen=True)
class _Option:
    """A row beside what its field says: `types` without None, `default` MISSING if required."""

    name: str
    row: Row
    types: tuple[Any, ...]
    default: Any

    @property
    def flags(self) -> list[str]:
        """As on the command line; none of a positional argument."""
        if self.row.positional:
            return []
        return list(self.row.parts) or [self.row.flag or f"--{self.name.replace('_', '-')}"]

    @property
    def shown(self) -> str:
        """The default in the README's table."""
        if self.row.shown is not None:
            return self.row.shown
        return "" if self.default is None or isinstance(self.default, bool) else str(self.default)

    def add(self, container: argparse._ActionsContainer) -> None:
        """Define it for a command line."""
        row = self.row
        more: dict[str, Any] = {} if row.metavar is None else {"metavar": row.metavar}
        if row.parts:
            for flag, word in row.parts.items():
                help = f"{word} {row.help}"
                container.add_argument(flag, default="", dest=_part(flag), help=help, **more)
            return
        more |= {"help": row.help}
        if self.types == (bool,):
            more |= {"action": "store_true"}
        elif row.repeatable:
            more |= {"action": "append"}
        elif row.choices:
            more |= {"choices": row.choices, "default": self.default}
        else:
            natural = next((kind for kind in (int, float, Path) if kind in self.types), None)
            more |= {"type": row.read or natural}
        if row.positional:
            container.add_argument(self.name, **more)
        else:
            default = {} if row.repeatable else {"default": self.default}
            container.add_argument(*self.flags, dest=self.name, **(default | more))

    def value(self, args: argparse.Namespace) -> Any:
        """What the command line gave."""
        if self.row.parts:
            return self.row.join(*(getattr(args, _part(flag)) for flag in self.row.parts))
        given = getattr(args, self.name)
        return (tuple(given) if given else None) if self.row.repeatable else given

    def recordable(self, value: Any) -> bool:
        """Whether a JSON value is what `record` writes for one of these options."""
        if value is None or isinstance(value, bool):
            return value is self.default or type(value) in self.types
        in_json = {Path: (str,), float: (int, float)}
        return any(isinstance(value, in_json.get(kind, (kind,))) for kind in self.types)


def _part(flag: str) -> str:
    """`min_shapes` of `--minShapes`."""
    return re.sub(r"[A-Z]", lambda match: f"_{match[0].lower()}", flag.lstrip("-"))


def _table(kind: type[CompileOptions]) -> dict[str, _Option]:
    hints = get_type_hints(kind)
    found = {}
    for entry in fields(kind):
        types = tuple(t for t in get_args(hints[entry.name]) or (hints[entry.name],)
                      if t is not NoneType)  # fmt: skip
        found[entry.name] = _Option(entry.name, entry.metadata[_ROW], types, entry.default)
    return found


# What one run permits. Nothing that is read from a file ever sets one of these.
PERMISSIONS = tuple(name for name, one in _table(CompileOptions).items() if one.row.permits)


def add(container: argparse._ActionsContainer, *names: str) -> None:
    """Define the options `names`, which are the same for every command that has them."""
    table = _table(CompileOptions)
    for name in names:
        table[name].add(container)


def add_all(parser: argparse.ArgumentParser, kind: type[CompileOptions] = CompileOptions) -> None:
    """Define all options of a compile, in their groups."""
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for one in _of_command(kind):
        title = one.row.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        one.add(groups[title])


def _of_command(kind: type[CompileOptions]) -> list[_Option]:
    return [*_table(kind).values(), _Option("dry_run", _DRY_RUN, (bool,), False)]


def from_arguments(
    args: argparse.Namespace, kind: type[CompileOptions] = CompileOptions
) -> CompileOptions:
    """The options that a command line with `add_all` gave. UsageError for bad shapes."""
    return kind(**{name: one.value(args) for name, one in _table(kind).items()})


def check_values(options: CompileOptions) -> None:
    """Raise UsageError for the first value that no compile takes."""
    for name, one in _table(type(options)).items():
        value, choices = getattr(options, name), one.row.choices
        if choices and value not in (one.default, *choices):
            known = ", ".join(choices)
            raise UsageError(f"unknown {one.row.noun or name} '{value}': use {known}.")
        reason = one.row.refuse(value)
        if reason is not None:
            raise UsageError(reason)


def record(options: CompileOptions) -> dict[str, Any]:
    """What the manifest keeps of `options`, as JSON values."""
    kept = [name for name, one in _table(type(options)).items() if one.row.kept]
    values = {name: getattr(options, name) for name in kept}
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def repeated(
    recorded: Mapping[str, Any], where: Path, kind: type[CompileOptions] = CompileOptions
) -> dict[str, Any]:
    """Of a `record`, the options that decide the graph; one that it lacks keeps its default.

    Raises BundleError, naming the manifest `where`, if one is of another kind than is written.
    """
    found = {}
    for name, one in _table(kind).items():
        if one.row.kept != "repeated" or (name not in recorded and one.default is not MISSING):
            continue
        value = recorded.get(name)
        if not one.recordable(value):
            raise BundleError(
                f"{where} records no {name} that can be used: compile the bundle again, or "
                "measure it alone with --bundle-only"
            )
        found[name] = Path(value) if Path in one.types and value is not None else value
    return found


def markdown(kind: type[CompileOptions] = CompileOptions) -> str:
    """The README's table of the options of `iq-export compile`."""
    lines = ["| option | default | |", "|---|---|---|"]
    for one in _of_command(kind):
        if one.row.positional:
            continue
        value = "|".join(one.row.choices) or one.row.metavar
        flags = [f"{flag} {value}" if value else flag for flag in one.flags]
        cells = (
            ", ".join(f"`{flag}`" for flag in flags),
            f"`{one.shown}`" if one.shown else "",
            one.row.about or one.row.help,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
