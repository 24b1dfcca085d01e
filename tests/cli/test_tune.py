"""`trustcore tune`: a model's calls and an op's, going on where it stopped, its budget, Ctrl-C, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import trustcore
from trustcore import tune
from trustcore.cli import tune as command
from trustcore.models import random_model
from trustcore.tune import table

ROOT = Path(__file__).parents[2]
SHAPE = "B=1,T=136,N=1,H=16"
QUICK = ("--seconds", "0.02", "--most", "1")


def test_an_op_is_tuned_once(cli, own_tables: Path) -> None:
    done = cli("tune", "attention_forward", "--shapes", SHAPE, *QUICK)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "attention_forward B=1,T=136,N=1,H=16,K=1,S=136,Hv=16,dtype=float32,causal=true,window=0"
    assert lines[1].startswith("on cpu ") and any(line.startswith(" * ") for line in lines)
    assert lines[-1] == "1 tuned, 0 known before, 0 failed, 0 left"
    again = cli("tune", "attention_forward", "--shapes", SHAPE, *QUICK)
    assert again.out == "0 tuned, 1 known before, 0 failed, 0 left\n"
    shown = json.loads(cli("tune", "attention_forward", "--shapes", SHAPE, "--show", "--json").out)
    assert shown[0]["why"].startswith("measured here: ")
    told = json.loads(cli("tune", "attention_forward", "--shapes", SHAPE, "--again", "--json", *QUICK).out)
    assert told["tuned"][0]["sizes"]["T"] == 136 and told["left"] == 0


def test_a_model_is_tuned_in_pieces(cli, own_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    config = {"model_type": "llama", "num_hidden_layers": 1, "num_key_value_heads": 2, **sizes}
    model = trustcore.quantize(random_model({**config, "max_position_embeddings": 64}), "int8:g32")
    trustcore.save(model, tmp_path / "model")
    words = ("tune", str(tmp_path / "model"), "--length", "16", *QUICK)
    page = cli(*words, "--show").out
    assert "attention_forward B=1,T=16," in page and "packed_product R=16,K=64,N=64,format=int8:g32" in page
    assert "packed_product R=1," in page and page.count("defaults: nothing was measured") == page.count("defaults\n")
    calls = page.count("  defaults\n")

    real = command.interrupts.check

    def pressed() -> None:  # at the beginning of the second search
        real()
        if table.read(table.path_of(tune.this_device())):
            raise KeyboardInterrupt

    monkeypatch.setattr(command.interrupts, "check", pressed)
    stopped = cli(*words)
    assert stopped.status == 130
    said = "trustcore: stopped: 1 call tuned and kept; the same command goes on from there\n"
    assert stopped.err == said
    known = len(table.read(table.path_of(tune.this_device())))
    assert 1 == known < calls and len(list(own_tables.glob("*.json"))) == 1
    monkeypatch.setattr(command.interrupts, "check", real)
    end = cli(*words).out.splitlines()[-1]
    assert end == f"{calls - known} tuned, {known} known before, 0 failed, 0 left"


def test_the_time_budget_ends_it(cli, own_tables: Path) -> None:
    began = time.monotonic()
    done = cli("tune", "attention", "--shapes", SHAPE, "--shapes", "B=1,T=999,N=8,H=64", "--minutes", "0")
    assert time.monotonic() - began < 30
    expected = "0 tuned, 0 known before, 0 failed, 4 left; out of time: the same command goes on from there\n"
    assert (done.status, done.out) == (0, expected)
    assert not table.read(table.path_of(tune.this_device()))


def test_ctrl_c_leaves_a_whole_table(own_tables: Path) -> None:
    """A real SIGINT, when the first result has been written and the next search is under way."""
    lengths = (8, 16, 32, 64, 136, 270)
    words = [word for n in lengths for word in ("--shapes", f"B=1,T={n},N=1,H=16")]
    process = subprocess.Popen(
        [sys.executable, "-m", "trustcore", "tune", "attention_forward", *words, *QUICK],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    path = table.path_of(tune.this_device())
    end = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "left" not in out
    assert err.splitlines()[-1].startswith("trustcore: stopped: ")
    assert err.endswith("the same command goes on from there\n")
    assert 1 <= len(table.read(path)) < len(lengths)
    assert all(table.parsed(path.read_text()) for path in own_tables.glob("*.json"))
    assert not list(own_tables.glob("*.part"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("attention",), "attention is an op: say of which calls"),
        (("attention", "--shapes", "T=12"), "attention: it needs B, H, N; it takes B, T, N, H"),
        (("attention", "--shapes", "B=1,T=1"), "attention: it needs H, N"),
        (("packed_product", "--shapes", "R=1,K=33,N=8,format=q4_0"), "33"),
        (("cross_entropy_backward", "--shapes", "R=2000,D=1,V=99999"), "takes 2 GB; tune fewer"),
        (("beads", "--shapes", "B=1"), "beads is no op that can be tuned"),
        (("attention", "--shapes", "nothing"), "'nothing' is no fact"),
    ],
)
def test_refusals_are_one_sentence(cli, own_tables: Path, words: tuple[str, ...], complaint: str) -> None:
    done = cli("tune", *words)
    assert (done.status, done.out) == (2, "")
    assert complaint in done.err.splitlines()[-1] and "Traceback" not in done.err


def test_a_model_without_calls_is_told(cli, own_tables: Path, small_model: Path, monkeypatch) -> None:
    monkeypatch.setattr(tune, "calls_of", lambda *_: [])
    monkeypatch.setattr(command, "_layers", lambda *_: None)
    done = cli("tune", str(small_model))
    assert (done.status, done.err.count("\n")) == (2, 1) and "none of its calls can be tuned" in done.err
