"""Models on Hugging Face: what an id means, which files are chosen, and every refusal. No network."""

from __future__ import annotations

import errno
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from trustcore import catalogue, hub
from trustcore.errors import CatalogueError
from trustcore.hub import HubSource, choose_files

GGUF = ["README.md", "tiny-Q4_K_M.gguf", "tiny-q8_0.gguf", "tiny.Q4_K_S.gguf", "mmproj-tiny-f16.gguf"]
SPLIT = [f"Q8_0/big-Q8_0-{part:05d}-of-00003.gguf" for part in (1, 2, 3)]
TENSORS = [
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    *("consolidated.safetensors", "config.json", "tokenizer.json", "pytorch_model.bin", "onnx/model.safetensors"),
]


def source(text: str) -> HubSource:
    parsed = HubSource.parse(text)
    assert parsed is not None
    return parsed


@pytest.mark.parametrize(
    ("text", "repo", "revision", "quantization", "file"),
    [
        ("owner/name", "owner/name", None, None, None),
        ("hf:owner/na.me-1", "owner/na.me-1", None, None, None),
        ("owner/name:q4_k_m", "owner/name", None, "q4_k_m", None),
        ("owner/name@v1.0", "owner/name", "v1.0", None, None),
        ("hf:owner/name@main:Q8_0", "owner/name", "main", "Q8_0", None),
        ("hf:owner/name@refs/pr/3/a/b.gguf", "owner/name", "refs/pr/3", None, "a/b.gguf"),
        ("hf:owner/name/a/b.gguf", "owner/name", None, None, "a/b.gguf"),
    ],
)
def test_parse(text: str, repo: str, revision: str | None, quantization: str | None, file: str | None) -> None:
    assert HubSource.parse(text) == HubSource(text, repo, revision, quantization, file)


@pytest.mark.parametrize("text", ["", "name", "a/b/c", "owner/", "/name", "hf:name", "a/b@", "a/b:", "a b/c", "-a/b"])
def test_other_forms_are_not_ids(text: str) -> None:
    assert HubSource.parse(text) is None


@pytest.mark.parametrize(
    ("text", "names", "wanted", "main"),
    [
        ("o/n", GGUF, ["tiny-q8_0.gguf"], "tiny-q8_0.gguf"),
        ("o/n:Q4_K_M", GGUF, ["tiny-Q4_K_M.gguf"], "tiny-Q4_K_M.gguf"),
        ("o/n:q4_k_s", GGUF, ["tiny.Q4_K_S.gguf"], "tiny.Q4_K_S.gguf"),
        ("o/n", ["a-Q4_K_M.gguf", "a-Q6_K.gguf"], ["a-Q6_K.gguf"], "a-Q6_K.gguf"),
        ("o/n", ["a-F16.gguf", "a-Q4_K_M.gguf", "a-Q2_K.gguf"], ["a-Q4_K_M.gguf"], "a-Q4_K_M.gguf"),
        ("o/n", ["only-IQ2_XS.gguf"], ["only-IQ2_XS.gguf"], "only-IQ2_XS.gguf"),
        ("o/n", SPLIT, SPLIT, SPLIT[0]),
        ("hf:o/n/" + SPLIT[1], SPLIT, SPLIT, SPLIT[1]),
        ("o/n", TENSORS, [*TENSORS[:3], "config.json", "tokenizer.json"], None),
        ("o/n", ["x.safetensors", "config.json"], ["x.safetensors", "config.json"], None),
        ("o/n", ["pytorch_model.bin", "model.safetensors"], ["model.safetensors"], None),
        (
            "o/n",
            ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "training_args.bin", "config.json"],
            ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "config.json"],
            None,
        ),
        (
            "hf:o/n/sub/x.safetensors",
            ["config.json", "sub/x.safetensors", "sub/config.json", "sub/y.safetensors"],
            ["sub/x.safetensors", "sub/config.json"],
            "sub/x.safetensors",
        ),
    ],
)
def test_the_files_of_a_model(text: str, names: list[str], wanted: list[str], main: str | None) -> None:
    assert choose_files(source(text), names) == (wanted, main)


