"""Chat templates: jinja2, as Hugging Face's templates want it, from a source that nobody vouches for.

A template comes with a model file and may be hostile. It runs in jinja2's immutable sandbox (no attribute that leads
out, no change to the messages) and under a meter:

    steps     loop iterations, calls and filters                         at most MAX_STEPS
    written   characters put out, blocks and macros that are captured included, at most MAX_TEXT
    weight    characters of any value that the template makes, with all
              that it holds, plus ITEM_WEIGHT for each item              at most MAX_TEXT beyond its variables' own
    time      looked at with each step                                   at most MAX_SECONDS

An operation whose result would be larger is refused before it runs, so neither memory nor time is spent on it. A value
counts as often as it is held: a list that holds one list twice, sixty levels deep, is small in memory and endless for
whoever prints it. The meter is put into the program by rewriting the parsed template: loops, literals and `~` are
wrapped, constant text goes through the same door as computed text. What fails for whatever reason is one
`TokenizerError`.
"""

# ruff: noqa: SIM905 (names read better as words)
from __future__ import annotations

import datetime
import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from trustcore.errors import TokenizerError

MAX_STEPS = 1_000_000
MAX_TEXT = 32_000_000
MAX_SECONDS = 10.0
ITEM_WEIGHT = 32
_MAX_NUMBER = 1_000_000  # for an argument of a call or filter: a width, a count
_MAX_BITS = 4096  # of an integer that arithmetic makes
_MAX_SOURCE = 1_000_000

_FILTERS = (
    "abs attr batch capitalize count d default dictsort e escape first float groupby int items last length list lower "
    "map max min reject rejectattr replace reverse round safe select selectattr slice sort string striptags sum title "
    "trim truncate unique upper wordcount join indent format"
).split()
_METHODS_REFUSED = frozenset("format format_map translate expandtabs maketrans encode decode".split())
_CONTAINERS = (list, tuple, dict)
_WIDTH = re.compile(r"\*|\d{4}")


class _Refused(Exception):
    """The template asked for more than the meter allows."""


