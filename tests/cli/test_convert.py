"""`trustcore convert`: files, the report, refusals in one line, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.folders import hugging_face_folder
from tests.weights.torch_files import archive, name, recorded, state, text
from trustcore.weights import open_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    hugging_face_folder(tmp_path / "in")
    return tmp_path / "in"


def test_a_folder_with_its_tokenizer(cli, folder: Path) -> None:
    out = folder.with_name("out")
    done = cli("convert", str(folder), str(out), "--dtype", "bfloat16", "--shard-size", "40kB", "--verify")
    assert (done.status, done.err) == (0, "")
    assert f"{out}: safetensors from safetensors, 21 tensors" in done.out
    assert "beside them: config.json, tokenizer.json, tokenizer_config.json" in done.out
    assert "verified on 32 tokens: logits differ by at most" in done.out
    assert (out / "model.safetensors.index.json").is_file()
    with open_checkpoint(out) as checkpoint:
        assert {array.encoding for array in checkpoint.values()} == {"bf16"}
    assert sorted(os.listdir(folder.parent)) == ["in", "out"]


def test_a_gguf_file_as_json(cli, folder: Path) -> None:
    out = folder.with_name("out.gguf")
    done = cli("convert", str(folder), str(out), "--dtype", "float16", "--json")
    assert (done.status, done.err) == (0, "")
    report = json.loads(done.out)
    assert (report["kind"], report["tensors"], report["verification"]) == ("gguf", 21, None)
    with open_checkpoint(out) as checkpoint:
        assert checkpoint["output.weight"].encoding == "f16"
    assert "exists; write over it with --force" in cli("convert", str(folder), str(out)).err
    assert cli("convert", str(folder), str(out), "--force").status == 0
    with open_checkpoint(out) as checkpoint:
        assert checkpoint["output.weight"].encoding == "f32"


def test_a_pytorch_file_with_what_its_training_left_in_it(cli, tmp_path: Path) -> None:
    (tmp_path / "run.pt").write_bytes(recorded("training"))
    done = cli("convert", str(tmp_path / "run.pt"), str(tmp_path / "out.safetensors"))
    assert done.status == 0 and "safetensors from pytorch, 4 tensors" in done.out
    assert open_checkpoint(tmp_path / "out.safetensors").keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_orbax(cli, folder: Path) -> None:
    pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint (pip install 'trustcore[orbax]')")
    out = folder.with_name("out")
    assert cli("convert", str(folder), str(out), "--to", "orbax").status == 0
    assert open_checkpoint(out).format == "orbax" and (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("source", "out", "words", "complaint"),
    [
        ("in", "nowhere/out", [], "lies in a folder that does not exist"),
        ("in", "in", [], "the folder is not empty"),
        ("in", "out.gguf", ["--to", "orbax"], "orbax is written to a folder"),
        ("in", "out", ["--shard-size", "some"], "'some' is no size of a file"),
        ("in", "out", ["--dtype", "int8"], "Invalid value for '--dtype'"),
        ("evil.bin", "out", [], "the pickle names 'os.system'"),
        ("missing.bin", "out", [], "missing.bin: no such file or folder"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(cli, folder: Path, monkeypatch, source, out, words, complaint) -> None:
    monkeypatch.chdir(folder.parent)
    call = name("os.system") + b"(" + text("touch executed") + b"tR"
    Path("evil.bin").write_bytes(archive(state(w=call)))
    done = cli("convert", source, out, *words)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert complaint in done.err
    assert sorted(os.listdir()) == ["evil.bin", "in"]


def test_help_names_the_options(cli) -> None:
    page = cli("convert", "--help").out
    for word in ("SRC", "DST", "--to", "--dtype", "--shard-size", "--verify", "--force", "--json"):
        assert word in page


def test_ctrl_c_leaves_nothing(program, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    arrays = {f"w{i}": np.ones((1024, 1024), np.float32) for i in range(150)}
    save_file(arrays, tmp_path / "in" / "model.safetensors")
    with program(
        *("convert", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", "bfloat16", "--shard-size", "4MB"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        end = time.monotonic() + 120
        while not list(tmp_path.glob(".out.*.partial/*")) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.002)
        assert list(tmp_path.glob(".out.*.partial"))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, b"") and b"Traceback" not in err
    assert os.listdir(tmp_path) == ["in"]
