"""Chat templates: jinja2, as Hugging Face's templates want it, from a source that nobody vouches for.

A template comes with a model file and may be hostile. It runs in jinja2's immutable sandbox (no attribute that leads
out, no change to the messages) and under a meter:

    steps     loop iterations, calls and filters                         at most MAX_STEPS
    written   characters put out, blocks and macros that are captured included, at most MAX_TEXT
    value     length of any text or list that an operator or filter makes, at most MAX_TEXT
    time      looked at with each step                                   at most MAX_SECONDS

An operation whose result would be larger is refused before it runs, so neither memory nor time is spent on it. The
meter is put into the program by rewriting the parsed template: loops are wrapped, constant text goes through the same
door as computed text. What fails for whatever reason is one `TokenizerError`.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from trustcore.errors import TokenizerError

MAX_STEPS = 1_000_000
MAX_TEXT = 32_000_000
MAX_SECONDS = 10.0
_MAX_NUMBER = 1_000_000  # for an argument of a call or filter: a width, a count
_MAX_BITS = 4096  # of an integer that arithmetic makes
_MAX_SOURCE = 1_000_000

_FILTERS = (
    "abs attr batch capitalize count d default dictsort e escape first float groupby int items last length list lower "
    "map max min reject rejectattr replace reverse round safe select selectattr slice sort string striptags sum title "
    "trim truncate unique upper wordcount join indent format"
).split()
_METHODS_REFUSED = frozenset("format format_map translate expandtabs maketrans encode decode".split())
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
        return _environment(_Meter()).from_string(source).render(variables)
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
    """Counts what one rendering spends."""

    def __init__(self) -> None:
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

    def write(self, value: Any) -> Any:
        """Counts what is put out; a value other than text counts as its text."""
        text = value if isinstance(value, str) else str(value)
        self.written += len(text)
        if self.written > MAX_TEXT:
            raise _Refused(f"it wrote more than {MAX_TEXT} characters")
        return text

    def value(self, value: Any) -> Any:
        """Passes on a value that is small enough."""
        if isinstance(value, str | list | tuple | dict | bytes):
            _bounded(len(value))
        return value


def _bounded(size: int) -> None:
    if size > MAX_TEXT:
        raise _Refused(f"it made a value of {size} characters or items, more than {MAX_TEXT}")


def _environment(meter: _Meter) -> Any:
    """A fresh environment, so that nothing is shared between two renderings."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Instrument(NodeTransformer):
        """Puts the meter into loops, constant text and `~`."""

        def visit_For(self, node: nodes.For) -> nodes.Node:
            self.generic_visit(node)
            node.iter = _filter(node.iter, "metered_loop")
            return node

        def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
            return nodes.Const(node.data, lineno=node.lineno)

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return _filter(node, "metered_value")

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
            _check_operands(operator, left, right)
            return meter.value(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            meter.step()
            _check_numbers(args, kwargs)
            _check_method(__obj, args)
            return meter.value(super().call(__context, __obj, *args, **kwargs))

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
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)  # noqa: DTZ005
    return environment


def _metered(meter: _Meter, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a step, whose sizes are checked, and whose endless input is a bounded one."""
    import functools

    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        meter.step()
        _check_numbers(args, kwargs)
        subject = args[1] if _takes_environment(function) and len(args) > 1 else args[0] if args else None
        rest = args[args.index(subject) + 1 :] if any(a is subject for a in args) else ()
        if name == "replace":
            _check_replace(str(subject), rest)
        elif name == "join":
            _check_join(subject, kwargs.get("d", rest[0] if rest else ""))
        elif name == "indent":
            width = kwargs.get("width", rest[0] if rest else 4)
            lines = str(subject).count("\n") + 1
            _bounded(len(str(subject)) + lines * (len(width) if isinstance(width, str) else int(width)))
        elif name == "format" and _WIDTH.search(str(subject)):
            raise _Refused("it formats with a width of more than 999")
        return meter.value(function(*args, **kwargs))

    return filtered


def _takes_environment(function: Callable[..., Any]) -> bool:
    return getattr(function, "jinja_pass_arg", None) is not None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates expect it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise _Raised(str(message))


# What an operation would cost, before it runs


def _check_numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise _Refused(f"it passed the number {value:.3g} to a function, more than {_MAX_NUMBER}")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**" and abs(left) > 1 and max(right, 0) * left.bit_length() > _MAX_BITS:
            raise _Refused(f"a power of more than {_MAX_BITS} bits")
        if operator == "*" and left.bit_length() + right.bit_length() > _MAX_BITS:
            raise _Refused(f"a product of more than {_MAX_BITS} bits")
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple | bytes) and isinstance(count, int):
                _bounded(len(sequence) * max(count, 0))
    elif operator == "%" and isinstance(left, str) and _WIDTH.search(left):
        raise _Refused("it formats with a width of more than 999")


def _check_method(function: Any, args: tuple[Any, ...]) -> None:
    """`str.replace` and `str.join` can make far more than they are given."""
    subject = getattr(function, "__self__", None)
    if isinstance(subject, str):
        name = getattr(function, "__name__", "")
        if name == "replace":
            _check_replace(subject, args)
        elif name == "join" and args:
            _check_join(args[0], subject)


def _check_replace(text: str, args: tuple[Any, ...]) -> None:
    if len(args) >= 2:
        old, replacement = str(args[0]), str(args[1])
        _bounded(len(text) + text.count(old) * len(replacement))


def _check_join(items: Any, separator: Any) -> None:
    if isinstance(items, str | list | tuple | dict):
        _bounded(len(items) * len(str(separator)) + sum(len(i) for i in items if isinstance(i, str)))
