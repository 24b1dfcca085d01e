"""Finding out what a path holds, by what is in it and not by its name, and opening it.

    path -> a folder's one checkpoint -> the first bytes -> the reader of that format

A folder with weights in several formats gives those that say most about themselves: safetensors before GGUF before
PyTorch before Flax's msgpack before NumPy's npz before Orbax.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import TOKENIZER_GGUF, Checkpoint
from trustcore.weights.mapped import MappedFile, read_bytes

_GGUF = b"GGUF"
_ZIP = b"PK\x03\x04"
_ZIP_EMPTY = b"PK\x05\x06"

# Beside weights in the folders that training programs leave, and no weights of a model.
_NO_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|tokenizer|sentencepiece).*", re.IGNORECASE
)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Returns the checkpoint at `path`: a file, the index of several, or a folder with one of them.

    Read are GGUF, safetensors, PyTorch (`torch.save`), Flax msgpack, `.npz`, and Orbax where `orbax-checkpoint` is
    installed. A file is recognised by what it holds, not by its name. Any part of a split GGUF model opens the whole
    model; a single shard of another format opens alone (open its index, or the folder, for the whole).

    Raises:
        CheckpointError: there is no such file, it is something else, or it is broken.
    """
    path = Path(path)
    if _is_folder(path):
        path = _choose(path)
        if _is_folder(path):
            from trustcore.weights.orbax import open_orbax

            return open_orbax(path)
    head = read_bytes(path, 512)
    if head[:4] == _GGUF:
        from trustcore.weights.gguf import open_gguf

        return open_gguf(path)
    index = re.search(r"\.(safetensors|bin|pt|pth|msgpack)\.index\.json$", path.name)
    if index is not None:
        return _open_index(path, index[1])
    looks_like_safetensors = head[5:9] == b"\0\0\0{"  # a header length under 2**40, then JSON
    if looks_like_safetensors:
        from trustcore.weights.safetensors import open_safetensors

        return open_safetensors(path)
    if head[:4] in (_ZIP, _ZIP_EMPTY):
        return _open_zip(path)
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        from trustcore.weights.pytorch import open_pytorch

        return open_pytorch(path)
    refuse_foreign(path, head)
    if path.suffix == ".safetensors":
        from trustcore.weights.safetensors import open_safetensors

        return open_safetensors(path)
    from trustcore.weights.flax_msgpack import looks_like_flax, open_flax

    if looks_like_flax(head):
        return open_flax(path)
    raise CheckpointError(
        f"the file starts with {head[:8]!r}; expected {_GGUF!r} (a GGUF file), the 8-byte header length and {b'{'!r} "
        "of a safetensors file, a zip archive of torch.save or numpy.savez, a pickle of torch.save, or a msgpack map "
        "of Flax",
        path=path,
        field="magic",
        offset=0,
    )


