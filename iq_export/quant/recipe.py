"""Recipes: what to quantize and how, as data (`graphs/recipes/*.yaml`)."""

from __future__ import annotations

import difflib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from iq_export.errors import UsageError

SINK_POLICIES = ("always", "for-half")


@dataclass(frozen=True)
class Recipe:
    """`weight_bits` 4, 8 or 16, `activation_bits` 4, 6, 8 or 16 and `kv_bits` (of the KV cache) 8
    or 16, where 16 is not quantized; 4- and 6-bit activations are int8 ones that use fewer codes.
    `smoothing`: fold factors into norms and up-projections. `folded_rotation`: rotate residual
    stream and values inside the weights. `rotation`: the Hadamard block on the down-projection
    input at run time, or None; `side_channels`: how many of its channels bypass the quantizer.
    `weight_block`: largest int4 block; `gptq`: round weights with compensation. `sinks`: one of
    SINK_POLICIES."""

    name: str
    weight_bits: int
    activation_bits: int
    kv_bits: int
    smoothing: bool
    rotation: int | None
    sinks: str
    folded_rotation: bool = False
    side_channels: int = 0
    weight_block: int = 128
    gptq: bool = False

    @property
    def activation_max(self) -> int | None:
        """The largest code of an activation, None if activations are not quantized."""
        return None if self.activation_bits == 16 else 2 ** (self.activation_bits - 1) - 1

    @property
    def simulated(self) -> bool:
        """Whether no hardware gains from it: only the accuracy is what it would be. TensorRT
        multiplies int8 activations with int8 weights and with nothing else."""
        return self.activation_bits in (4, 6) or (self.activation_bits, self.weight_bits) == (8, 4)

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8, 16) or self.activation_bits not in (4, 6, 8, 16):
            raise UsageError(
                f"Recipe {self.name!r}: weight_bits is 4, 8 or 16, activation_bits 4, 6, 8 or 16."
            )
        if self.weight_bits == 16 and self.activation_bits != 16:
            raise UsageError(
                f"Recipe {self.name!r}: 8-bit activations need 8-bit weights; TensorRT multiplies "
                "them with nothing else."
            )
        if self.kv_bits not in (8, 16):
            raise UsageError(f"Recipe {self.name!r}: kv_bits is 8 or 16.")
        if self.sinks not in SINK_POLICIES:
            raise UsageError(f"Recipe {self.name!r}: sinks is one of {', '.join(SINK_POLICIES)}.")


def recipe_folder() -> Path:
    """Inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "graphs" / "recipes"


def load_recipe(name: str) -> Recipe:
    """The recipe called `name`; UsageError with the nearest names if there is none."""
    import yaml  # a light install has none, and reads recipes from manifests only

    known = sorted(path.stem for path in recipe_folder().glob("*.yaml"))
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known recipes: {', '.join(known)}."
        raise UsageError(f"Unknown recipe {name!r}: {hint}")
    text = (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    allowed = {field.name for field in fields(Recipe)} - {"name"}
    required = {f.name for f in fields(Recipe) if f.default is MISSING} - {"name"}
    if not required <= set(values) <= allowed:
        raise UsageError(
            f"Recipe {name!r} must have the keys {sorted(required)}, may have "
            f"{sorted(allowed - required)} and no other."
        )
    return Recipe(name=name, **values)
