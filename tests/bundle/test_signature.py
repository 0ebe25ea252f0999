"""A signature tells who made a bundle; a checksum, only that it is whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from iq_export.bundle.manifest import CHECKSUM_NAME, MANIFEST_NAME, SIGNATURE_NAME
from iq_export.bundle.package import Bundle, update_manifest
from iq_export.cli import main
from iq_export.errors import BundleError, UsageError
from tests.bundle import corpus
from tests.runtime.conftest import write_bundle


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key, as OpenSSL writes them."""
    pytest.importorskip("cryptography", reason="cryptography (the extra 'sign') is not installed")
    from cryptography.hazmat.primitives.asymmetric import ed25519

    return write_keys(tmp_path, "k", ed25519.Ed25519PrivateKey.generate())


def write_keys(folder: Path, name: str, key: object) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization as form

    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(  # type: ignore[attr-defined]
            form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(  # type: ignore[attr-defined]
            form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_a_signed_bundle(
    bundle: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys
    with pytest.raises(BundleError, match="is not signed"):
        Bundle.open(bundle, key=public)
    assert main(["sign", str(bundle), "--key", str(private)]) == 0
    assert SIGNATURE_NAME in capsys.readouterr().out
    assert (bundle / SIGNATURE_NAME).stat().st_size == 64
    assert Bundle.open(bundle, key=public) == Bundle.open(bundle)
    # A second time over the first.
    assert main(["sign", str(bundle), "--key", str(private), "--json"]) == 0
    assert Bundle.open(bundle, key=public)


def test_what_is_resealed_has_a_checksum_and_no_signature(
    bundle: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys
    main(["sign", str(bundle), "--key", str(private)])
    text = (bundle / MANIFEST_NAME).read_text()
    corpus.seal(bundle, text.replace('"tiny"', '"evil"'))
    assert Bundle.open(bundle).manifest.name == "evil"
    assert main(["verify", str(bundle), "--key", str(public)]) == 7
    assert "is not what the owner of" in capsys.readouterr().err
    # Not even parsed.
    corpus.seal(bundle, "{")
    with pytest.raises(BundleError, match="is not what the owner of"):
        Bundle.open(bundle, key=public)


def test_what_changes_a_bundle_ends_its_signature(bundle: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    main(["sign", str(bundle), "--key", str(private)])
    update_manifest(Bundle.open(bundle), notes=["measured"])
    with pytest.raises(BundleError, match="signed"):
        Bundle.open(bundle, key=public)


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"x" * 63, b"x" * 65, b"x" * 10**6])
def test_what_is_no_signature(bundle: Path, keys: tuple[Path, Path], content: bytes) -> None:
    (bundle / SIGNATURE_NAME).write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(bundle, key=keys[1])


def test_a_linked_signature_is_none(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    main(["sign", str(bundle), "--key", str(keys[0])])
    (bundle / SIGNATURE_NAME).rename(tmp_path / "sig")
    (bundle / SIGNATURE_NAME).symlink_to(tmp_path / "sig")
    with pytest.raises(BundleError, match="link"):
        Bundle.open(bundle, key=keys[1])


def test_another_key(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    main(["sign", str(bundle), "--key", str(keys[0])])
    other = write_keys(tmp_path, "o", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(BundleError, match="is not what the owner of"):
        Bundle.open(bundle, key=other[1])
    curve = write_keys(tmp_path, "c", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(UsageError, match="another kind"):
        Bundle.open(bundle, key=curve[1])
    assert main(["sign", str(bundle), "--key", str(curve[0]), "-q"]) == 2


@pytest.mark.parametrize("swapped", [True, False])
def test_what_is_no_key(
    bundle: Path, keys: tuple[Path, Path], tmp_path: Path, swapped: bool
) -> None:
    (tmp_path / "text").write_text("no key")
    private, public = keys[::-1] if swapped else (tmp_path / "text", tmp_path / "none")
    assert main(["sign", str(bundle), "--key", str(private), "-q"]) == 2
    assert main(["verify", str(bundle), "--key", str(public), "-q"]) == 2
    assert not (bundle / SIGNATURE_NAME).exists()


def test_a_damaged_bundle_is_not_signed(bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle / "tokenizer.json").write_text("{}")
    assert main(["sign", str(bundle), "--key", str(keys[0]), "-q"]) == 7
    assert not (bundle / SIGNATURE_NAME).exists()


def test_openssl_reads_it(bundle: Path, keys: tuple[Path, Path]) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    main(["sign", str(bundle), "--key", str(keys[0])])
    command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", str(keys[1]), "-rawin"]
    command += ["-in", str(bundle / MANIFEST_NAME), "-sigfile", str(bundle / SIGNATURE_NAME)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (bundle / MANIFEST_NAME).write_text("{}")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_without_the_library(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for command in ("sign", "verify"):
        assert main([command, str(bundle), "--key", "k", "-q"]) == 1
        assert "pip install 'iq-export[sign]'" in capsys.readouterr().err
    assert sorted(p.name for p in bundle.glob("manifest*")) == [MANIFEST_NAME, CHECKSUM_NAME]
