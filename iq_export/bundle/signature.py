"""`manifest.json.sig`: who made a bundle. The checksum of a manifest tells only that it is whole.

The raw Ed25519 signature of the manifest's bytes, which hold the checksum of every other file.
OpenSSL checks it as well (docs/bundle.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iq_export.bundle.manifest import MANIFEST_NAME, SIGNATURE_NAME, write_atomically
from iq_export.errors import BundleError, IqError, UsageError
from iq_export.files import read_inside

_SIGNATURE_BYTES = 64
_LARGEST_KEY = 1 << 16


def write_signature(folder: Path, manifest: bytes, key: Path) -> Path:
    """Sign `manifest`, the content of `folder`'s, with the private key of the PEM file `key`.

    Raises UsageError if that file holds no Ed25519 private key, and IqError without the package
    cryptography.
    """
    private = _load(key, private=True)
    path = folder / SIGNATURE_NAME
    write_atomically(path, private.sign(manifest))
    return path


def check_signature(folder: Path, manifest: bytes, key: Path) -> None:
    """BundleError if `manifest`, the content of `folder`'s, is not signed by the public `key`.

    Raises UsageError if the file `key` holds no Ed25519 public key in PEM, and IqError without the
    package cryptography.
    """
    public = _load(key, private=False)
    from cryptography.exceptions import InvalidSignature

    try:
        signature = read_inside(folder, SIGNATURE_NAME, _SIGNATURE_BYTES)
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder} is not signed: it has no {SIGNATURE_NAME}; whoever made it runs "
            "iq-export sign"
        ) from error
    try:
        public.verify(signature, manifest)
    except InvalidSignature as error:
        raise BundleError(
            f"{folder / MANIFEST_NAME} is not what the owner of {key} signed: get the bundle again "
            "from where you trust it"
        ) from error


def _load(path: Path, *, private: bool) -> Any:
    """The key of a PEM file."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ed25519
        from cryptography.hazmat.primitives.serialization import (
            load_pem_private_key,
            load_pem_public_key,
        )
    except ImportError as error:
        raise IqError(
            "signatures need the package cryptography: pip install 'iq-export[sign]'"
        ) from error
    kind = "private" if private else "public"
    try:
        if not path.is_file():
            raise UsageError(f"{path} is not a file: give that of a {kind} key")
        with path.open("rb") as stream:
            content = stream.read(_LARGEST_KEY)
        key = load_pem_private_key(content, None) if private else load_pem_public_key(content)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # TypeError: it is encrypted.
        raise UsageError(f"{path} holds no {kind} key in PEM without a password") from error
    wanted = ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey
    if not isinstance(key, wanted):
        raise UsageError(f"{path} holds a {kind} key of another kind: give an Ed25519 one")
    return key
