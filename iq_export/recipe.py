"""Recipes: which role gets which number format, and which steps are taken, as data
(`graphs/recipes/*.yaml`)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from iq_export.errors import UsageError
from iq_export.formats.base import (
    HALF,
    ActivationFormat,
    CacheFormat,
    Format,
    WeightFormat,
    find_format,
)
from iq_export.formats.rounding import Rounding

SINK_POLICIES = ("always", "for-half")
_ROLES: dict[str, type[Format]] = {
    "weights": WeightFormat,
    "activations": ActivationFormat,
    "cache": CacheFormat,
    "head": WeightFormat,
}


@dataclass(frozen=True)
class Recipe:
    """Roles: `weights` and `activations` of the products in blocks, the KV `cache`, and the `head`,
    the product that gives logits; None, in a file `half`, is not quantized.

    Steps: `smoothing`: fold factors into norms and up-projections. `rotation`: the Hadamard block
    on the down-projection input at run time, or None. `folded_rotation`: rotate residual stream
    and values inside the weights. `side_channels`: how many channels of the down-projection input
    bypass its quantizer. `gptq`: round weights with compensation. `sinks`: one of SINK_POLICIES.
    """

    name: str
    weights: WeightFormat | None
    activations: ActivationFormat | None
    cache: CacheFormat | None
    smoothing: bool
    rotation: int | None
    sinks: str
    folded_rotation: bool = False
    side_channels: int = 0
    gptq: bool = False
    head: WeightFormat | None = None

    @property
    def rounding(self) -> Rounding:
        """Of the products in blocks."""
        return Rounding(self.weights, self.activations)

    @property
    def calibrates(self) -> bool:
        """Whether its products' inputs are measured block by block: else weights alone are rounded,
        to the nearest."""
        return self.activations is not None or self.gptq

    @property
    def rounds_convolutions(self) -> bool:
        """Whether convolutions are quantized as products are: a weight's scale is an output
        channel's."""
        weights = self.weights if self.activations is not None else None
        return weights is not None and weights.per_channel

    @property
    def formats(self) -> tuple[Format, ...]:
        """Those of all roles that are quantized."""
        found = (self.weights, self.activations, self.cache, self.head)
        return tuple(each for each in found if each is not None)

    @property
    def simulated(self) -> bool:
        """Whether it is for study: no engine multiplies with its codes."""
        return self.rounding.simulated

    def record(self) -> dict[str, Any]:
        """A JSON object that tells it whole; see `from_record`."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        for role in _ROLES:
            found[role] = HALF if found[role] is None else found[role].name
        return found

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Recipe:
        """Raises UsageError for other keys, unknown formats and values out of range."""
        name = record.get("name")
        allowed = {field.name for field in fields(Recipe)}
        required = {field.name for field in fields(Recipe) if field.default is MISSING}
        if not required <= set(record) <= allowed:
            raise UsageError(
                f"Recipe {name!r} must have the keys {sorted(required - {'name'})}, may have "
                f"{sorted(allowed - required)} and no other."
            )
        values = dict(record)
        for role, kind in _ROLES.items():
            try:
                values[role] = find_format(kind, record.get(role, HALF))
            except UsageError as error:
                raise UsageError(f"Recipe {name!r}: {error}") from None
        return Recipe(**values)

    def __post_init__(self) -> None:
        if self.activations is not None and self.weights is None:
            raise UsageError(
                f"Recipe {self.name!r}: {self.activations.name} activations need quantized "
                "weights; TensorRT multiplies them with nothing else."
            )
        if self.head is not None:
            raise UsageError(f"Recipe {self.name!r}: the head stays in half precision.")
        for step in ("smoothing", "folded_rotation", "gptq"):
            if not isinstance(getattr(self, step), bool):
                raise UsageError(f"Recipe {self.name!r}: {step} is true or false.")
        if self.gptq and self.weights is None:
            raise UsageError(f"Recipe {self.name!r}: gptq rounds weights, which stay in half.")
        if self.rotation is not None and not _is_power_of_two(self.rotation):
            raise UsageError(f"Recipe {self.name!r}: rotation is a power of two, or null.")
        if not _is_count(self.side_channels):
            raise UsageError(f"Recipe {self.name!r}: side_channels is a number of channels.")
        if self.side_channels and self.activations is None:
            raise UsageError(
                f"Recipe {self.name!r}: side_channels bypass a quantizer, and activations stay in "
                "half."
            )
        if self.sinks not in SINK_POLICIES:
            raise UsageError(f"Recipe {self.name!r}: sinks is one of {', '.join(SINK_POLICIES)}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_power_of_two(value: object) -> bool:
    return _is_count(value) and value > 1 and value & (value - 1) == 0  # type: ignore[operator]


def recipe_folder() -> Path:
    """Inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "graphs" / "recipes"


def recipe_names() -> list[str]:
    """All that `load_recipe` knows."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """The recipe called `name`; UsageError with the nearest names if there is none."""
    known = recipe_names()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known recipes: {', '.join(known)}."
        raise UsageError(f"Unknown recipe {name!r}: {hint}")
    import yaml  # a device that builds an engine has none

    values = yaml.safe_load((recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    return Recipe.from_record({"name": name, **values})
