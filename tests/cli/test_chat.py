"""`trustcore chat`: history, commands, and Ctrl-C in a real terminal, which stops the answer and not the program."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from trustcore.cli import console, interrupts
from trustcore.cli.generate import show
from trustcore.cli.interrupts import Interrupts


def turns(calls) -> list:
    return [[(m["role"], m["content"]) for m in arguments[0]] for name, arguments in calls if name == "chat"]


def test_history_is_kept(cli, calls) -> None:
    done = cli("chat", "echo", "--system", "S", stdin=b"one\n\ntwo\n")
    assert (done.status, done.out) == (0, "(2) one\n(4) two\n")
    assert turns(calls) == [
        [("system", "S"), ("user", "one")],
        [("system", "S"), ("user", "one"), ("assistant", "(2) one"), ("user", "two")],
    ]


def test_reset_and_exit(cli, calls) -> None:
    done = cli("chat", "echo", "--system", "S", stdin=b"one\n/reset\ntwo\n/exit\nthree\n")
    assert done.out == "(2) one\n(2) two\n"
    assert turns(calls)[-1] == [("system", "S"), ("user", "two")]


def test_an_unknown_command_lists_the_commands(cli, calls) -> None:
    done = cli("chat", "echo", stdin=b"/what\n")
    assert turns(calls) == []
    assert "/reset" in done.err and "/exit" in done.err


def test_a_refused_turn_leaves_the_history(cli, calls) -> None:
    done = cli("chat", "echo", stdin=b"one\noverflow\ntwo\n")
    assert done.status == 0
    assert "the conversation does not fit /reset" in done.err
    assert [role for role, _ in turns(calls)[-1]] == ["user", "assistant", "user"]


def test_a_stopped_answer_stays_in_the_history(cli, calls) -> None:
    done = cli("chat", "stops", stdin=b"two three\nfour\n")
    assert done.status == 0
    assert turns(calls)[1][1] == ("assistant", "(1) two")


def test_options_are_passed_on(cli, calls) -> None:
    done = cli("chat", "echo", "--temperature", "0.5", "--seed", "3", "--stats", stdin=b"one\n")
    assert calls[1][1][1] == {"temperature": 0.5, "seed": 3}
    assert "first token after" in done.err


def test_interrupts_stop_once_and_only_where_they_may() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)  # outside: nothing
        with pytest.raises(KeyboardInterrupt), interrupts.stoppable():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)  # the impatient second one
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_press_that_something_swallowed_is_raised_at_the_next_step() -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupts.check()
    with interrupts.remembered():
        with contextlib.suppress(KeyboardInterrupt):  # as jax's callback of the garbage collector does
            signal.raise_signal(signal.SIGINT)
        with console.progress_bar() as progress, pytest.raises(KeyboardInterrupt):
            progress("packing", 1, 2)
    assert signal.getsignal(signal.SIGINT) is before
    interrupts.check()


def test_an_answer_stops_at_the_next_piece_where_a_press_was_swallowed(capsys) -> None:
    class Stream:
        def __iter__(self):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            yield "one"
            yield "two"

        def close(self) -> None:
            pass

    with Interrupts() as held, held.stoppable():
        assert show(Stream())
    assert capsys.readouterr().out == "one\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_terminal(program) -> None:
    import pty

    master, slave = pty.openpty()
    seen = b""

    def until(text: bytes, *, also: Callable[[], object] = lambda: None) -> bytes:
        """What is shown before `text`; `also` happens once a second until it comes."""
        nonlocal seen
        end, again = time.monotonic() + 60, 0.0
        while text not in seen:
            now = time.monotonic()
            if now > end:
                pytest.fail(f"{text!r} did not come; there is {seen!r}")
            if now > again:
                also()
                again = now + 1
            if select.select([master], [], [], 0.2)[0]:
                seen += os.read(master, 4096)
        before, _, seen = seen.partition(text)
        return before

    process = program("chat", "slow", stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    try:
        assert b"\x1b" in until(b"> ")  # a terminal gets colours
        os.write(master, b"a b c d e f g h i j k l m n o p\n")
        until(b"(1) a b")
        process.send_signal(2)
        assert b"p" not in until(b"(stopped)").replace(b"\x1b", b"")
        until(b"> ")
        os.write(master, b"next\n")
        until(b"(3) next")
        until(b"> ")
        # Again and again: input() misses a signal that comes just before it waits, and Ctrl-D just before its prompt.
        until(b"> ", also=lambda: process.send_signal(2))  # at the prompt: asks again
        for _ in range(30):
            os.write(master, b"\x04")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
                break
        assert process.poll() == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
