"""`trustcore chat`: a conversation in the terminal, or one turn a line where stdin is piped.

Invariant: the history alternates user and assistant; a turn enters it only with its answer, whole or stopped.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from trustcore.cli import console, options
from trustcore.cli.generate import figures, show
from trustcore.cli.interrupts import Interrupts
from trustcore.cli.model import load_model
from trustcore.errors import GenerationError

_COMMANDS = {
    "/reset": "forget the conversation, but not the system message",
    "/help": "show this",
    "/exit": "leave (Ctrl-D too)",
}


def chat(
    model: options.Model,
    *,
    system: Annotated[str | None, typer.Option(help="What the model is told first, and after /reset.")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    context: options.Context = None,
    cache_dtype: options.CacheDtype = None,
    dtype: options.Dtype = None,
    stats: Annotated[bool, typer.Option("--stats", help="Speed and memory after each answer.")] = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer; /reset forgets; /exit or Ctrl-D leaves."""
    sampling = options.sampling(locals())
    import trustcore

    loaded = load_model(model, dtype)
    told = [{"role": "system", "content": system}] if system else []
    history: list[dict[str, str]] = []

    if sys.stdin.isatty():
        console.err().print("Ctrl-C stops an answer; /help lists the commands.", style="dim")
    with Interrupts() as interrupts:
        while (line := read_turn(interrupts)) is not None:
            if not line:
                continue
            if line in ("/exit", "/quit"):
                break
            if line == "/reset":
                history.clear()
                console.err().print("The conversation is forgotten.", style="dim")
            elif line.startswith("/") and " " not in line:
                console.err().print("\n".join(f"{name:8} {what}" for name, what in _COMMANDS.items()), style="dim")
            else:
                turn = {"role": "user", "content": line}
                messages = [*told, *history, turn]
                stream = _answer(
                    interrupts, functools.partial(trustcore.chat, loaded, messages, stream=True, **sampling)
                )
                if stream is None:
                    continue
                history += [turn, {"role": "assistant", "content": stream.text}]
                if stats:
                    console.err().print(figures(stream), style="dim", soft_wrap=True)


def read_turn(interrupts: Interrupts) -> str | None:
    """Returns what the user says next; None at the end of the input. Ctrl-C throws the line away and asks again."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # no line editing on this system
            import readline  # noqa: F401 - importing it gives input() its history and its arrow keys
    while True:
        try:
            with interrupts.stoppable():
                return input("> " if terminal else "").strip()
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            if terminal:
                print(file=sys.stderr)
            return None


def _answer(interrupts: Interrupts, start: Callable[[], Any]) -> Any:
    """Shows an answer, which Ctrl-C stops, and returns its stream; None where there is nothing to keep."""
    try:
        with interrupts.stoppable():
            stream = start()
            stopped = show(stream)
    except KeyboardInterrupt:  # before there was a stream
        console.write("\n")
        return None
    except GenerationError as error:
        console.err().print(f"trustcore: {error} /reset forgets the conversation.", style="red", markup=False)
        return None
    if stopped:
        console.err().print("(stopped)", style="dim")
    return stream if stream.text else None
