"""Models on Hugging Face: which files of a repository make the model, and getting those and no others.

    HubSource.parse("owner/name:Q4_K_M") -> fetch: list the files -> choose_files -> snapshot_download -> path

`huggingface_hub` moves the bytes, keeps its own cache (`HF_HOME`) and shows its own bars on a terminal; it is imported
by the first fetch. Without a network, what an earlier fetch brought is used.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trustcore.errors import CatalogueError

# Read beside safetensors weights: the configuration, every form in which a tokenizer or chat template is stored, and
# how states of tokens become one vector.
SIDE_FILES: frozenset[str] = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.json",
        "chat_template.jinja",
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
    }
)

# Taken from a repository of many GGUF files when none is asked for: packed formats, the most exact first, then 16 bits.
# trustcore multiplies with all of them packed, on the CPU natively.
PREFERRED_QUANTIZATIONS: tuple[str, ...] = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"),
    *("BF16", "F16"),
)

_ID = re.compile(
    r"(?P<prefix>hf:)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/[\w.-]+/[^/:@]+|[^/:@]+))?"
    r"(?::(?P<quantization>[\w.-]+))?"
    r"(?:/(?P<file>[^/].*))?"
)
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf$")


@dataclass(frozen=True)
class HubSource:
    """A model on Hugging Face, as a user names it.

    Attributes:
        text: what the user wrote, for messages.
        repo: "owner/name".
        revision: branch, tag, commit or "refs/pr/1"; None for the main branch.
        quantization: of the GGUF file that is wanted, in either case.
        file: path in the repository.
    """

    text: str
    repo: str
    revision: str | None = None
    quantization: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubSource | None:
        """Returns what `text` names, or None where it has another form: `[hf:]owner/name[@revision][:quantization]`.

        After `hf:` a file may follow: `hf:owner/name/file`.

        >>> HubSource.parse("hf:a/b@v1/c.gguf")
        HubSource(text='hf:a/b@v1/c.gguf', repo='a/b', revision='v1', quantization=None, file='c.gguf')
        """
        match = _ID.fullmatch(text)
        if match is None or (match["file"] and not match["prefix"]):
            return None
        return cls(text, match["repo"], match["revision"], match["quantization"], match["file"])

    @property
    def page(self) -> str:
        """The address that people look at."""
        return f"https://huggingface.co/{self.repo}"


def fetch(source: HubSource) -> Path:
    """Returns the path of the model on this machine: its GGUF file (first part), or its folder of safetensors.

    Raises:
        CatalogueError: no such repository, revision or file, no access, no network, no room.
    """
    import huggingface_hub

    names: list[str] = []
    offline: Exception | None = None
    with _errors(source):
        try:
            names = huggingface_hub.HfApi().list_repo_files(source.repo, revision=source.revision)
        except Exception as error:
            if not _is_network(error):
                raise
            offline = error
    if offline is not None:
        folder, names = _cached(source, offline)
        _, main = choose_files(source, names)
        return folder / main if main else folder
    wanted, main = choose_files(source, names)
    patterns = [re.sub(r"([\[*?])", r"[\1]", name) for name in wanted]  # a name is not a pattern
    with _errors(source):
        folder = Path(huggingface_hub.snapshot_download(source.repo, revision=source.revision, allow_patterns=patterns))
    return folder / main if main else folder


def _cached(source: HubSource, why: Exception) -> tuple[Path, list[str]]:
    """The folder that earlier calls fetched into, and the files in it, for when the network does not answer."""
    import huggingface_hub

    try:
        # A pattern that no file has: what is here may be a part of the repository, and that part may be enough.
        folder = Path(
            huggingface_hub.snapshot_download(
                source.repo, revision=source.revision, local_files_only=True, allow_patterns=[":"]
            )
        )
    except (OSError, ValueError) as error:
        raise CatalogueError(
            f"{source.text}: huggingface.co does not answer ({_first_line(why)}), and an earlier download of it is not "
            "in the cache of huggingface_hub. Check the network and HF_HUB_OFFLINE, or give the path of a file."
        ) from error
    return folder, [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def choose_files(source: HubSource, names: Sequence[str]) -> tuple[list[str], str | None]:
    """Returns which files of a repository to fetch, and the one that names the model (None: their folder).

    Args:
        source: what is wanted.
        names: every file of the repository.

    Raises:
        CatalogueError: none fits, or several do.
    """
    file, quantization = source.file, source.quantization
    if file is not None:
        if file not in names:
            raise CatalogueError(f"{source.text}: the repository has no file {file!r}. {_suggest(file, names)}")
        if file.endswith(".gguf"):
            return _all_parts(source, file, names), file
        folder = file.rpartition("/")[0]
        beside = [name for name in names if name.rpartition("/")[0] == folder and name.rpartition("/")[2] in SIDE_FILES]
        return [file, *(name for name in beside if name != file)], file
    models = [name for name in names if name.endswith(".gguf") and "mmproj" not in name.lower() and _first_part(name)]
    if models or quantization is not None:
        main = _choose_gguf(source, sorted(models))
        return _all_parts(source, main, names), main
    top = [name for name in names if "/" not in name]
    tensors = [name for name in top if name.endswith((".safetensors", ".safetensors.index.json"))]
    # Some repositories hold the same weights twice; the standard names are the ones that belong to config.json.
    tensors = [name for name in tensors if name.startswith("model")] or tensors
    if not tensors:  # read by an unpickler that runs nothing
        tensors = [name for name in top if re.fullmatch(r"pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?", name)]
    if not tensors:
        held = ", ".join(sorted(top)[:8]) or "nothing"
        raise CatalogueError(
            f"{source.text}: the repository holds neither GGUF nor safetensors files, nor pytorch_model.bin; it holds "
            f"{held}. Give one of its files, hf:{source.repo}/FILE, or look for a conversion of this model."
        )
    return tensors + [name for name in names if name in SIDE_FILES], None


def _choose_gguf(source: HubSource, models: list[str]) -> str:
    quantization = source.quantization
    if quantization is not None:
        found = [name for name in models if _has_quantization(name, quantization)]
        if not found:
            held = ", ".join(models[:12]) or "no GGUF file"
            raise CatalogueError(
                f"{source.text}: no GGUF file is quantized as {quantization!r}; the repository has {held}."
            )
    else:
        found = models
        for preferred in PREFERRED_QUANTIZATIONS:
            chosen = [name for name in models if _has_quantization(name, preferred)]
            if len(models) > 1 and chosen:
                found = chosen
                break
    if len(found) > 1:
        base = source.repo + (f"@{source.revision}" if source.revision else "")
        listed = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
        raise CatalogueError(
            f"{source.text}: {len(found)} GGUF files fit: {listed}. Choose a quantization, {base}:Q4_K_M, or a file, "
            f"hf:{base}/{found[0]}."
        )
    return found[0]


def _has_quantization(name: str, quantization: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(quantization)}(?![A-Za-z0-9_])", name, re.IGNORECASE) is not None


def _first_part(name: str) -> bool:
    split = _SPLIT.match(name)
    return split is None or int(split["part"]) == 1


def _all_parts(source: HubSource, name: str, names: Sequence[str]) -> list[str]:
    split = _SPLIT.match(name)
    if split is None:
        return [name]
    parts = [f"{split['stem']}-{part:05d}-of-{split['parts']}.gguf" for part in range(1, int(split["parts"]) + 1)]
    missing = sorted(set(parts) - set(names))
    if missing:
        raise CatalogueError(f"{source.text}: {name} is one of {len(parts)} parts, and {missing[0]} is not there.")
    return parts


@contextlib.contextmanager
def _errors(source: HubSource) -> Iterator[None]:
    """Turns what huggingface_hub raises into a CatalogueError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        message = f"the model is gated: accept its terms at {source.page}, then run `hf auth login` or set HF_TOKEN."
        raise CatalogueError(f"{source.text}: {message}") from error
    except errors.RepositoryNotFoundError as error:
        message = f"Hugging Face has no model {source.repo} that you may see, nor is there a file or folder so called"
        raise CatalogueError(f"{source.text}: {message}. Check the spelling; log in for a private model.") from error
    except errors.RevisionNotFoundError as error:
        message = f"{source.repo} has no revision {source.revision!r}; see {source.page}/commits/main."
        raise CatalogueError(f"{source.text}: {message}") from error
    except errors.HFValidationError as error:
        raise CatalogueError(f"{source.text}: not a Hugging Face id: {_first_line(error)}") from error
    except Exception as error:  # the HTTP library below raises errors of its own
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            message = "no room on the disk. Free some, or set HF_HOME to a folder with room."
        elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = "the cache of huggingface_hub cannot be written. Set HF_HOME to a folder that can."
        elif _is_network(error):
            message = "huggingface.co does not answer. Check the network and HF_HUB_OFFLINE, or give a file's path."
        else:
            message = "fetching from huggingface.co failed."
        raise CatalogueError(f"{source.text}: {message} ({type(error).__name__}: {_first_line(error)})") from error


def _is_network(error: BaseException) -> bool:
    """Whether nobody answered. The HTTP library below huggingface_hub differs by release, so its errors go by name."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectError", "ConnectionError", "Timeout", "OfflineModeIsEnabled"})


def _suggest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 3, 0.4) or sorted(names)[:6]
    return f"It has {', '.join(near)}." if near else "It is empty."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
