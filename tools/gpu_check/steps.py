"""Steps that do not hide each other: each one's outcome is recorded, whatever becomes of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iq_export.bundle.manifest import json_safe, write_atomically

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
_TAIL = 6000
_LIMIT = 900  # seconds of one child


class Skipped(Exception):
    """A step cannot be done here; the message is the reason."""


class Failed(Exception):
    """A step found something wrong; what it found all the same, and the output of its child."""

    def __init__(self, reason: str, result: Any = None, output: str = "") -> None:
        super().__init__(reason)
        self.result, self.output = result, output


class Record:
    """All that is known so far, written to `path` after every step: a run that is cut off keeps
    what it has."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path = path
        self.data: dict[str, Any] = {**head, "steps": {}}

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.data["steps"]
        return found

    def ok(self, name: str) -> bool:
        return self.steps.get(name, {}).get("status") == OK

    def result(self, name: str) -> Any:
        return self.steps.get(name, {}).get("result")

    def step(self, name: str, action: Callable[[], Any], *, after: str = "") -> None:
        """Do `action` and keep what it returns; skip it if the step `after` did not succeed."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        entry: dict[str, Any] = {"status": OK, "reason": "", "result": None, "output": ""}
        try:
            if after and not self.ok(after):
                raise Skipped(f"needs {after}, which {self.steps[after]['status']}")
            entry["result"] = action()
        except Skipped as why:
            entry |= {"status": SKIPPED, "reason": str(why)}
        except Failed as why:
            entry |= {"status": FAILED, "reason": str(why), "result": why.result}
            entry["output"] = why.output[-_TAIL:]
        except Exception as error:
            entry |= {"status": FAILED, "reason": f"{type(error).__name__}: {error}"}
            entry["output"] = traceback.format_exc()[-_TAIL:]
        entry["seconds"] = time.perf_counter() - begin
        self.steps[name] = entry
        said = f": {entry['reason']}" if entry["reason"] else ""
        print(f"{name} {entry['status']}{said}", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        write_atomically(self._path, json.dumps(json_safe(self.data), indent=1) + "\n")


def child(command: list[str], environment: dict[str, str], cwd: Path) -> dict[str, Any]:
    """The JSON object in the last line of a command's output.

    Failed, with all that it said, if it dies, takes too long, or reports an `error`.
    """
    try:
        done = subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, errors="replace",
            timeout=_LIMIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stderr or b""
        raise Failed(
            f"not finished after {_LIMIT} s", output=said.decode(errors="replace")
        ) from error
    output = done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        result = None
    if isinstance(result, dict) and "error" in result:
        raise Failed(result["error"], output=output)
    if done.returncode or not isinstance(result, dict):
        raise Failed(_end(done.returncode, done.stderr), output=output)
    return result


def _end(code: int, stderr: str) -> str:
    how = f"ended with code {code}"
    if code < 0:
        known = {int(number): number.name for number in signal.Signals}
        how = f"died of {known.get(-code, f'signal {-code}')}"
    lines = stderr.strip().splitlines()
    return f"{how}: {lines[-1].strip()}" if lines else how
