"""What was found of every type, as docs/measured/families.json keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from tools.families.judge import Row


def _transformers() -> str:
    return metadata.version("transformers")


@dataclass
class Record:
    """A row by model type, all of one version of transformers."""

    transformers: str = field(default_factory=_transformers)
    rows: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Record:
        """The record at `path`; a new one if there is none, or it is of another transformers."""
        if not path.is_file():
            return cls()
        found = cls(**json.loads(path.read_text(encoding="utf-8")))
        return found if found.transformers == _transformers() else cls()

    def write(self, path: Path) -> None:
        """Write it in the order of the types' names."""
        rows = dict(sorted(self.rows.items()))
        text = json.dumps({"transformers": self.transformers, "rows": rows}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