@pytest.mark.parametrize(
    ("text", "names", "complaint"),
    [
        ("o/n:Q4_K", GGUF, "no GGUF file is quantized as 'Q4_K'; the repository has tiny-Q4_K_M.gguf"),
        ("o/n:Q8_0", TENSORS, "no GGUF file"),
        ("o/n@v1", ["a-Q2_K.gguf", "a-Q3_K_M.gguf"], "o/n@v1:Q4_K_M, or a file, hf:o/n@v1/a-Q2_K.gguf"),
        ("o/n", ["a-Q8_0.gguf", "b-Q8_0.gguf"], "2 GGUF files fit"),
        ("o/n", SPLIT[:2], "one of 3 parts, and .*00003-of-00003.gguf is not there"),
        ("o/n", ["tf_model.h5"], "neither GGUF nor safetensors files, nor pytorch_model.bin; it holds tf_model.h5"),
        ("o/n", [], "it holds nothing"),
        ("hf:o/n/tiny.Q4_K_M.gguf", GGUF, "has no file 'tiny.Q4_K_M.gguf'. It has .*tiny-Q4_K_M.gguf"),
    ],
)
def test_no_choice(text: str, names: list[str], complaint: str) -> None:
    with pytest.raises(CatalogueError, match=complaint):
        choose_files(source(text), names)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A stand-in for huggingface.co: `names` it lists, `error` it raises, `calls` of snapshot_download."""
    state: dict = {"names": GGUF, "error": None, "folder": tmp_path / "snapshot", "calls": []}

    def list_repo_files(self: object, repo: str, *, revision: str | None = None) -> list[str]:
        if state["error"] is not None:
            raise state["error"]
        return state["names"]

    def snapshot_download(repo: str, **options: object) -> str:
        state["calls"].append((repo, options))
        if options.get("local_files_only") and not state["folder"].exists():
            raise errors.LocalEntryNotFoundError("not in the cache")
        return str(state["folder"])

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_fetching_a_gguf_file(server: dict) -> None:
    assert catalogue.resolve("o/n@v1:Q4_K_M") == server["folder"] / "tiny-Q4_K_M.gguf"
    assert server["calls"] == [("o/n", {"revision": "v1", "allow_patterns": ["tiny-Q4_K_M.gguf"]})]


def test_fetching_safetensors(server: dict) -> None:
    server["names"] = TENSORS
    assert catalogue.resolve("hf:o/n") == server["folder"]
    (_, options) = server["calls"][0]
    assert "consolidated.safetensors" not in options["allow_patterns"]


def test_a_name_is_not_a_pattern(server: dict) -> None:
    import fnmatch

    server["names"] = ["odd[1]*-Q8_0.gguf"]
    catalogue.resolve("o/n")
    ((_, options),) = server["calls"]
    assert fnmatch.fnmatch("odd[1]*-Q8_0.gguf", options["allow_patterns"][0])
    assert not fnmatch.fnmatch("odd1xx-Q8_0.gguf", options["allow_patterns"][0])


def test_a_local_folder_comes_before_the_hub(server: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o" / "n").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert catalogue.resolve("o/n") == Path("o/n")
    assert catalogue.resolve("hf:o/n:Q4_K_M") == server["folder"] / "tiny-Q4_K_M.gguf"


def failure(kind: type[Exception], text: str = "boom") -> Exception:
    """An error of huggingface_hub without the response that its constructor asks for."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (failure(errors.RepositoryNotFoundError), "has no model o/n that you may see.*log in"),
        (failure(errors.GatedRepoError), "accept its terms at https://huggingface.co/o/n.*HF_TOKEN"),
        (failure(errors.RevisionNotFoundError), "o/n has no revision 'v1'"),
        (errors.HFValidationError("bad id"), "not a Hugging Face id: bad id"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room on the disk.*HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written. Set HF_HOME"),
        (failure(errors.HfHubHTTPError, "500 Server Error"), "fetching from huggingface.co failed"),
        (RuntimeError("odd"), "fetching from huggingface.co failed.*RuntimeError: odd"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_refusals(server: dict, error: Exception, complaint: str) -> None:
    server["error"] = error
    with pytest.raises(CatalogueError, match=complaint) as caught:
        catalogue.resolve("o/n@v1")
    assert caught.value.__cause__ is error


class ConnectError(Exception):
    """Stands for the HTTP library's own error, which is not a ConnectionError."""


OFFLINE = [ConnectError("no route"), ConnectionError("refused"), TimeoutError("late"), errors.OfflineModeIsEnabled("x")]


@pytest.mark.parametrize("error", OFFLINE, ids=lambda error: type(error).__name__)
def test_without_a_network_the_cache_answers(server: dict, error: Exception) -> None:
    server["error"] = error
    with pytest.raises(CatalogueError, match=r"does not answer .* is not in the cache"):
        catalogue.resolve("o/n:Q4_K_M")
    server["folder"].mkdir()
    with pytest.raises(CatalogueError, match="no GGUF file is quantized as 'Q4_K_M'"):
        catalogue.resolve("o/n:Q4_K_M")
    (server["folder"] / "tiny-Q4_K_M.gguf").write_bytes(b"")
    assert catalogue.resolve("o/n:Q4_K_M") == server["folder"] / "tiny-Q4_K_M.gguf"


def test_the_real_cache_of_a_partial_download_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders as huggingface_hub lays them out, read by the real `snapshot_download`."""
    commit, storage = "0" * 40, tmp_path / "models--o--n"
    snapshot = storage / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(commit)
    (snapshot / "tiny-Q8_0.gguf").write_bytes(b"GGUF")
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **options: real(*args, cache_dir=tmp_path, **options)
    )

    def offline(*_: object, **__: object) -> list[str]:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    assert hub.fetch(source("o/n")) == snapshot / "tiny-Q8_0.gguf"
