"""Templates give what transformers gives, and end in a sentence whatever they do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iq_export.errors import ModelError
from iq_export.run.chat_template import render, render_here

BODY = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
TALK = [
    {"role": "system", "content": "  Be kind. "},
    {"role": "user", "content": "Grüße \"<b>\" & 'x'\n"},
    {"role": "assistant", "content": "Ja.", "tool_calls": None},
    {"role": "user", "content": "{{ bos_token }}"},
]

# What the templates of published models make use of, each written anew.
TEMPLATES = {
    "tools is not none": "{% if tools is not none %}You have tools.\n{% endif %}" + BODY,
    "tools, tojson": "{% if tools is not none %}{{ tools | tojson }}{% endif %}" + BODY,
    "documents": "{% if documents is not none %}Documents.\n{% endif %}" + BODY,
    "tools is defined": "{{ tools is defined }} {{ custom_tools is defined }} {{ tools }}",
    "not tools": "{% if not tools %}none{% endif %}{% if tools %}some{% endif %}",
    "default": "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{{ date_string }} {{ enable_thinking | default(true) }}",
    "thinking": "{%- if enable_thinking is defined and enable_thinking is false %}off{%- else %}on"
    "{%- endif %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "generation trims": "{% for m in messages %}\n  {%- generation -%}\n {% set x = m.role %}"
    "{{ x }}\n {%- endgeneration -%}\n{% endfor %}{{ x is defined }}",
    "tojson": "{{ messages[1] | tojson }}",
    "tojson, not ascii": "{{ messages[1] | tojson(ensure_ascii=True) }}",
    "tojson, indent": "{{ messages | tojson(indent=4) }}",
    "tojson, separators": "{{ messages | tojson(separators=(',', ':')) }}",
    "tojson, sorted": "{{ messages | tojson(sort_keys=True) }}",
    "tojson of undefined": "{{ nothing | tojson }}",
    "type error": "{{ messages[0].content + 1 }}",
    "range": "{% for i in range(200000) %}{% endfor %}",
    "raise_exception": "{{ raise_exception('roles must alternate') }}",
    "undefined call": "{{ nothing() }}",
    "undefined attribute": "{{ nothing.more }}",
    "zero": "{{ 1 / 0 }}",
    "syntax": "{% for %}",
    "unknown tag": "{% nosuchtag %}",
    "unknown filter": "{{ 1 | nosuchfilter }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% break %}{% endfor %}",
    "strftime_now": "{{ strftime_now('%Y-%m') }}" + BODY,
    "namespace": "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.found = true %}{% set ns.n = ns.n + 1 %}{% endif %}"
    "{% endfor %}{{ ns.found }} {{ ns.n }}",
    "namespace, underscore": "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}",
    "macro": "{% macro line(role, text='') %}<|{{ role }}|>{{ text }}{{ caller() if caller }}"
    "{% endmacro %}{% for m in messages %}{{ line(m.role, m.content) }}{% endfor %}",
    "call block": "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}x{% endcall %}",
    "first message": "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'].strip() %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ system }}{% for m in rest %}{{ loop.index0 }}{{ loop.last }}{{ m['content'] | trim }}"
    "{% endfor %}",
    "alternation": "{% for m in messages[1:] %}{% if (m['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}{% endfor %}ok",
    "slices": "{{ messages[::-1][0].content }}{{ messages[-1:] | length }}{{ 'abc'[1:] }}",
    "loop": "{% for m in messages %}{{ loop.first }}{{ loop.index }}{{ loop.revindex0 }}"
    "{{ loop.previtem.role if loop.previtem }}{{ loop.nextitem is defined }}{% endfor %}",
    "tests": "{{ messages[0].content is string }}{{ messages is iterable }}"
    "{{ messages[0] is mapping }}{{ messages is sequence }}{{ 1 is number }}{{ none is none }}",
    "absent": "{% for m in messages %}{{ m.tool_calls is defined }}{{ m['tool_calls'] }}"
    "{{ 'tool_calls' in m }}{{ m.get('name', '-') }}{% endfor %}",
    "items": "{% for k, v in messages[0] | items %}{{ k }}={{ v }};{% endfor %}"
    "{% for k, v in messages[0].items() %}{{ k }}{% endfor %}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | map(attribute='role') | join(', ') | upper }}{{ '  a' | trim | indent(2) }}"
    "{{ [3, 1] | sort }}{{ 'a-b' | replace('-', '+') }}{{ 1.5 | round | int }}{{ [1] + [2] }}",
    "methods": "{{ 'a b'.split(' ') }}{{ 'abc'.startswith('a') }}{{ ' x '.rstrip() }}"
    "{{ 'a'.upper() }}{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}{{ '%s' % 'x' }}",
    "changing": "{{ messages.append(1) }}",
    "changing a dict": "{{ messages[0].update({'role': 'x'}) }}",
    "unsafe": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "dict": "{{ dict(a=1) }}{{ {'a': 1}['a'] }}",
    "white space": "{% if true %}\n  a\n    {% endif %}\n  b\n{# c #}\n\n",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ cls_token is defined }}",
    "generation prompt": "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "set block": "{% set x %}a{{ bos_token }}{% endset %}{{ x }}{{ x | length }}",
    "ternary": "{{ 'a' if messages | length > 9 else 'b' }}{{ 'x' if false }}",
    "concatenation": "{{ bos_token + '[INST] ' ~ 5 ~ none ~ ' [/INST]' }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "trim blocks": "{%- for m in messages -%}\n{{- m.role -}}\n{%- endfor %}\n",
    "filter block": "{% filter upper %}abc{% endfilter %}",
    "include": "{% include 'other' %}",
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.unk_token, tokenizer.pad_token = "<unk>", "</s>"
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_as_transformers(name: str, theirs: Any) -> None:
    """The same text, or an error where it has an error."""
    template = TEMPLATES[name]
    ours = render_here({"template": template, "messages": TALK, "tokens": TOKENS})
    try:
        want = theirs.apply_chat_template(
            TALK, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        assert "error" in ours, (ours, error)
        assert "\n" not in ours["error"] and len(ours["error"]) < 400
        words = " ".join(str(error).split())
        assert words[:60] in ours["error"] or "underscore" in name  # in our own words
    else:
        assert ours == {"text": want}


def test_a_process_of_its_own_gives_the_same() -> None:
    request = {"template": TEMPLATES["tojson"] + BODY, "messages": TALK, "tokens": TOKENS}
    assert render(request["template"], TALK, TOKENS, "m") == render_here(request)["text"]


def test_where_a_template_fails() -> None:
    found = render_here({"template": "a\n{{ 1 + 'x' }}", "messages": [], "tokens": {}})
    assert found["error"].startswith("TypeError: ") and found["error"].endswith("(line 2)")


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (LOOP, "takes more than 1 s"), ("{{ 10 ** (10 ** 9) }}", "takes more than 1 s"),
        (DOUBLING, "MiB"), ("{{ 'a'.center(10 ** 12) }}", "MiB"), ("{{ '\\ud83d' }}", "surrogates"),
        ("{{ 'a' * 10 ** 9 }}", "MiB"),
    ],
)  # fmt: skip
def test_a_template_that_takes_all(
    template: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time and memory have limits. (The child has its own: it is told of shorter ones.)"""
    begin = time.perf_counter()
    with monkeypatch.context() as patch, pytest.raises(ModelError, match=says) as caught:
        _shorter(patch)
        render(template, [], {}, "m")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - begin < 20


def _shorter(patch: pytest.MonkeyPatch) -> None:
    """One second of CPU time for the child, which is this module started anew."""
    from iq_export.run import chat_template

    run: Callable[..., Any] = chat_template.subprocess.run
    code = (
        "import sys; from iq_export.run import chat_template as c; c._CPU_SECONDS = 1; "
        "sys.exit(c.main())"
    )
    patch.setattr(chat_template, "_CPU_SECONDS", 1)
    patch.setattr(
        chat_template.subprocess, "run",
        lambda command, **options: run([command[0], "-c", code, command[-1]], **options),
    )  # fmt: skip


def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(ModelError, match="no process can be started"):
        render("x", [], {}, "m")
