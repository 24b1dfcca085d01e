"""Text in, text out: `generate` continues a prompt or answers what an encoder reads, `chat` answers a conversation.

Of a model that reads sound, `generate` gives what was said: sounds are cut into as many pieces as they need, each as
long as the model reads, all pieces run as one batch, and their texts follow each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np

from trustcore.errors import GenerationError
from trustcore.generation.engine import generate_tokens
from trustcore.generation.sampling import Sampling
from trustcore.generation.sound import heard, pieces_of
from trustcore.generation.stream import Answer, Stream, run_batch
from trustcore.memory import Pool
from trustcore.models.writing import Writer

Prompt = str | Sequence[int]


class Options(TypedDict, total=False):
    """Options of `generate` and `chat`; see there."""

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int
    stop: str | Sequence[str]
    context: int | None
    cache_dtype: Any
    ignore_eos: bool
    parse_special: bool
    first: Sequence[Any] | None
    pool: Pool | None


@overload
def generate(model: Any, prompt: Prompt, *, stream: Literal[True], **options: Unpack[Options]) -> Stream: ...
@overload
def generate(model: Any, prompt: str, *, stream: Literal[False] = False, **options: Unpack[Options]) -> str: ...
@overload
def generate(
    model: Any, prompt: Sequence[Any], *, stream: Literal[False] = False, **options: Unpack[Options]
) -> Any: ...
def generate(
    model: Any,
    prompt: Any,
    *,
    stream: bool = False,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    context: int | None = None,
    cache_dtype: Any = None,
    ignore_eos: bool = False,
    parse_special: bool = False,
    first: Sequence[Any] | None = None,
    pool: Pool | None = None,
) -> Any:
    """Returns the text that follows the prompt; of an encoder-decoder, what it writes about it.

    Args:
        model: as `trustcore.load` returns it.
        prompt: a string, or token ids; or several strings (or lists of ids), which run as one batch. For Whisper: a
            sound as an array of samples, mono, 16000 a second; or several.
        stream: return a `Stream` of pieces as they arrive (one prompt only).
        max_tokens: of the answer, at most.
        temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty: see `Sampling`;
            by default the likeliest token is taken.
        seed: the same seed gives the same text.
        stop: strings that end the answer; they are not part of it.
        context: tokens that prompt and answer may have together; None: what the model was made for.
        cache_dtype: float32, bfloat16, int8, fp8 or int4 for the key-value cache; None chooses.
        ignore_eos: go on after the model's own end tokens.
        parse_special: read "<|im_end|>" and the like in the prompt as the tokens of that name. Off by default: what a
            user typed must not speak with the voice of the system.
        first: tokens that an encoder-decoder's decoder begins with, such as a language's; None: what the checkpoint
            says, and for Whisper the language that it hears.
        pool: where the cache's buffers come from and go (`trustcore.memory.Pool`), so that many answers share them.

    Returns:
        A string, a list of strings for several prompts, or a `Stream`.

    Raises:
        GenerationError: the prompt is empty or does not fit the context, or an option is out of range.

    Example:
        >>> model = trustcore.load("smollm2")  # doctest: +SKIP
        >>> trustcore.generate(model, "The capital of France is", max_tokens=4)  # doctest: +SKIP
        ' Paris.\\n\\n'
    """
    tokenizer = _tokenizer(model)
    reads = model.reads if isinstance(model, Writer) else "prompt"
    if reads == "sound":
        ids, counts, several = pieces_of(prompt, model.limits[0])
        first = heard(model, ids) if first is None else first
    else:
        prompts, several = _prompts(prompt)
        ids = [
            tokenizer.encode(p, parse_special=parse_special) if isinstance(p, str) else [int(i) for i in p]
            for p in prompts
        ]
        counts = [1] * len(ids)
        if isinstance(prompt, str) and not ids[0] and tokenizer.bos_id is not None:
            ids[0] = [tokenizer.bos_id]  # an empty prompt: whatever the model begins with
    if len(ids) > 1 and stream:
        raise GenerationError("stream=True takes one prompt, and of sound no more than the model reads at once.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) for s in stops):
        raise GenerationError(f"stop is {stop!r}; it must be a string or several strings.")
    own = model.writing.stop if isinstance(model, Writer) else ()
    stop_ids = frozenset() if ignore_eos else frozenset(tokenizer.stop_ids) | frozenset(own)
    steps = generate_tokens(
        model,
        ids,
        max_tokens=max_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty),
        stop_ids=stop_ids,
        seed=seed,
        context=context,
        cache_dtype=cache_dtype,
        first=first,
        pool=pool,
    )
    answers = [Answer(tokenizer, stops, stop_ids, continuation=reads == "prompt") for _ in ids]
    if stream:
        return Stream(steps, answers[0], len(ids[0]))
    run_batch(steps, answers)
    written = iter(answer.text for answer in answers)
    texts = ["".join(itertools.islice(written, count)) for count in counts]
    return texts if several else texts[0]


@overload
def chat(
    model: Any, messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Unpack[Options]
) -> Stream: ...
@overload
def chat(
    model: Any, messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Unpack[Options]
) -> str: ...
def chat(model: Any, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Unpack[Options]) -> Any:
    """Returns the model's answer to a conversation, by the chat template of its checkpoint.

    Args:
        model: as `trustcore.load` returns it.
        messages: `{"role": "system" | "user" | "assistant", "content": str}`, in order.
        stream: return a `Stream` of pieces as they arrive.
        **options: as for `generate`.

    Raises:
        GenerationError: as for `generate`.
        TokenizerError: the checkpoint has no chat template, or it refuses the messages.
    """
    tokenizer = _tokenizer(model)
    text = tokenizer.chat(list(messages))
    bos = tokenizer.token(tokenizer.bos_id) if tokenizer.bos_id is not None else ""
    # A template that writes the beginning-of-text token itself must not get a second one.
    ids = tokenizer.encode(text, parse_special=True, add_special=not (bos and text.startswith(bos)))
    return generate(model, ids, stream=True, **options) if stream else generate(model, ids, **options)


def _tokenizer(model: Any) -> Any:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise GenerationError(
            "this model has no tokenizer; put its tokenizer.json beside the weights, set model.tokenizer, or use "
            "trustcore.generate_tokens with token ids."
        )
    return tokenizer


def _prompts(prompt: Any) -> tuple[list[Any], bool]:
    """Returns the prompts as a list, and whether there were several."""
    if isinstance(prompt, str):
        return [prompt], False
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        items = list(prompt)
        if items and all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in items):
            return [items], False
        if all(isinstance(i, str) for i in items) or all(isinstance(i, Sequence) for i in items):
            return items, True
    raise GenerationError(
        f"prompt is a {type(prompt).__name__}; pass a string, token ids, or a list of strings (or of lists of ids)."
    )