def refuse_foreign(path: Path, head: bytes) -> None:
    """Raises the CheckpointError that says what the file is, where `head` shows a kind that people often have."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    known = (
        (
            text.startswith(b"version https://git-lfs"),
            "this is a Git LFS pointer, not the model. Run `git lfs pull` in its repository, or download the file.",
        ),
        (
            text.startswith((b"<!doctype html", b"<html", b"<?xml")),
            "this is a web page, not a model: the download went wrong. Check the address, or log in, and fetch again.",
        ),
        (
            head.startswith(b"\x93NUMPY"),
            "this is one array of numpy.save. A checkpoint has names: write it with numpy.savez, or as safetensors.",
        ),
        (
            head.startswith(b"\x89HDF\r\n"),
            "this is an HDF5 file, as Keras writes them. Convert it to safetensors with the program that wrote it.",
        ),
        (
            head[257:262] == b"ustar",
            "this is a tar archive: unpack it, or, where torch wrote it before 2017, save it with a newer torch again.",
        ),
        (
            head.startswith((b"ggjt", b"tjgg", b"lmgg", b"fmgg")),
            "this is a GGML file from before GGUF. Convert the original model again with a current llama.cpp.",
        ),
        (head.startswith(b"\x1f\x8b"), "this is a gzip archive. Unpack it first."),
    )
    for found, message in known:
        if found:
            raise CheckpointError(message, path=path, field="magic", offset=0)


def _open_index(path: Path, suffix: str) -> Checkpoint:
    from trustcore.weights.flax_msgpack import read_flax
    from trustcore.weights.pytorch import read_pytorch
    from trustcore.weights.safetensors import read_safetensors
    from trustcore.weights.sharded import open_sharded

    if suffix == "safetensors":
        return open_sharded(path, "safetensors", read_safetensors)
    if suffix == "msgpack":
        return open_sharded(path, "flax", read_flax)
    return open_sharded(path, "pytorch", read_pytorch)


def _open_zip(path: Path) -> Checkpoint:
    """The checkpoint in a zip archive, which says by its entries whose it is."""
    from trustcore.weights.zip_directory import read_directory

    file = MappedFile(path)
    try:
        names = list(read_directory(file))
    finally:
        file.close()
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        from trustcore.weights.pytorch import open_pytorch

        return open_pytorch(path)
    if names and all(name.endswith(".npy") for name in names):
        from trustcore.weights.npz import open_npz

        return open_npz(path)
    held = ", ".join(repr(name[:40]) for name in names[:4]) or "nothing"
    raise CheckpointError(
        f"this is a zip archive with {held}; expected data.pkl (torch.save) or arrays alone (numpy.savez). If a "
        "checkpoint is in it, unpack it first.",
        path=path,
        field="zip archive",
        offset=0,
    )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False  # the file's own error says it better


def _choose(folder: Path) -> Path:
    """The one checkpoint in `folder`, of the first format that it has any of."""
    from trustcore.weights.orbax import find_orbax

    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError as error:
        raise CheckpointError(f"the folder cannot be read: {error}", path=folder) from error
    orbax = find_orbax(folder)
    if orbax == folder:
        return folder
    kinds: tuple[Callable[[Sequence[str]], list[str]], ...] = (_safetensors, _gguf, _pytorch, _flax, _npz)
    found = next((held for kind in kinds if (held := kind(names))), [])
    if not found and orbax is not None:
        return orbax
    if not found:
        raise CheckpointError(
            "the folder holds no checkpoint; expected model.safetensors.index.json, a .safetensors, .gguf, .bin, .pt, "
            ".pth, .msgpack or .npz file, or an Orbax checkpoint",
            path=folder,
        )
    if len(found) > 1:
        raise CheckpointError(
            f"the folder holds {len(found)} checkpoints ({', '.join(found[:6])}{', ...' if len(found) > 6 else ''}). "
            f"Open one of them: open_checkpoint({str(folder / found[0])!r})",
            path=folder,
        )
    return folder / found[0]


def _one_of(names: Sequence[str], preferred: Sequence[str], indices: list[str], files: list[str]) -> list[str]:
    """The preferred name that is there; else the indices, else the files."""
    for name in preferred:
        if name in names:
            return [name]
    return indices or files


def _safetensors(names: Sequence[str]) -> list[str]:
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    files = [name for name in names if name.endswith(".safetensors")]
    return _one_of(names, ("model.safetensors.index.json", "model.safetensors"), indices, files)


def _gguf(names: Sequence[str]) -> list[str]:
    from trustcore.weights.gguf import split_name

    models: dict[object, str] = {}  # a split model counts once, by its first part
    for name in names:
        if name.endswith(".gguf") and name != TOKENIZER_GGUF:
            split = split_name(name)
            models.setdefault(name if split is None else (split.prefix, split.count), name)
    return list(models.values())


def _pytorch(names: Sequence[str]) -> list[str]:
    indices = [name for name in names if name.endswith((".bin.index.json", ".pt.index.json", ".pth.index.json"))]
    files = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and not _NO_WEIGHTS.match(name)]
    return _one_of(names, ("pytorch_model.bin.index.json", "pytorch_model.bin"), indices, files)


def _flax(names: Sequence[str]) -> list[str]:
    indices = [name for name in names if name.endswith(".msgpack.index.json")]
    files = [name for name in names if name.endswith(".msgpack")]
    return _one_of(names, ("flax_model.msgpack.index.json", "flax_model.msgpack"), indices, files)


def _npz(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith(".npz")]
