"""Where text goes: the answer to stdout, all else to stderr; colours and bars only on a terminal.

Text from a model or a file is untrusted: on a terminal its control characters would move the cursor or retitle the
window, so `plain` makes them visible or drops them.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from trustcore.cli import interrupts

# Everything in Unicode's categories "control" and bidirectional override, except tab and line feed.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def out() -> Console:
    """The console of stdout. Piped, it has no colours and a width that does not depend on the terminal."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=160, force_terminal=False, no_color=True)


def print_table(console: Console, table: Table) -> None:
    """Prints a table; into a pipe without the spaces that fill its lines."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def err() -> Console:
    """The console of stderr."""
    return Console(stderr=True, highlight=False)


def plain(text: str, *, lines: bool = False) -> str:
    """Returns `text` without control characters, each written as its escape; line feeds stay only with `lines`."""
    text = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
    return text if lines else text.replace("\n", "\\n").replace("\t", "\\t")


def write(piece: str) -> None:
    """Writes a piece of an answer to stdout at once; on a terminal, without its control characters."""
    sys.stdout.write(_CONTROL.sub("", piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


@contextlib.contextmanager
def progress_bar(unit: str = "bytes") -> Iterator[Callable[[str, int, int], None]]:
    """A callback that lets Ctrl-C through and, where stderr is a terminal, draws a bar from its first call on."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: interrupts.check()
        return
    in_bytes = unit == "bytes"
    figures = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(), TextColumn(unit))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *figures,
        TimeRemainingColumn(),
        console=err(),
        transient=True,
    )
    tasks = {}

    def report(what: str, done: int, total: int) -> None:
        interrupts.check()
        if not tasks:
            bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(plain(what), total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()
