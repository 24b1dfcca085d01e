"""Perplexity and comparison against their definitions in NumPy."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.models.small import random_decoder
from trustcore import evaluation
from trustcore.errors import EvaluationError
from trustcore.evaluation import compare, perplexity


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


IDS = np.random.default_rng(0).integers(0, 96, 150).tolist()


class Bos:
    """A tokenizer whose texts begin with token 7."""

    bos_id = 7

    def encode(self, text):
        return [7, *(ord(char) % 96 for char in text)]


@pytest.fixture(scope="module")
def model():
    return random_decoder()


def logits(model, chunk):
    return np.asarray(model(np.array([chunk])), np.float64)[0]


def losses(model, ids, context, bos=None):
    """By the definition: chunks apart, the first token replaced, the second half counts."""
    found = []
    for start in range(0, len(ids) - context + 1, context):
        chunk = ids[start : start + context]
        seen = chunk if bos is None else [bos, *chunk[1:]]
        scores = log_softmax(logits(model, seen))
        found += [-scores[i, chunk[i + 1]] for i in range(context // 2, context - 1)]
    return np.array(found)


@pytest.mark.parametrize("context", [32, 33, 75])
def test_perplexity_is_what_it_says(model, context):
    found, expected = perplexity(model, IDS, context=context), losses(model, IDS, context)
    assert found.perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-5)
    assert found.error == pytest.approx(found.perplexity * expected.std() / np.sqrt(len(expected) - 1), rel=1e-4)
    assert (found.scored, found.tokens, found.chunks) == (len(expected), 150, 150 // context)


def test_a_text_is_read_after_bos_chunk_by_chunk(model):
    model = random_decoder()
    model.tokenizer = Bos()
    text = "".join(chr(i) for i in IDS)
    expected = losses(model, [7, *IDS], 32, bos=7)
    assert perplexity(model, text, context=32).perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-5)
    plain = losses(model, [7, *IDS], 32)
    assert np.exp(plain.mean()) != pytest.approx(np.exp(expected.mean()), rel=1e-4)


def test_a_stride_gives_every_token_a_long_past(model):
    context, stride = 32, 8
    length, expected = context + stride // 2, []
    for start in range(0, len(IDS) - length, stride):
        chunk = IDS[start : start + length]
        scores = log_softmax(logits(model, chunk))
        expected += [-scores[i, chunk[i + 1]] for i in range(length - stride - 1, length - 1)]
    found = perplexity(model, IDS, context=context, stride=stride)
    assert (found.perplexity, found.scored) == (pytest.approx(np.exp(np.mean(expected)), rel=1e-5), len(expected))


def test_logits_are_made_in_blocks(model, monkeypatch):
    whole = perplexity(model, IDS, context=50), compare(model, random_decoder(seed=1), IDS, context=50)
    monkeypatch.setattr(evaluation, "LOGITS", 96 * 7)
    jax.clear_caches()
    blocks = perplexity(model, IDS, context=50), compare(model, random_decoder(seed=1), IDS, context=50)
    assert blocks[0].perplexity == pytest.approx(whole[0].perplexity, rel=1e-5)
    assert blocks[1].kl_divergence == pytest.approx(whole[1].kl_divergence, rel=1e-5)


def test_compare(model):
    other, context = random_decoder(seed=1), 50
    found = compare(model, other, IDS, context=context)
    kl, same, largest = [], [], []
    for start in range(0, 150, context):
        a, b = (logits(m, IDS[start : start + context])[context // 2 : context - 1] for m in (model, other))
        p, q = log_softmax(a), log_softmax(b)
        kl += list((np.exp(p) * (p - q)).sum(-1))
        same += list(a.argmax(-1) == b.argmax(-1))
        largest.append(np.abs(a - b).max())
    assert found.kl_divergence == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.kl_max == pytest.approx(np.max(kl), rel=1e-4)
    assert found.top1_agreement == pytest.approx(np.mean(same))
    assert found.max_logit_difference == pytest.approx(np.max(largest), rel=1e-4)
    assert found.first.perplexity == pytest.approx(perplexity(model, IDS, context=context).perplexity, rel=1e-5)
    assert found.second.perplexity == pytest.approx(perplexity(other, IDS, context=context).perplexity, rel=1e-5)


def test_a_model_does_not_differ_from_itself(model):
    found = compare(model, model, IDS, context=50)
    assert (found.kl_divergence, found.top1_agreement, found.max_logit_difference) == (0, 1, 0)


def test_one_program_reads_all_chunks(model):
    seen = []
    perplexity(model, IDS, context=24, progress=lambda *step: seen.append(step))
    before = evaluation._losses._cache_size()
    perplexity(model, IDS, context=24)
    assert evaluation._losses._cache_size() == before and seen == [(i + 1, 6) for i in range(6)]


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        (IDS, {"context": 100}, "the text has 150 tokens; a context of 100 needs at least 200"),
        (IDS, {"context": 148, "stride": 8}, "a context of 148 with a stride of 8 needs at least 153"),
        (IDS, {"context": 2}, "the context is 2; it must be an integer of at least 4"),
        (IDS, {"context": 32, "stride": 32}, "the stride is 32; it must be between 1 and the context, 32"),
        ([*IDS, 96], {"context": 32}, "token ids reach from 0 to 96; expected 0 to 95"),
        ("a text", {}, "the model has no tokenizer; give token ids"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, ids, options, words):
    with pytest.raises(EvaluationError, match=words):
        perplexity(model, ids, **options)


def test_models_of_different_vocabularies_do_not_compare(model):
    other = random_decoder(dataclasses.replace(model.config, vocab_size=97))
    with pytest.raises(EvaluationError, match="the models have 96 and 97 tokens"):
        compare(model, other, IDS, context=32)
    with pytest.raises(EvaluationError, match="a model has no tokenizer"):
        compare(model, model, "a text", context=32)
