"""The loop against the model called by hand, and what callers may ask of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generation.characters import byte_model
from trustcore._jax import program_count
from trustcore.errors import GenerationError
from trustcore.generation import Sampling, engine, generate_tokens


@pytest.fixture(scope="module")
def model():
    return byte_model()


def by_hand(model, prompt, count):
    ids, call = list(prompt), jax.jit(lambda model, tokens: model(tokens))
    for _ in range(count):
        padded = jnp.asarray([ids + [0] * (64 - len(ids))], jnp.int32)  # one program; attention is causal
        ids.append(int(call(model, padded)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def run(model, prompts, **options):
    steps = list(generate_tokens(model, prompts, **options))
    return np.concatenate([step.tokens for step in steps], axis=1)


def test_greedy_tokens_equal_the_model_called_by_hand(model):
    prompts = [[5, 80, 3], [7], [*range(40)]]
    tokens = run(model, prompts, max_tokens=9)
    assert tokens.tolist() == [by_hand(model, p, 9) for p in prompts]


def test_a_row_does_not_depend_on_its_batch(model):
    prompts = [[5, 80, 3], [9, 9, 9, 9, 9]]
    together = run(model, prompts, max_tokens=12, sampling=Sampling(temperature=1.0), seed=4)
    alone = run(model, prompts[:1], max_tokens=12, sampling=Sampling(temperature=1.0), seed=4)
    assert together[0].tolist() == alone[0].tolist()


def test_long_prompts_go_in_chunks(model, monkeypatch):
    prompt = np.random.default_rng(0).integers(0, 256, 70).tolist()
    whole = run(model, [prompt, [3]], max_tokens=6)
    monkeypatch.setattr(engine, "CHUNKS", (16, 32))
    assert engine._chunks(70) == [32, 32, 16]
    assert run(model, [prompt, [3]], max_tokens=6).tolist() == whole.tolist()


def test_stop_ids_end_a_row_and_the_others_go_on(model):
    prompts = [[5, 80, 3], [7]]
    free = run(model, prompts, max_tokens=10)
    stop = int(free[0, 3])
    tokens = run(model, prompts, max_tokens=10, stop_ids=[stop])
    for row, unstopped in zip(tokens, free, strict=True):
        end = unstopped.tolist().index(stop) + 1 if stop in unstopped else 10
        assert row[:end].tolist() == unstopped[:end].tolist()
        assert (row[end:] == -1).all()


def test_rows_can_be_ended_from_outside(model):
    steps = generate_tokens(model, [[5], [6]], max_tokens=30)
    next(steps)
    rest = [steps.send(np.array([True, False]))]
    rest += list(steps)
    tokens = np.concatenate([step.tokens for step in rest], axis=1)
    assert (tokens[0] == -1).all() and (tokens[1] >= 0).all()


def test_the_seed_decides_the_text_and_the_dispatch_does_not(model, monkeypatch):
    options = {"max_tokens": 20, "sampling": Sampling(temperature=1.5, top_k=50)}
    once, again, other = (run(model, [[5, 6]], seed=s, **options).tolist() for s in (1, 1, 2))
    assert once == again != other
    monkeypatch.setattr(engine, "PAUSE", 0.0)  # one token a dispatch
    assert run(model, [[5, 6]], seed=1, **options).tolist() == once


def test_sampling_options_reach_the_device(model):
    hot = Sampling(temperature=5.0, top_k=1)
    assert run(model, [[5, 6]], max_tokens=8, sampling=hot).tolist() == run(model, [[5, 6]], max_tokens=8).tolist()
    never = Sampling(presence_penalty=1e6)
    tokens = run(model, [[5, 6]], max_tokens=40, sampling=never)[0].tolist()
    assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize("dtype", ("bfloat16", "int8", "fp8", "int4"))
def test_narrow_caches_choose_nearly_the_same(model, dtype):
    prompt = [[5, 80, 3, 9, 1, 7]]
    wide, narrow = run(model, prompt, max_tokens=8), run(model, prompt, max_tokens=8, cache_dtype=dtype)
    assert wide[0, 0] == narrow[0, 0]
    assert (wide == narrow).mean() >= 0.5


def test_the_context_bounds_what_is_made(model):
    assert run(model, [[1] * 10], max_tokens=50, context=16).shape == (1, 6)
    assert run(model, [[1] * 120], max_tokens=50).shape == (1, 8)  # the model's own context: 128


def test_programs_are_shared_between_requests(model):
    """The trace count is what a second request must not raise."""
    list(generate_tokens(model, [[5, 6]], max_tokens=5))
    before = [program_count(f) for f in (engine._prefill, engine._decode, engine._first)]
    for sampling in (Sampling(), Sampling()):
        list(generate_tokens(model, [[9, 8, 7]], max_tokens=40, sampling=sampling, seed=3))
    assert [program_count(f) for f in (engine._prefill, engine._decode, engine._first)] == before
    warm = Sampling(temperature=0.5, top_p=0.9)
    list(generate_tokens(model, [[5, 6]], max_tokens=5, sampling=warm))
    before = program_count(engine._decode)
    list(generate_tokens(model, [[5, 6]], max_tokens=5, sampling=Sampling(temperature=0.6, top_p=0.8)))
    assert program_count(engine._decode) == before


@pytest.mark.parametrize(("length", "chunks"), ((1, [16]), (16, [16]), (17, [32]), (512, [512]), (513, [512, 16])))
def test_chunks(length, chunks):
    assert engine._chunks(length) == chunks


def test_slots_are_few_and_large_enough():
    sizes = {engine._slots(n, 100, 1) for n in range(1, 4000)}
    assert all(engine._slots(n, 100, 1) >= n + 100 for n in range(1, 4000))
    assert sizes == {1024, 1536, 2048, 3072, 4096, 6144}
    assert [engine._slots(10, 100, batch) for batch in (1, 2, 3, 4, 8)] == [1024, 512, 256, 256, 256]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    (
        ([], {}, "there are no prompts"),
        ([[]], {}, "the prompt is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 128], {}, "the prompt has 128 tokens and the context is 128; shorten it"),
        ([[1] * 20], {"context": 16}, "20 tokens and the context is 16; shorten it or pass context up to 128"),
        ([[1, 260]], {}, r"the prompt has token ids outside 0 \.\. 259"),
        ([[-1]], {}, "outside 0"),
        ([[1]], {"max_tokens": 0}, "max_tokens is 0"),
        ([[1]], {"max_tokens": True}, "max_tokens is True"),
        ([[1]], {"context": "long"}, "context is 'long'"),
        ([[1]], {"cache_dtype": "int3"}, "cache_dtype is 'int3'; choose from float32, bfloat16, int8, fp8, int4"),
        ([[1]], {"cache_dtype": "float64"}, "cache_dtype is 'float64'"),
    ),
)
def test_errors(model, prompts, options, message):
    with pytest.raises(GenerationError, match=message):
        list(generate_tokens(model, prompts, **options))
