"""`trustcore quantize`: files, the report, refusals before anything is read, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import trustcore
from tests.convert.folders import hugging_face_folder
from tests.models import families
from trustcore.weights import open_checkpoint
from trustcore.weights.gguf_writer import StreamedTensor, write_gguf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = {
        "token_embd.weight": rng.standard_normal((16, 64), np.float32),
        "output.weight": rng.standard_normal((16, 64), np.float32),
        "blk.0.ffn_up.weight": rng.standard_normal((32, 64), np.float32),
        "output_norm.weight": np.ones(64, np.float32),
    }
    write_gguf(tmp_path / "in.gguf", {"general.architecture": "llama"}, tensors)
    return tmp_path / "in.gguf"


def encodings(path: Path) -> dict[str, str]:
    with open_checkpoint(path) as checkpoint:
        return {name: array.encoding for name, array in checkpoint.items()}


def test_the_report(cli, model: Path) -> None:
    out = model.with_name("out.gguf")
    done = cli("quantize", str(model), "-o", str(out), "--format", "Q4_K", "--keep", "output, embed")
    assert (done.status, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert ["token_embd.weight", "16", "x", "64", "f32", "f32", "32.00", "exact", "kept"] in lines
    up = next(line for line in lines if line[:1] == ["blk.0.ffn_up.weight"])
    assert up[1:7] == ["32", "x", "64", "f32", "q5_0", "5.50"] and 25 < float(up[7]) < 35
    assert up[8:] == ["q4_k", "takes", "rows", "of", "256"]
    assert "4 tensors (3 f32, 1 q5_0)" in done.out
    assert encodings(out) == {
        "token_embd.weight": "f32", "output.weight": "f32", "blk.0.ffn_up.weight": "q5_0", "output_norm.weight": "f32"
    }  # fmt: skip


def test_json(cli, model: Path) -> None:
    out = model.with_name("out.gguf")
    found = json.loads(cli("quantize", str(model), "-o", str(out), "-f", "q4_0", "--pure", "--json").out)
    assert (found["path"], found["format"]) == (str(out), "q4_0")
    assert {tensor["name"]: tensor["format"] for tensor in found["tensors"]} == encodings(out)
    assert found["tensors"][3]["sqnr_db"] is None and found["tensors"][0]["sqnr_db"] > 15


def test_an_importance_matrix(cli, model: Path) -> None:
    sums = np.linspace(0, 10, 64, dtype=np.float32)[None]
    matrix = {"blk.0.ffn_up.weight.in_sum2": sums, "blk.0.ffn_up.weight.counts": np.full((1, 1), 10, np.float32)}
    write_gguf(model.with_name("imatrix.gguf"), {"general.type": "imatrix"}, matrix)
    words = ("quantize", str(model), "-f", "q4_0", "--no-search", "-o")
    assert cli(*words, str(model.with_name("a.gguf"))).status == 0
    done = cli(*words, str(model.with_name("b.gguf")), "--importance", str(model.with_name("imatrix.gguf")))
    assert (done.status, done.err) == (0, "")
    with open_checkpoint(model.with_name("a.gguf")) as a, open_checkpoint(model.with_name("b.gguf")) as b:
        name = "blk.0.ffn_up.weight"
        assert a[name].raw().tobytes() != b[name].raw().tobytes()
        assert a["output.weight"].raw().tobytes() == b["output.weight"].raw().tobytes()


@pytest.mark.parametrize(
    ("source", "out", "words", "complaint"),
    [
        ("in.gguf", "out.bin", ["-f", "q4_0"], "out.bin is no .gguf file; give one, or a folder"),
        ("in.gguf", "nowhere/out.gguf", ["-f", "q4_0"], "lies in a folder that does not exist"),
        ("in.gguf", "in.gguf", ["-f", "q4_0"], "exists; write over it with --force"),
        ("in.gguf", "out.gguf", ["-f", "q9_9"], "format 'q9_9' is not known; choose one of f32"),
        ("in.gguf", "out.gguf", [], "give a format such as q4_k_m, or a --budget"),
        ("in.gguf", "out.gguf", ["-f", "q4_0", "--keep", "head"], "keep: 'head' matches no tensor"),
        ("in.gguf", "out.gguf", ["-f", "q4_0", "--importance", "in.gguf"], "this is no importance matrix"),
        ("in.gguf", "out.gguf", ["-f", "q4_0", "--importance", "none.dat"], "none.dat: no such file"),
        ("notes.txt", "out.gguf", ["-f", "q4_0"], "the file starts with b'nothing '"),
        ("missing.gguf", "out.gguf", ["-f", "q4_0"], "missing.gguf: no such file or folder"),
    ],
)
def test_refusals_are_one_line(cli, model: Path, monkeypatch, source, out, words, complaint) -> None:
    monkeypatch.chdir(model.parent)
    Path("notes.txt").write_text("nothing of the kind")
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    done = cli("quantize", source, "-o", out, *words)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert complaint in done.err
    assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before


def test_packed_sources_and_files_that_are_there(cli, model: Path) -> None:
    out, again = model.with_name("out.gguf"), model.with_name("again.gguf")
    assert cli("quantize", str(model), "-o", str(out), "-f", "q8_0").status == 0
    assert "packing it again as q4_0" in cli("quantize", str(out), "-o", str(again), "-f", "q4_0").err
    assert cli("quantize", str(out), "-o", str(again), "-f", "q4_0", "--requantize").status == 0
    assert cli("quantize", str(model), "-o", str(again), "-f", "q5_0", "--pure", "--force").status == 0
    assert encodings(again)["output.weight"] == "q5_0"


def test_help_names_the_options(cli) -> None:
    page = cli("quantize", "--help").out
    for word in ("--out", "--format", "--keep", "--importance", "--no-search", "--pure", "--requantize", "--force"):
        assert word in page


def test_ctrl_c_leaves_nothing(program, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((256, 2048), np.float32)
    tensors = {f"blk.{i}.a.weight": StreamedTensor((2048, 2048), "f32", lambda: [rows] * 8) for i in range(24)}
    write_gguf(tmp_path / "in.gguf", {}, tensors)
    with program(
        *("quantize", str(tmp_path / "in.gguf"), "-o", str(tmp_path / "out.gguf"), "-f", "q3_k"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        end = time.monotonic() + 120
        while not list(tmp_path.glob(".out.gguf.*.partial")) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        assert list(tmp_path.glob(".out.gguf.*.partial"))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, b"") and b"Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give a format such as q4_k_m, or a --budget"),
        (["--budget", "4bpw"], "it needs a text to measure by"),
        (["--format", "q4_0", "--method", "gptq"], "it needs a text to measure by"),
        (["--budget", "many", "--calib", "t.txt"], "is no number of bits"),
        (["--format", "q4_0", "--importance", "i.gguf", "--calib", "t.txt"], "give one of them"),
        (["--format", "q4_0", "--scheme", "gptq"], "it goes with a folder"),
        (["--format", "q4_0", "--method", "hqq"], "it goes with a folder"),
        (["--format", "q4_0", "--method", "hqq", "--calib", "t.txt"], "hqq looks at the weights alone"),
    ],
)
def test_options_that_do_not_go_together(cli, model: Path, options, words) -> None:
    done = cli("quantize", str(model), "-o", str(model.with_name("m.gguf")), *options)
    told = " ".join(done.err.replace("\u2502", " ").split())
    assert done.status == 2 and words in told, told


def test_a_calibration_text_leads_to_gptqs_codes(cli, tmp_path: Path) -> None:
    hugging_face_folder(tmp_path)
    source = str(tmp_path / "model.safetensors")
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over 12 lazy dogs. " * 60)
    words = ("-f", "q4_0", "--calib", str(tmp_path / "t.txt"), "--json")
    reports = []
    for name, method in (("a.gguf", "imatrix"), ("b.gguf", "gptq")):
        done = cli("quantize", source, "-o", str(tmp_path / name), *words, "--method", method)
        assert done.status == 0, done.err
        reports.append(json.loads(done.out))
    with open_checkpoint(tmp_path / "a.gguf") as a, open_checkpoint(tmp_path / "b.gguf") as b:
        assert not np.array_equal(a["blk.0.attn_q.weight"].raw(), b["blk.0.attn_q.weight"].raw())
    assert reports[0]["nbytes"] == reports[1]["nbytes"]


def test_a_folder_takes_every_family(cli, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source, out = families.read("bert").write(tmp_path / "a"), tmp_path / "b"
    words = ("quantize", str(source), "-o", str(out), "-f", "int8:channel", "--keep", "embed,pooler")
    found = json.loads(cli(*words, "--json").out)
    formats = {leaf["path"]: leaf["format"] for leaf in found["tensors"]}
    assert formats["words.table"] == formats["pooler.kernel"] == "float32"
    assert formats["blocks.0.mlp.up.kernel"] == "int8:channel"
    assert next(leaf["sqnr_db"] for leaf in found["tensors"] if leaf["path"] == "norm.weight") is None
    model = trustcore.load(out)
    assert model.blocks[0].mlp.up.kernel.get_value().description == "int8:channel"
    assert "the folder is not empty" in cli(*words).err
    for start, end, more, complaint in (
        (out, "c", (), "is packed already, and packing it again adds to its error"),
        (tmp_path / "a", "c", ("--keep", "nothing"), "keep: nothing match no weight"),
        (tmp_path / "a", "c", ("--pure",), "it goes with a .gguf file; a folder takes one format"),
    ):
        done = cli("quantize", str(start), "-o", str(tmp_path / end), "-f", "int8:channel", *more)
        assert done.status == 2 and complaint in done.err and not (tmp_path / end).exists()


def test_a_folder_in_the_layout_of_others(cli, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    hugging_face_folder(tmp_path / "a")
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over 12 lazy dogs. " * 60)
    words = ("quantize", str(tmp_path / "a"), "-f", "int4:g32", "--keep", "embed,output", "--json", "-o")
    text = ("--calib", str(tmp_path / "t.txt"), "--method")
    found, noise = {}, {}
    for name, more in (
        ("plain", ()), ("imatrix", (*text, "imatrix")), ("gptq", (*text, "gptq")), ("awq", (*text, "awq")),
        ("hqq", ("--method", "hqq")),
    ):  # fmt: skip
        scheme = ("--scheme", "compressed-tensors") if name != "hqq" else ()
        done = cli(*words, str(tmp_path / name), *scheme, *more)
        assert done.status == 0, done.err
        told = {leaf["path"]: leaf for leaf in json.loads(done.out)["tensors"]}
        noise[name] = told["blocks.0.attention.query.kernel"]["sqnr_db"]
        model = trustcore.load(tmp_path / name)
        found[name] = model.blocks[0].attention.query.kernel.get_value()
        kind = "int4:g32:asym" if name == "hqq" else "int4:g32"
        assert found[name].description == kind and told["embedding.table"]["format"] == "float32"
    assert len({np.asarray(weight.dequantize()).tobytes() for weight in found.values()}) == len(found)
    assert min(noise.values()) > 10
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
