"""`trustcore pull`: brings a model to this machine and prints where it is."""

from __future__ import annotations

from typing import Annotated

import typer

from trustcore import units
from trustcore.cli import console


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A catalogue name, or owner/name[:Q4_K_M].")],
    verify: Annotated[bool, typer.Option("--verify", help="Read a file that is here and check its SHA-256.")] = False,
) -> None:
    """Fetch a model, unless it is here already, and print its path."""
    from trustcore import catalogue

    entries = {entry.name: entry for entry in catalogue.ENTRIES}
    if verify and name not in entries:
        raise typer.BadParameter(f"checksums are known for {', '.join(entries)} only", param_hint="'--verify'")
    with console.progress_bar() as progress:
        if name in entries:
            path = catalogue.pull(name, verify=verify, progress=progress)
        else:
            path = catalogue.resolve(name, progress=progress)
    if name in entries:
        entry = entries[name]
        checked = "SHA-256 is right" if verify else f"licence {entry.licence}"
        console.err().print(f"{entry.summary}, {units.size(entry.total)}, {checked}", style="dim", soft_wrap=True)
    print(path)
