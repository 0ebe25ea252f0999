"""What a bundle and a folder must be after something went wrong, as the commands see them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tests.faults.run import World, run

# Of the manifest: what two compiles of the same model have in common.
_SAME = ("name", "recipe", "dtype", "opset", "source", "options", "check")
_SAME_GRAPH = ("name", "inputs", "outputs", "lifecycles")
_CONTENT = ("model.onnx", "model.onnx.data", "plan.json", "sinks.safetensors", "tokenizer.json")


def names(folder: Path) -> set[str]:
    """Relative names of all below a folder, links not followed."""
    found = set()
    for root, folders, files in os.walk(folder):
        found |= {os.path.relpath(os.path.join(root, name), folder) for name in folders + files}
    return found


def content(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of the files below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def signature(bundle: Path) -> dict[str, Any]:
    """What is the same whenever this bundle is compiled: no times, no engines."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    found = {name: manifest[name] for name in _SAME}
    (graph,) = manifest["graphs"]
    found |= {f"graph's {name}": graph[name] for name in _SAME_GRAPH}
    for name in _CONTENT:
        path = bundle / name
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Names of what differs."""
    return ", ".join(key for key in one if one[key] != other.get(key))


def whole(box: Path, bundle: Path) -> tuple[bool, list[str]]:
    """Whether `verify` accepts, and what is wrong: `inspect` must agree, and each refuses in a
    sentence."""
    inspected = run(box, ["inspect", str(bundle), "-q"])
    verified = run(box, ["verify", str(bundle), "-q"])
    why = [*inspected.complaints(), *verified.complaints()]
    if inspected.code == 0 and verified.code != 0:
        why.append(f"inspect accepts, verify rejects{verified.sentence()}")
    if inspected.code != 0 and verified.code == 0:
        why.append(f"verify accepts, inspect rejects{inspected.sentence()}")
    return verified.code == 0, why


def solo(world: World, model: str, recipe: str) -> dict[str, Any]:
    """The signature of a bundle whose compile had the machine for itself."""
    key = (model, recipe)
    if key not in world.solo:
        box = world.box("solo")
        done = run(box, world.compile(box / "place" / "b", model, recipe))
        if done.code != 0:
            raise RuntimeError(f"a plain compile fails: {done}")
        world.solo[key] = signature(box / "place" / "b")
    return world.solo[key]
