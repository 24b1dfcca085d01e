"""The `trustcore` command: `main()` reads the arguments, runs one command, and turns errors into a line and a status.

Data flow: argv -> typer (one file a command) -> the same API that Python users call -> stdout; progress, figures and
errors go to stderr, so that stdout is the answer alone.

Exit status: 0 done; 1 a defect of trustcore or a reader that went away; 2 bad input or a refusal; 130 Ctrl-C.

This file imports nothing that is slow: typer and rich come when `main` runs, jax when a command needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_DEBUG = "--debug"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and leaves the process with its exit status.

    Args:
        arguments: without the program's name; None takes those of the process. `--debug` may stand anywhere before
            `--` and lets exceptions through with their traceback.
    """
    from trustcore.cli.app import run

    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug = _DEBUG in options
    if debug:
        words = [word for word in options if word != _DEBUG] + words[len(options) :]
    raise SystemExit(run(words, debug=debug))
