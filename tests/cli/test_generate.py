"""`trustcore generate`: what it passes on, what goes to stdout and what to stderr, and how it ends."""

from __future__ import annotations

import subprocess

import pytest


def test_options_that_are_not_given_are_not_passed_on(cli, calls) -> None:
    done = cli("generate", "echo", "a b c")
    assert (done.status, done.out, done.err) == (0, "a b c\n", "")
    assert calls == [("load", ("echo", None)), ("generate", ("a b c", {}))]


def test_every_option_is_passed_on(cli, calls) -> None:
    cli(
        *("generate", "echo", "x", "--max-tokens", "5", "--temperature", "0", "--top-k", "40", "--top-p", "0.9"),
        *("--min-p", "0.05", "--repetition-penalty", "1.1", "--frequency-penalty", "0.2", "--presence-penalty", "0.3"),
        *("--seed", "0", "--stop", "###", "--stop", "END", "--context", "512", "--cache-dtype", "int8"),
        *("--ignore-eos", "--dtype", "bfloat16"),
    )
    assert calls[0] == ("load", ("echo", "bfloat16"))
    assert calls[1][1][1] == {
        "max_tokens": 5,
        "temperature": 0.0,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "seed": 0,
        "stop": ["###", "END"],
        "context": 512,
        "cache_dtype": "int8",
        "ignore_eos": True,
    }


def test_chat_applies_the_template(cli, calls) -> None:
    cli("generate", "echo", "hello", "--chat", "--system", "Be brief.")
    roles = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert calls[1] == ("chat", (roles, {}))


def test_a_system_message_needs_chat(cli, calls) -> None:
    done = cli("generate", "echo", "hello", "--system", "Be brief.")
    assert done.status == 2
    assert "add --chat" in done.err
    assert calls == []


@pytest.mark.parametrize("words", [["-"], []])
@pytest.mark.parametrize(("stdin", "prompt"), [(b"a\n", "a"), (b"a\n\n", "a\n"), (b"\xc3\xa9\r\n", "é"), (b"", "")])
def test_the_prompt_on_stdin(cli, calls, words: list[str], stdin: bytes, prompt: str) -> None:
    assert cli("generate", "echo", *words, stdin=stdin).status == 0
    assert calls[1][1][0] == prompt


def test_a_prompt_that_is_not_utf8(cli, calls) -> None:
    done = cli("generate", "echo", "-", stdin=b"caf\xe9")
    assert done.status == 2
    assert "not UTF-8: byte 0xe9 at offset 3" in done.err
    assert calls == []


def test_a_prompt_that_starts_with_a_dash(cli, calls) -> None:
    assert cli("generate", "echo", "--", "--debug").out == "--debug\n"


def test_stats_go_to_stderr(cli, calls) -> None:
    done = cli("generate", "echo", "a b", "--stats")
    assert done.out == "a b\n"
    line, end = done.err.split("\n")
    assert end == ""
    assert line.startswith(
        "prompt 7 tokens, 123.5 tokens/s | generated 3 tokens, 45.7 tokens/s | first token after 0.25 s | peak memory "
    )
    assert line.endswith(("MB", "GB"))


def test_an_interrupt_keeps_what_is_there(cli, calls) -> None:
    done = cli("generate", "stops", "one two three four", "--stats")
    assert done.status == 130
    assert done.out == "one two\n"
    assert "tokens/s" in done.err


def test_a_reader_that_goes_away_is_no_error(program) -> None:
    with program("generate", "many", "x", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"word and another\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_a_pipe_has_no_colours_or_bars(program) -> None:
    with program(
        *("generate", "echo", "a b", "--stats"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        out, err = process.communicate(timeout=60)
    assert out == b"a b\n"
    assert b"\x1b" not in err and b"downloading" not in err
    assert err.startswith(b"prompt 7 tokens")
