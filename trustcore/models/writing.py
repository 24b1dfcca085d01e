"""What a model that writes tokens offers to generation, and what its checkpoint says about how it writes.

    decoder            begin -> empty cache                      step(prompt), step(token), step(token), ...
    encoder-decoder    begin -> the encoder has read the prompt  step(first tokens), step(token), ...
    state space        begin -> states of nothing                step(prompt), step(token), ...

Generation knows a `Writer` and no family. What it keeps between steps is a pytree of the model's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.weights.json_file import read_object

Reads = Literal["prompt", "text", "sound"]

_MOST_BYTES = 1 << 22  # of generation_config.json; those of Whisper have some thousand
_MOST_TOKENS = 1 << 16  # in one of its lists


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a checkpoint says that its model writes.

    Attributes:
        first: tokens that an encoder's counterpart begins with.
        stop: tokens that end a text.
        banned: tokens that are never written.
        banned_first: tokens that are not the first to be written.
        languages: tokens of which the second of `first` is one, if it is to be told from what was read.
        task: the tokens behind that.
    """

    first: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    banned_first: tuple[int, ...] = ()
    languages: tuple[int, ...] = ()
    task: tuple[int, ...] = ()


@runtime_checkable
class Writer(Protocol):
    """A model that writes tokens one after another.

    Attributes:
        config: with `vocab_size`.
        writing: see `Writing`.
        reads: what a prompt is: the beginning of what is written ("prompt"), tokens that an encoder reads ("text"), or
            "sound", mono, 16000 samples a second, or its log-mel frames.
        chooses_cache: whether it keeps its keys and values in whatever dtype is asked for.
    """

    config: Any
    writing: Writing
    reads: Reads
    chooses_cache: bool

    @property
    def limits(self) -> tuple[int, int]:
        """Tokens that a prompt may have, and tokens that are written at most; they are shared where `reads` says so."""
        ...

    def encoder_input(self, prompts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Returns what an encoder reads as one array, and a mask of its tokens; None: there is no encoder."""
        ...

    def begin(self, source: Any, mask: Any, *, batch: int, slots: int, dtype: Any) -> Any:
        """Returns what is kept between steps, before the first of them.

        Args:
            source, mask: see `encoder_input`.
            batch: B.
            slots: tokens there is to be room for.
            dtype: of a cache of keys and values, where it has a choice.
        """
        ...

    def step(self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], kept: Any) -> tuple[Float[Array, "B V"], Any]:
        """Returns float32 logits behind the last token of each row that counts, and what is kept after it.

        Args:
            tokens: that follow those of earlier steps.
            lengths: tokens of each row that count, the rest being padding on the right; where it is 0, logits mean
                nothing.
            kept: see `begin`.
        """
        ...


def behind_last(x: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Float[Array, "B 1 D"]:
    """Returns of each row what stands at its last token that counts."""
    if x.shape[1] == 1:
        return x
    last = jax.numpy.maximum(lengths - 1, 0)[:, None, None]
    return jax.numpy.take_along_axis(x, jax.numpy.broadcast_to(last, (*last.shape[:2], x.shape[2])), axis=1)


def rows_of(prompts: Sequence[Sequence[int]], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as int32 rows with padding on the right, and which tokens count.

    Rows have 16, 32, 64, ... tokens, or `most`: programs are made for few lengths.
    """
    longest, width = max(len(prompt) for prompt in prompts), 16
    while width < longest:
        width *= 2
    width = max(min(width, most), longest)
    rows = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])
    return rows, np.arange(width)[None] < lengths[:, None]


def read_writing(folder: Path, config: Mapping[str, Any], model: Writer) -> Writing:
    """Returns what generation_config.json, or where it is not there config.json, says of how a model writes.

    Raises:
        ModelError: it names what is no token.
        CheckpointError: the file is broken.
    """
    path = folder / "generation_config.json"
    said = read_object(path, "config", _MOST_BYTES, unique=False) if path.is_file() else {}
    where = path if said else folder / "config.json"
    said, vocab_size = {**config, **said}, model.config.vocab_size

    def tokens(key: str, value: Any, *, read: bool = True) -> tuple[int, ...]:
        """A list of tokens; those that are only to be watched for, and not read, may be outside the vocabulary."""
        values = [] if value is None else value if isinstance(value, list) else [value]
        for token in values[: _MOST_TOKENS + 1]:
            number = isinstance(token, int) and not isinstance(token, bool)
            if not number or (read and not 0 <= token < vocab_size):
                raise ModelError(f"{where}: {key} has {repr(token)[:32]}; expected a token from 0 to {vocab_size - 1}.")
        if len(values) > _MOST_TOKENS:
            raise ModelError(f"{where}: {key} has {len(values)} tokens; more than {_MOST_TOKENS} are not believed.")
        return tuple(token for token in values if 0 <= token < vocab_size)

    banned, begin = said.get("suppress_tokens"), said.get("begin_suppress_tokens")
    bad = said.get("bad_words_ids")
    alone = [words[0] for words in bad if isinstance(words, list) and len(words) == 1] if isinstance(bad, list) else []
    common = Writing(
        stop=tokens("eos_token_id", said.get("eos_token_id"), read=False),
        banned=tokens("suppress_tokens", banned, read=False) + tokens("bad_words_ids", alone, read=False),
        banned_first=tokens("begin_suppress_tokens", begin, read=False),
    )
    if model.reads == "prompt":
        return common
    given = said.get("decoder_start_token_id")
    first = tokens("decoder_start_token_id", said.get("bos_token_id") if given is None else given)[:1]
    forced = tokens("forced_bos_token_id", said.get("forced_bos_token_id"))
    languages, task = (), ()
    if isinstance(said.get("lang_to_id"), dict):  # Whisper's multilingual checkpoints
        languages = tokens("lang_to_id", list(said["lang_to_id"].values()))
        tasks = said.get("task_to_id")
        transcribe = tasks.get("transcribe") if isinstance(tasks, dict) else None
        task = tokens("task_to_id", transcribe) + tokens("no_timestamps_token_id", said.get("no_timestamps_token_id"))
    elif isinstance(said.get("forced_decoder_ids"), list):
        pairs = [pair for pair in said["forced_decoder_ids"] if isinstance(pair, list) and len(pair) == 2]
        places = [place for place, _ in pairs]
        if places != list(range(1, 1 + len(said["forced_decoder_ids"]))):
            raise ModelError(
                f"{where}: forced_decoder_ids is {str(said['forced_decoder_ids'])[:64]}; expected [place, token] with "
                "places 1, 2, ..."
            )
        forced += tokens("forced_decoder_ids", [token for _, token in pairs])
    elif said.get("no_timestamps_token_id") is not None:  # and those for English
        forced += tokens("no_timestamps_token_id", said["no_timestamps_token_id"])
    first = (first or model.writing.first) + forced
    return dataclasses.replace(common, first=first, languages=languages, task=task)
