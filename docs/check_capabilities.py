"""Checks docs/capabilities.md: every row is there, every name imports, every test exists.

    python docs/check_capabilities.py           counts, or one line a fault and exit status 1
    python docs/check_capabilities.py --map     the counts by section, as Markdown
    python docs/check_capabilities.py --write   puts that map into README.md, between its two markers

Invariants of the table, a fault each where they do not hold:
- section S holds the rows S-01, S-02, ... up to `SECTIONS[S]`, each once and in its own section;
- a state is "works", "part" or "open"; a row that is not open has a name and a test, an open row has no test;
- a name is public and imports; a test is a file below tests/ with a test in it, or a function or method of one;
- a part says what is missing;
- README.md's map, if it has one, is the map of today.

Tests are looked up in the sources and not run.
"""

from __future__ import annotations

import argparse
import ast
import collections
import functools
import pkgutil
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/capabilities.md")
STATES = ("works", "part", "open")
COLUMNS = ("id", "class", "capability", "on JAX", "name", "test", "state")
MARKERS = ("<!-- capability map -->", "<!-- /capability map -->")

# Rows of each section. A row is never dropped; one that is added raises its section's number.
SECTIONS = {
    "TEN": 16, "OPS": 7, "SPA": 11, "KRN": 10, "BKD": 18, "MEM": 14, "LAY": 12, "QNT": 15, "AD": 12, "TUN": 9,
    "EXE": 12, "DST": 8, "DBG": 14, "EXP": 8, "DAT": 3, "QA": 11, "CORE": 7,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One capability.

    Attributes:
        id: section and number.
        section: under whose heading it stands.
        kind: class a to d.
        capability: what users get.
        delivered: what delivers it, or will.
        names: public names that deliver it.
        tests: pytest ids that show it.
        state: see `STATES`.
        line: of the page, from 1.
    """

    id: str
    section: str
    kind: str
    capability: str
    delivered: str
    names: tuple[str, ...]
    tests: tuple[str, ...]
    state: str
    line: int


def read(text: str) -> tuple[list[Row], dict[str, str], list[str]]:
    """Returns the rows of the page, the titles of its sections, and the lines that cannot be read."""
    rows, titles, faults = [], {}, []
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if heading := re.match(r"## ([A-Z]+) - (.+)", line):
            section, titles[heading[1]] = heading[1], heading[2]
        elif line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if cells == list(COLUMNS) or set(line) <= set("|-: "):
                continue
            if len(cells) != len(COLUMNS):
                faults.append(f"line {number}: {len(cells)} cells, expected {len(COLUMNS)}: {', '.join(COLUMNS)}")
                continue
            id, kind, capability, delivered, names, tests, state = cells
            lists = []
            for column, cell in (("name", names), ("test", tests)):
                lists.append(tuple(re.findall(r"`([^`\s]+)`", cell)))
                if " ".join(f"`{item}`" for item in lists[-1]) != (cell if cell != "-" else ""):
                    faults.append(f"{id}: {column} is {cell!r}; write `one` `after` `the other`, or - for none")
            rows.append(Row(id, section, kind, capability, delivered, *lists, state, number))
    return rows, titles, faults


def faults_of_ids(rows: Sequence[Row]) -> list[str]:
    """Returns what is missing, doubled, unknown or in the wrong section."""
    expected = [f"{section}-{i:02}" for section, count in SECTIONS.items() for i in range(1, count + 1)]
    counts = collections.Counter(row.id for row in rows)
    faults = [f"{id}: missing" for id in expected if id not in counts]
    faults += [f"{id}: stands there {count} times" for id, count in counts.items() if count > 1]
    known = set(expected)
    for row in rows:
        if row.id not in known:
            faults.append(f"{row.id!r} in line {row.line}: not a known id; raise its section's number in SECTIONS")
        elif row.id.rpartition("-")[0] != row.section:
            faults.append(f"{row.id}: stands in section {row.section}")
    return faults


def faults_of_row(row: Row, root: Path = ROOT) -> list[str]:
    """Returns what is wrong with one row."""
    faults = []
    if row.state not in STATES:
        faults.append(f"state is {row.state!r}, not one of {', '.join(STATES)}")
    if row.kind not in tuple("abcd"):
        faults.append(f"class is {row.kind!r}, not one of a, b, c, d")
    if not row.capability or not row.delivered:
        faults.append("says nothing of the capability or of what delivers it")
    if row.state in ("works", "part"):
        faults += [f"has no {what}" for what, found in (("name", row.names), ("test", row.tests)) if not found]
    if row.state == "part" and "Missing:" not in row.delivered:
        faults.append('does not say what is missing ("Missing: ...")')
    if row.state == "open" and row.tests:
        faults.append("is open, but names a test")
    faults += [fault for name in row.names if (fault := fault_of_name(name))]
    faults += [fault for test in row.tests if (fault := fault_of_test(test, root))]
    return [f"{row.id}: {fault}" for fault in faults]


def fault_of_name(name: str) -> str:
    """Returns why a dotted name is not public or does not import; "" when it does."""
    if not re.fullmatch(r"(?!_)\w+(\.(?!_)\w+)*", name):
        return f"{name} is not a public dotted name"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations are the business of the tests that use the name
            pkgutil.resolve_name(name)
    except Exception as error:  # whatever a broken module raises is the fault to report
        return f"{name} does not import: {type(error).__name__}: {error}"
    return ""


def fault_of_test(test: str, root: Path = ROOT) -> str:
    """Returns why a pytest id stands for no test; "" when it does."""
    file, _, function = test.partition("::")
    path = root / file
    if not re.fullmatch(r"tests/(\w+/)*test_\w+\.py", file):
        return f"{test}: {file} is not a path tests/.../test_*.py"
    if not path.is_file():
        return f"{test}: there is no {file}"
    found = tests_of(path)
    if function and function not in found:
        return f"{test}: {file} has no {function}"
    return "" if found else f"{test}: {file} has no tests"


@functools.cache
def tests_of(path: Path) -> frozenset[str]:
    """Returns the tests that a file defines: `test_x`, `TestY::test_x`."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, functions) and node.name.startswith("test_"):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            methods = [item.name for item in node.body if isinstance(item, functions)]
            found |= {f"{node.name}::{name}" for name in methods if name.startswith("test_")}
    return frozenset(found)


def make_map(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """Returns the counts by section as a Markdown table."""
    counts = collections.Counter((row.section, row.state) for row in rows)
    total = collections.Counter(row.state for row in rows)
    lines = [f"| capabilities | {' | '.join(STATES)} |", "|---|--:|--:|--:|"]
    lines += [f"| {title} | {' | '.join(str(counts[key, s]) for s in STATES)} |" for key, title in titles.items()]
    lines.append(f"| **all** | {' | '.join(f'**{total[s]}**' for s in STATES)} |")
    return "\n".join(lines)


def fault_of_markers(readme: str) -> str:
    """Returns what is wrong with the markers of README's map; "" when each stands there once, in order."""
    if [readme.count(marker) for marker in MARKERS] == [1, 1] and readme.index(MARKERS[0]) < readme.index(MARKERS[1]):
        return ""
    return f"README.md: the markers {' and '.join(MARKERS)} must stand there once each, in this order"


def fault_of_readme(readme: str, map: str) -> str:
    """Returns why README's map is not `map`; "" when it is, or when README has none."""
    if not any(marker in readme for marker in MARKERS):
        return ""
    if fault := fault_of_markers(readme):
        return fault
    return (
        "" if readme == with_map(readme, map) else "README.md: the map is old; run docs/check_capabilities.py --write"
    )


def with_map(readme: str, map: str) -> str:
    """Returns README's text with `map` between its markers, which must stand there once each, in order."""
    before, _, rest = readme.partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    return f"{before}{MARKERS[0]}\n{map}\n{MARKERS[1]}{after}"


def check(root: Path = ROOT) -> tuple[list[Row], dict[str, str], list[str]]:
    """Returns the rows, the titles of the sections, and every fault of page and README."""
    rows, titles, faults = read((root / PAGE).read_text(encoding="utf-8"))
    faults += [f"section {key}: missing" for key in SECTIONS if key not in titles]
    faults += faults_of_ids(rows)
    for row in rows:
        faults += faults_of_row(row, root)
    readme = root / "README.md"
    if readme.is_file() and (fault := fault_of_readme(readme.read_text(encoding="utf-8"), make_map(rows, titles))):
        faults.append(fault)
    return rows, titles, faults


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Checks docs/capabilities.md.")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--map", action="store_true", help="print the counts by section as Markdown")
    group.add_argument("--write", action="store_true", help="put that map into README.md, between its markers")
    options = parser.parse_args(arguments)
    rows, titles, faults = check(root)
    map = make_map(rows, titles)
    if options.map:
        print(map)
        return 0
    if options.write:
        readme = root / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        if fault := fault_of_markers(text):
            print(fault, file=sys.stderr)
            return 1
        readme.write_text(with_map(text, map), encoding="utf-8")
        faults = check(root)[2]
    for fault in faults:
        print(fault)
    counts = collections.Counter(row.state for row in rows)
    print(
        f"{len(rows)} capabilities: {', '.join(f'{counts[state]} {state}' for state in STATES)}; {len(faults)} faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "backends")]  # the checkout that the page describes, installed or not
    raise SystemExit(main())
