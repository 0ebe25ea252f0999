"""Print the texts of an R package's lazy-load database: `python read_r.py FOLDER`.

Runs in an environment that has `rdata`. FOLDER holds Rdata.rdx and Rdata.rdb; every object must be
a character vector of lines, where an empty line ends a paragraph.
"""

from __future__ import annotations

import sys
import warnings
import zlib
from pathlib import Path

import rdata


def main() -> None:
    folder = Path(sys.argv[1])
    index = rdata.read_rds(folder / "Rdata.rdx")
    blob = (folder / "Rdata.rdb").read_bytes()
    warnings.simplefilter("ignore")  # an entry has no file type
    for name in sorted(index["variables"]):
        start, size = map(int, index["variables"][name])
        # Four bytes of size stand before the compressed entry.
        entry = zlib.decompress(blob[start + 4 : start + size])
        lines = rdata.conversion.convert(rdata.parser.parse_data(entry))
        paragraphs = "\n".join(str(line) for line in lines).split("\n\n")
        joined = (" ".join(paragraph.split()) for paragraph in paragraphs)
        print("\n\n".join(text for text in joined if text), end="\n\n")


if __name__ == "__main__":
    main()