class _Raised(Exception):
    """The template called raise_exception."""


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text that a chat template makes of these variables.

    Raises:
        TokenizerError: the template is no jinja2, fails, refuses these messages, or goes beyond a limit.
    """
    import jinja2

    try:
        if len(source) > _MAX_SOURCE:
            raise _Refused(f"its source has {len(source)} characters, more than {_MAX_SOURCE}")
        return _environment(_Meter(MAX_TEXT + _weight(dict(variables), math.inf))).from_string(source).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"chat template, line {error.lineno}: {error.message}.") from None
    except _Raised as error:
        raise TokenizerError(f"the chat template refuses these messages: {error}") from None
    except _Refused as error:
        raise TokenizerError(f"the chat template was stopped: {error}.") from None
    except RecursionError:
        raise TokenizerError("the chat template was stopped: it is nested too deeply.") from None
    except Exception as error:  # untrusted code: whatever it raises is its fault
        raise TokenizerError(f"the chat template failed: {type(error).__name__}: {error}") from None


class _Meter:
    """Counts what one rendering spends; `limit` is the weight that a value may have."""

    def __init__(self, limit: float):
        self.limit = limit
        self.steps = 0
        self.written = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise _Refused(f"it took more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise _Refused(f"it took more than {MAX_SECONDS:g} seconds")

    def loop(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def write(self, value: Any) -> str:
        """Counts what is put out; a value other than text counts as its text."""
        text = value if isinstance(value, str) else str(self.value(value))
        self.written += len(text)
        if self.written > self.limit:
            raise _Refused(f"it wrote more than {self.limit} characters")
        return text

    def value(self, value: Any) -> Any:
        """Passes on a value that is not too heavy."""
        self.bound(_weight(value, self.limit))
        return value

    def bound(self, weight: float) -> None:
        """Refuses a value of that weight if it is too much."""
        if weight > self.limit:
            raise _Refused(f"it made a value of more than {self.limit} characters")


def _weight(value: Any, limit: float) -> int:
    """Characters in a value and all that it holds, `ITEM_WEIGHT` more for each item; it stops counting past `limit`."""
    import jinja2.utils

    total, waiting = 0, [value]
    while waiting and total <= limit:
        part = waiting.pop()
        if isinstance(part, str | bytes):
            total += len(part)
        elif isinstance(part, jinja2.utils.Namespace):
            waiting.append(part._Namespace__attrs)  # pyright: ignore[reportAttributeAccessIssue] (repr shows them)
        elif isinstance(part, _CONTAINERS):
            total += ITEM_WEIGHT * len(part)
            if total <= limit:
                waiting += part
                if isinstance(part, dict):
                    waiting += part.values()
    return total


def _environment(meter: _Meter) -> Any:
    """A fresh environment, so that nothing is shared between two renderings."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Instrument(NodeTransformer):
        """Puts the meter into loops, constant text, literals and `~`."""

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = _filter(node.iter, "metered_loop")
            return node

        def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
            return nodes.Const(node.data, lineno=node.lineno)

        def visit_Concat(self, node: Any) -> nodes.Node:
            self.generic_visit(node)
            node.nodes = [_filter(part, "metered_value") for part in node.nodes]
            return _filter(node, "metered_value")

        def _literal(self, node: Any) -> Any:
            self.generic_visit(node)
            constant = node.find(nodes.Name) is None and node.find(nodes.Filter) is None
            return node if constant or getattr(node, "ctx", "load") != "load" else _filter(node, "metered_value")

        visit_List = visit_Tuple = visit_Dict = _literal

    def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here it only encloses them."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 wants it on the class)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            return Instrument().visit(super()._parse(source, name, filename))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(meter, operator, left, right)
            return meter.value(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            meter.step()
            args = _check_arguments(meter, _method_of_text(__obj), getattr(__obj, "__self__", None), args, kwargs)
            return meter.value(super().call(__context, __obj, *args, **kwargs))

        def wrap_str_format(self, value: Any) -> None:
            """No `str.format`: its widths are out of reach of a check. `%` and the filter `format` are there."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr not in _METHODS_REFUSED and super().is_safe_attribute(obj, attr, value)

    @jinja2.pass_context
    def finalize(context: Any, value: Any) -> Any:
        return meter.write(value)

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
        extensions=[jinja2.ext.loopcontrols, Generation],
        optimized=False,
        cache_size=0,
    )
    environment.filters = {name: _metered(meter, name, environment.filters[name]) for name in _FILTERS}
    environment.filters["tojson"] = _metered(meter, "tojson", _tojson)
    environment.filters["metered_loop"] = meter.loop
    environment.filters["metered_value"] = meter.value
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _metered(meter: _Meter, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a step, and whose result is weighed, as far as possible before it is made."""
    # jinja2 passes its own argument first to functions that are marked so.
    own = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        meter.step()
        head, subject, rest = args[:own], args[own], args[own + 1 :]
        if name == "join":  # the separator may come by its name, or not at all
            separator = kwargs.get("d", rest[0] if rest else "")
            subject = subject if isinstance(subject, str | dict) else list(subject)
            _check_arguments(meter, "join", str(separator), (subject,), {})
        rest = _check_arguments(meter, name, meter.value(subject), rest, kwargs) if name != "join" else rest
        return meter.value(function(*head, subject, *rest, **kwargs))

    return filtered


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates expect it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    """The local time, as Hugging Face's templates ask for it."""
    if _WIDTH.search(form):
        raise _Refused("it formats with a width of more than 999")
    return datetime.datetime.now().strftime(form)


def _raise_exception(message: object) -> None:
    raise _Raised(str(message))


# What an operation would cost, before it runs


def _method_of_text(function: Any) -> str | None:
    subject = getattr(function, "__self__", None)
    return getattr(function, "__name__", None) if isinstance(subject, str) else None


def _check_arguments(
    meter: _Meter, name: str | None, subject: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Refuses a call or filter that would make too much; gives back the arguments, iterators among them as lists."""
    meter.value([*args, *kwargs.values()])
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise _Refused(f"it passed a number above {_MAX_NUMBER} to a function")
    if name == "replace" and len(args) >= 2:
        text, old, new = str(subject), str(args[0]), str(args[1])
        meter.bound(len(text) + text.count(old) * len(new))
    elif name == "join" and args:
        items = args[0] if isinstance(args[0], str | dict) else list(args[0])
        meter.bound(_weight(items, meter.limit) + len(items) * len(subject))
        return (items, *args[1:])
    elif name == "indent":
        width = kwargs.get("width", args[0] if args else 4)
        text = str(subject)
        meter.bound(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))
    elif name == "tojson" and (width := kwargs.get("indent", args[1] if len(args) > 1 else 0)):
        meter.bound(_weight(subject, meter.limit) * (len(width) if isinstance(width, str) else int(width)))
    elif name == "format" and _WIDTH.search(str(subject)):
        raise _Refused("it formats with a width of more than 999")
    elif name == "sum" and not isinstance(kwargs.get("start", args[1] if len(args) > 1 else 0), int | float):
        raise _Refused("it sums what are not numbers")
    return args


def _check_operands(meter: _Meter, operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**" and abs(left) > 1 and max(right, 0) * left.bit_length() > _MAX_BITS:
            raise _Refused(f"it made a power of more than {_MAX_BITS} bits")
        if operator == "*" and left.bit_length() + right.bit_length() > _MAX_BITS:
            raise _Refused(f"it made a product of more than {_MAX_BITS} bits")
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple | bytes) and isinstance(count, int):
                meter.bound(_weight(sequence, meter.limit) * max(count, 0))
    elif operator == "+":
        meter.bound(_weight([left, right], meter.limit))
    elif operator == "%" and isinstance(left, str):
        meter.value(right)
        if _WIDTH.search(left):
            raise _Refused("it formats with a width of more than 999")
