"""Text in, text out: pieces, stop strings, batches, statistics, chat."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trustcore as tc
from tests.generation.characters import ByteTokenizer, byte_model
from trustcore.errors import GenerationError
from trustcore.generation.stream import Answer


@pytest.fixture(scope="module")
def model():
    return byte_model()


def pieces(text, stop=(), chunk=3):
    answer = Answer(ByteTokenizer(), stop, frozenset({257}))
    ids = list(text.encode())
    out = [answer.add(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    return [*out, answer.end("length")], answer


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), chunk=st.integers(1, 7))
def test_pieces_never_split_a_character_and_join_to_the_text(text, chunk):
    found, answer = pieces(text, chunk=chunk)
    assert "".join(found) == answer.text == text
    assert "\ufffd" not in "".join(found) or "\ufffd" in text


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abé", max_size=25),
    stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    chunk=st.integers(1, 5),
)
def test_stop_strings_end_the_text_before_themselves(text, stop, chunk):
    found, answer = pieces(text, stop, chunk)
    places = [text.find(s) for s in stop if s in text]
    joined = "".join(found)
    assert joined == answer.text
    assert not any(s in joined for s in stop)
    if places:
        assert answer.finish_reason == "stop" and text.startswith(joined)
        # The stop string that is complete first in time wins: nothing after the first completed one is released.
        assert len(joined) <= min(text.find(s) + len(s) for s in stop if s in text)
    else:
        assert joined == text and answer.finish_reason == "length"


def test_nothing_that_may_begin_a_stop_string_is_released():
    answer = Answer(ByteTokenizer(), ("END",), frozenset())
    assert answer.add(b"abE") == "ab"
    assert answer.add(b"N") == ""
    assert answer.add(b"x") == "ENx"
    assert answer.add(b"END and more") == "" and answer.finish_reason == "stop"


def test_a_stop_token_is_counted_but_not_shown():
    answer = Answer(ByteTokenizer(), (), frozenset({257}))
    assert answer.add([104, 105, 257, 104]) == "hi"
    assert answer.finish_reason == "stop" and answer.tokens == [104, 105, 257]


def test_strings_lists_and_ids_agree(model):
    one = tc.generate(model, "hello", max_tokens=12)
    assert isinstance(one, str)
    ids = model.tokenizer.encode("hello")
    assert tc.generate(model, ids, max_tokens=12) == one == tc.generate(model, np.array(ids), max_tokens=12)
    assert tc.generate(model, ["hello", "a longer prompt"], max_tokens=12)[0] == one
    assert tc.generate(model, [ids], max_tokens=12) == [one]


def test_a_stream_gives_the_same_text_and_tells_what_it_cost(model):
    whole = tc.generate(model, "hello", max_tokens=40)
    stream = tc.generate(model, "hello", max_tokens=40, stream=True)
    assert isinstance(stream, tc.Stream) and stream.finish_reason is None
    assert "".join(stream) == whole == stream.text
    stats = stream.stats
    assert (stats.prompt_tokens, stats.generated_tokens) == (6, len(stream.tokens))
    assert stream.finish_reason in ("stop", "length")
    assert stats.first_token_seconds > 0 and stats.decode_seconds > 0
    assert stats.decode_tokens_per_second == (stats.generated_tokens - 1) / stats.decode_seconds
    assert stats.prefill_tokens_per_second == 6 / stats.first_token_seconds


def test_a_stream_can_be_closed(smollm2):
    stream = tc.generate(smollm2, "hello", max_tokens=60, stream=True, ignore_eos=True)
    first = next(stream)
    stream.close()
    assert list(stream) == [] and stream.finish_reason == "closed" and stream.text.startswith(first)


def test_stop_strings_in_a_batch(model):
    free = tc.generate(model, ["hello", "good day"], max_tokens=30)
    stop = free[0][4:6]
    ended = tc.generate(model, ["hello", "good day"], max_tokens=30, stop=stop)
    for text, full in zip(ended, free, strict=True):
        assert text == full.split(stop)[0]


def test_chat_renders_the_conversation(model):
    messages = [{"role": "user", "content": "hi"}]
    rendered = "user: hi\nassistant: "
    assert tc.chat(model, messages, max_tokens=8) == tc.generate(model, rendered, max_tokens=8)
    assert "".join(tc.chat(model, messages, max_tokens=8, stream=True)) == tc.chat(model, messages, max_tokens=8)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    (
        (7, {}, "prompt is a int; pass a string"),
        (b"hi", {}, "prompt is a bytes"),
        (["a", 3], {}, "prompt is a list"),
        (["a", "b"], {"stream": True}, "stream=True takes one prompt"),
        ("a", {"stop": [3]}, r"stop is \[3\]"),
        ("a", {"temperature": -1}, "temperature is -1"),
    ),
)
def test_errors(model, prompt, options, message):
    with pytest.raises(GenerationError, match=message):
        tc.generate(model, prompt, **options)


def test_a_model_without_a_tokenizer_says_so():
    model = byte_model()
    model.tokenizer = None
    with pytest.raises(
        GenerationError, match=r"no tokenizer; put its tokenizer.json beside the weights, set model.tokenizer"
    ):
        tc.generate(model, "a")


def test_the_demo_model_answers(smollm2):
    assert tc.generate(smollm2, "The capital of France is", max_tokens=2) == " Paris."
    answers = tc.generate(smollm2, ["The capital of France is", "Two plus two is"], max_tokens=8, stop=".")
    assert answers[0] == " Paris"
    reply = tc.chat(smollm2, [{"role": "user", "content": "What is the capital of France?"}], max_tokens=24)
    assert "Paris" in reply and "<|im_end|>" not in reply


def test_greedy_text_equals_llama_cpp_in_float32(smollm2):
    """End to end: prompt text in, 64 tokens out, against the recorded continuations without a near-tie."""
    prompts = json.loads((Path(__file__).parents[1] / "data" / "smollm2_f32_greedy.json").read_text())["prompts"]
    for prompt in prompts[:4]:
        assert min(prompt["gaps"]) > 0.005
        stream = tc.generate(
            smollm2, prompt["text"], max_tokens=64, stream=True, ignore_eos=True, parse_special=prompt["parse_special"]
        )
        text = "".join(stream)
        assert stream.tokens == prompt["ids"]
        assert text.startswith(prompt["continuation"])


def test_generated_characters_are_whole(smollm2):
    stream = tc.generate(smollm2, "Some emoji: 😀 🎉 🚀 ", max_tokens=24, stream=True, ignore_eos=True)
    parts = list(stream)
    assert all("\ufffd" not in part for part in parts[:-1])
