"""Chat templates: what they render, and what a hostile one cannot do."""

from __future__ import annotations

import re
import time

import pytest

from trustcore.errors import TokenizerError
from trustcore.text import Tokenizer, chat
from trustcore.text.chat import render

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_templates_render_as_recorded(smollm2_tokenizer, recorded):
    data = recorded("smollm2_chat")
    assert {case["template"] for case in data["cases"]} == {"smollm2", *data["templates"]}
    for case in data["cases"]:
        source = data["templates"].get(case["template"], smollm2_tokenizer.chat_template)
        variables = {key: case[key] for key in ("messages", "add_generation_prompt")}
        text = render(source, {**variables, "bos_token": data["bos_token"], "eos_token": data["eos_token"]})
        assert text == case["text"], case["template"]


def test_the_demo_model_s_prompt(smollm2_tokenizer, recorded):
    case = next(c for c in recorded("smollm2_chat")["cases"] if c["template"] == "smollm2")
    assert smollm2_tokenizer.chat(case["messages"]) == case["text"]
    expected = next(p for p in recorded("smollm2_greedy")["prompts"] if p["name"] == "chat")["prompt_ids"]
    assert smollm2_tokenizer.encode(case["text"], parse_special=True, add_special=False) == expected


def test_the_special_tokens_and_further_variables_have_names(spm_metadata):
    source = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ tools | length }}"
    tokenizer = Tokenizer.from_gguf({**spm_metadata, "tokenizer.chat_template": source})
    assert tokenizer.chat(MESSAGES, tools=[{}, {}]) == "<s>|</s>|<unk>||2"


def test_without_a_template_there_is_no_chat(spm_metadata):
    with pytest.raises(TokenizerError, match="this tokenizer has no chat template"):
        Tokenizer.from_gguf(spm_metadata).chat(MESSAGES)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages recursive %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% endfor %}", "1True1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% for a, b in [(1, messages)] %}{{ a }}{{ b[0].role }}{% else %}none{% endfor %}", "1user"),
        ("{% for i in range(9) if i % 2 %}{% if i > 6 %}{% break %}{% endif %}{{ i }}{% endfor %}", "135"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') + f(b=2, x=1) if false else f('a') ~ 1 }}", "[a]1"),
        ("{% set x %}{{ messages[0].content }}!{% endset %}{{ x * 2 }}{{ x.strip('!') }}", "Hi!Hi!Hi"),
        ("{{ '%05.1f|%s' % (3.14159, 'x') }}{{ '%s' | format(1) }}", "003.1|x1"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ [1, 2] | sum }}{{ '-'.join(['x', 'y']) }}", "a+b3x-y"),
        ("{{ {'b': '<é>', 'a': None} | tojson }}", '{"b": "<é>", "a": null}'),
        ("{{ 'x\ny' | indent(2) }}{{ 'aXa'.replace('X', '__') }}{{ None }}{{ undefined_name }}", "x\n  ya__aNone"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}", "['Hi']"),
    ],
)
def test_what_templates_use(source, text):
    assert render(source, {"messages": MESSAGES}) == text


def test_the_time_of_day():
    assert re.fullmatch(r"\d\d [A-Z]\w+ \d{4}", render("{{ strftime_now('%d %b %Y') }}", {}))


DOUBLING = "{%% set ns = namespace(s=%s) %%}{%% for i in range(60) %%}{%% set ns.s = %s %%}{%% endfor %%}{{ ns.s }}"
STOPPED = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% for i in range(99999) %}" + "y" * 2000 + "{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    DOUBLING % ("'aa'", "ns.s ~ ns.s"),
    DOUBLING % ("'aa'", "ns.s + ns.s"),
    DOUBLING % ("[1]", "ns.s + ns.s"),
    DOUBLING % ("[1]", "[ns.s, ns.s]"),
    DOUBLING % ("1", "{'a': ns.s, 'b': ns.s}"),
    DOUBLING % ("1", "dict(a=ns.s, b=ns.s)"),
    DOUBLING % ("1", "namespace(a=ns.s, b=ns.s)"),
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "{% set x = 'aaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{{ x }}{{ x }}{% endset %}" * 30,
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "{{ 10 ** 99999 }}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ [[0] * 99999] * 99999 }}",
    "{{ ('a' * 999999).replace('a', 'b' * 999999) }}",
    "{{ ('a' * 999999) | replace('a', 'b' * 999999) }}",
    "{{ range(99999) | join('z' * 999999) }}",
    "{{ ('z' * 999999).join(range(99999) | map('string')) }}",
    "{{ ('\n' * 999999) | indent(999999) }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' | format(999999999, 1) }}",
    "{{ strftime_now('%99999999d') }}",
    "{{ [[1], [2]] | sum(start=[]) }}",
    "{{ [1] | batch(10 ** 9, 0) | list }}",
    "{{" + "(" * 5000 + "}}",
    "x" * 1_000_001,
]


@pytest.mark.parametrize("source", STOPPED, ids=[source[:60] for source in STOPPED])
def test_endless_templates_are_stopped(source, monkeypatch):
    monkeypatch.setattr(chat, "MAX_STEPS", 50_000)
    monkeypatch.setattr(chat, "MAX_TEXT", 1_000_000)
    start = time.monotonic()
    with pytest.raises(TokenizerError, match="the chat template was stopped: "):
        render(source, {"messages": MESSAGES})
    assert time.monotonic() - start < 8


def test_time_is_looked_at(monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.05)
    source = "{% set l = [0] * 100000 %}{% for a in l %}{{ l | sort | length }}{% endfor %}"
    with pytest.raises(TokenizerError, match=r"it took more than 0\.05 seconds"):
        render(source, {})


def test_the_limits_leave_room_for_a_long_conversation():
    messages = [{"role": "user", "content": "word " * 10_000}] * 1000  # 50 million characters
    source = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}{% endfor %}"
    assert len(render(source, {"messages": messages})) == 1000 * 50_006


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__' of 'type' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ messages[0].update(a=1) }}", "access to attribute 'update' of 'dict' object is unsafe"),
        ("{{ '{:>99}'.format(1) }}", "access to attribute 'format' of 'str' object is unsafe"),
        ("{% include 'secret' %}", "no loader for this environment specified"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "the chat template failed: ZeroDivisionError: division by zero"),
        ("a\n{% if %}", "chat template, line 2: Expected an expression, got 'end of statement block'"),
        ("{{ 'a' | center(9) }}", "chat template, line 1: No filter named 'center'"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses these messages: roles must alternate",
        ),
    ],
)
def test_refusals_say_why(source, message):
    with pytest.raises(TokenizerError, match=re.escape(message)):
        render(source, {"messages": [dict(m) for m in MESSAGES]})
