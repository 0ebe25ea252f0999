"""Render a chat template as transformers does, in a process of its own.

A template is a program that came with the weights. The sandbox of jinja2 keeps it from the system,
but not from looping for ever or filling the memory; the child's limits do. The child is this module
(`python -m iq_export.run.chat_template`): a request as JSON on stdin, the answer on stdout.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from iq_export.child import CLEAN_FOLDER, environment
from iq_export.errors import ModelError
from iq_export.supervise import end_with_parent

# A template of 20 kB takes milliseconds, and Python with jinja2 some 30 MB.
_CPU_SECONDS = 5
_WALL_SECONDS = 30  # a busy machine; and where there is no limit of CPU time (Windows)
_MEMORY_BYTES = 512 << 20
_LONGEST_MESSAGE = 300


def render(
    template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str], name: str
) -> str:
    """The prompt for `messages`, up to the assistant's turn.

    tokens: the special tokens' texts by the names that templates know (`bos_token`); name: whose
    template it is, for messages. Raises ModelError if the template fails or does not end.
    """
    request = json.dumps({"template": template, "messages": list(messages), "tokens": dict(tokens)})
    command = [sys.executable, "-m", "iq_export.run.chat_template", str(os.getpid())]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, encoding="utf-8", errors="replace",
            timeout=_WALL_SECONDS, check=False, cwd=CLEAN_FOLDER,
            env={**environment(package=True), "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        answer = json.loads(done.stdout)
        error = answer.get("error")
    except OSError as problem:
        error = f"no process can be started for it: {problem.strerror or problem}"
    except subprocess.TimeoutExpired:
        error = f"it does not end within {_WALL_SECONDS} s"
    except ValueError:  # the child was ended by a limit
        error = f"it takes more than {_CPU_SECONDS} s or {_MEMORY_BYTES >> 20} MiB"
    if error is not None:
        raise ModelError(f"The chat template of {name} fails: {error}")
    return str(answer["text"])


def render_here(request: Mapping[str, Any]) -> dict[str, str]:
    """What the child does: `{"text": ...}`, or `{"error": ...}` whatever goes wrong.

    request: `template`, `messages` and `tokens` as in `render`.
    """
    try:
        template = _environment().from_string(request["template"])
        # Templates ask `tools is not none`; a field that is null counts as absent.
        given: dict[str, Any] = {"tools": None, "documents": None, **request["tokens"]}
        messages = [
            {key: value for key, value in message.items() if value is not None}
            for message in request["messages"]
        ]
        text = template.render(messages=messages, add_generation_prompt=True, **given)
        text.encode("utf-8")  # a template can write half of a character, '\ud83d'
    except MemoryError:
        return {"error": f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # templates are programs: they raise whatever programs raise
        return {"error": _sentence(error)}
    return {"text": text}


def _environment() -> Any:
    """jinja2 with what transformers adds: the same filters, functions, tags and limits."""
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}` marks the assistant's words for training: here they are a scope."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Without names like `__class__`, by which a sandbox can be left."""

        def __init__(*args: Any, **given: Any) -> None:
            given = dict(*args[1:], **given)
            for key in given:
                _check_name(key)
            jinja2.utils.Namespace.__init__(args[0], given)

        def __setitem__(self, key: str, value: Any) -> None:
            _check_name(key)
            super().__setitem__(key, value)

    def _check_name(key: str) -> None:
        if key.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no place for {key!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals["namespace"] = Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which would change the prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _sentence(error: Exception) -> str:
    """One line: what was raised, and in which line of the template."""
    import jinja2

    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    text = " ".join(str(error).split())[:_LONGEST_MESSAGE]
    if not isinstance(error, jinja2.TemplateError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if line is None else f"{text} (line {line})"


def _set_limits() -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's patience is the only limit
        return
    for kind, limit in (
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        if hard == resource.RLIM_INFINITY or limit <= hard:
            resource.setrlimit(kind, (limit, hard))


def main() -> int:
    """Serve the one request on stdin. The one argument is the parent's process id."""
    end_with_parent(int(sys.argv[1]))
    request = json.loads(sys.stdin.read())
    _set_limits()
    json.dump(render_here(request), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
