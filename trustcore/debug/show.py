"""Reports as tables for a terminal, and as a page of HTML with a tree of all values, which notebooks show, too."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trustcore.debug.issues import Severity
from trustcore.debug.statistics import Statistics

if TYPE_CHECKING:
    from trustcore.debug.report import Reading, Report

ROWS = 40  # of a table of statistics in a terminal
_COLORS = {Severity.INFO: "dim", Severity.WARNING: "yellow", Severity.ERROR: "red", Severity.CRITICAL: "bold red"}


def tables(report: Report) -> Any:
    """Returns the report as a group of rich tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(headline(report), style="bold")]
    if report.all_issues:
        table = Table("severity", "what", "where", "why", expand=False)
        for issue in report.all_issues:
            cells = (issue.severity.name.lower(), issue.kind, issue.where, _reason(issue))
            table.add_row(*(Text(cell) for cell in cells), style=_COLORS[issue.severity])
        parts.append(table)
    if report.hits:
        table = Table("watch", "hits", "first")
        for hit in report.hits:
            table.add_row(Text(str(hit.watch)), str(hit.count), Text(hit.first))
        parts.append(table)
    found = report.statistics
    if found:
        table = Table("value", "shape", "range", "rms", "zeros", "NaN", "Inf", "1e-8 to 1e8")
        for reading in found[:ROWS]:
            table.add_row(*(Text(cell) for cell in _cells(reading)))
        parts.append(table)
        if len(found) > ROWS:
            parts.append(Text(f"{len(found) - ROWS} more values; report.find('*/exp') takes some of them"))
    for op in report.history[:ROWS]:
        parts.append(Text(str(op)))
    return Group(*parts)


def plain(report: Report) -> str:
    """Returns the tables as text, for a line width of 160 characters."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=160, color_system=None, force_jupyter=False, force_terminal=False)
    console.print(tables(report), highlight=False)
    return stream.getvalue()


def headline(report: Report) -> str:
    """Returns the worst issue as a sentence, or that there is none."""
    issues = report.issues
    if not issues:
        return "Nothing is wrong with the values that were watched."
    more = f" ({len(issues) - 1} more)" if len(issues) > 1 else ""
    return next(iter(issues)).message + more


def _reason(issue: Any) -> str:
    parts = [issue.cause] if issue.cause else []
    if len(issue.chain) > 1:
        parts.append(f"from {issue.chain[0]}")
    if issue.forward:
        parts.append(f"in the gradient of {issue.forward[0]}")
    if issue.reaches:
        shown = ", ".join(issue.reaches[:3]) + (" ..." if len(issue.reaches) > 3 else "")
        parts.append(f"reaches {shown}")
    return "; ".join(parts) or issue.statistics.short


def _cells(reading: Reading) -> tuple[str, ...]:
    s = reading.statistics
    name = reading.where + (f" output {reading.output}" if reading.output else "")
    return (
        name,
        f"{s.dtype}[{','.join(map(str, s.shape))}]",
        "" if s.min is None else f"{s.min:.3g} to {s.max:.3g}",
        "" if s.rms is None else f"{s.rms:.3g}",
        _share(s, s.zeros),
        _share(s, s.nan),
        _share(s, s.inf + s.negative_inf),
        s.sparkline,
    )


def _share(s: Statistics, count: int) -> str:
    return "" if not count else "all" if count == s.size else f"{count / s.size:.2%}" if s.size > 1000 else str(count)


# ---- HTML ------------------------------------------------------------------------------------------------------------

_STYLE = """
.tc-report{font:13px/1.4 system-ui,sans-serif;color:#222;background:#fff;padding:8px}
.tc-report table{border-collapse:collapse;margin:6px 0}
.tc-report td,.tc-report th{padding:2px 8px;text-align:left;border-bottom:1px solid #ddd;vertical-align:top;color:#222}
.tc-report .critical td{color:#a00;font-weight:bold}.tc-report .error,.tc-report .error td{color:#c00}
.tc-report .warning td{color:#960}.tc-report .info td{color:#777}
.tc-report details{margin-left:14px}.tc-report summary{cursor:pointer}
.tc-report svg rect{fill:#47a}.tc-report .bad>summary{color:#c00}
"""


def page(report: Report) -> str:
    """Returns a whole page of HTML: issues, watches, and a tree of all values by path."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>trustcore report</title></head><body>'
        f"{fragment(report)}</body></html>\n"
    )


def tree(report: Report) -> dict[str, Any]:
    """Returns the readings as nested dicts by path."""
    root: dict[str, Any] = {}
    for reading in report.statistics:
        *path, last = reading.address.at(reading.turns).split("/")
        place = root
        for part in path:
            place = place.setdefault(part + "/", {})
        notes = [reading.address.place, "" if reading.address.stage == "forward" else reading.address.stage]
        notes += [f"output {reading.output}"] if reading.output else []
        notes += [f"shard {', '.join(map(str, reading.shard))}"] if reading.shard else []
        place[f"{last} ({', '.join(filter(None, notes))})"] = reading.statistics
    return root


def fragment(report: Report, values: str | None = None) -> str:
    """Returns the body of the page; `values` is the HTML of the tree of values, None: drawn here."""
    parts = [f"<style>{_STYLE}</style>", f"<p><b>{html.escape(headline(report))}</b></p>"]
    if report.all_issues:
        rows = [
            (
                issue.severity.name.lower(),
                [issue.severity.name.lower(), issue.kind, issue.where, _reason(issue), issue.statistics.short],
            )
            for issue in report.all_issues
        ]
        parts.append(_table(["severity", "what", "where", "why", "value"], rows))
    if report.hits:
        parts.append(
            _table(["watch", "hits", "first"], [("", [str(h.watch), str(h.count), h.first]) for h in report.hits])
        )
    parts.append(_branch(tree(report)) if values is None else values)
    if report.history:
        lines = "".join(f"<div>{html.escape(str(op))}</div>" for op in report.history)
        parts.append(f"<details><summary>{len(report.history)} operations</summary>{lines}</details>")
    return f'<div class="tc-report">{"".join(parts)}</div>'


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for kind, cells in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _branch(node: dict[str, Any]) -> str:
    parts = []
    for name, value in node.items():
        if isinstance(value, dict):
            bad = " class='bad'" if _is_bad(value) else ""
            parts.append(f"<details{bad}><summary>{html.escape(name)}</summary>{_branch(value)}</details>")
        else:
            color = ' class="error"' if value.bad else ""
            parts.append(f"<div{color}>{html.escape(name)}: {html.escape(value.short)} {_bars(value)}</div>")
    return "".join(parts)


def _is_bad(node: dict[str, Any]) -> bool:
    return any(_is_bad(value) if isinstance(value, dict) else value.bad for value in node.values())


def _bars(stats: Statistics) -> str:
    counts = stats.histogram[16:48]
    most = max(counts) or 1
    bars = "".join(
        f'<rect x="{3 * i}" y="{14 - h}" width="2" height="{h}"/>'
        for i, c in enumerate(counts)
        if (h := round(14 * (c / most) ** 0.5))
    )
    return f'<svg width="96" height="14" role="img" aria-label="magnitudes">{bars}</svg>'
