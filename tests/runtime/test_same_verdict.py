"""Python and C++ accept the same bundles, of one corpus of damaged and forged ones."""

from __future__ import annotations

from pathlib import Path

from iq_export.bundle.package import Bundle
from iq_export.errors import BundleError
from tests.bundle import corpus
from tests.runtime.conftest import execute


def test_the_same_verdict(built: Path, bundle: Path, tmp_path: Path) -> None:
    forged = dict(corpus.make(bundle, tmp_path / "forged"))
    done = execute([built / "iq_check_all", *forged.values()])
    lines = done.out.splitlines()
    assert len(lines) == len(forged) > 900
    differing, accepted = [], 0
    for (name, folder), line in zip(forged.items(), lines, strict=True):
        code, theirs = line.split("\t", 1)
        try:
            Bundle.open(folder)
            ours = ""
        except BundleError as error:
            ours = str(error)
        accepted += not ours
        whole = name.startswith(corpus.WHOLE)
        if bool(ours) != bool(theirs) or code not in ("0", "7") or (whole and ours):
            differing.append((name, ours[:300], theirs[:300]))
    assert not differing
    assert len(forged) / 10 < accepted < len(forged) / 2
