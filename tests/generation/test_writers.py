"""Generation of encoder-decoders and state spaces: transformers' greedy tokens, sound, texts, and what is refused."""

import json
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import trustcore
from tests.models import families
from trustcore.cli import main
from trustcore.errors import CheckpointError, GenerationError, ModelError
from trustcore.generation import Sampling, generate_tokens
from trustcore.models import model_from_checkpoint
from trustcore.models.writing import Writing, read_writing
from trustcore.weights import open_checkpoint

CASES = json.loads((Path(__file__).parents[1] / "data" / "generated.json").read_text())["cases"]


def opened(name, folder, **generation):
    case = families.read(name)
    case.write(folder)
    (folder / "generation_config.json").write_text(json.dumps({**CASES[name]["generation_config"], **generation}))
    with open_checkpoint(folder) as checkpoint:
        return model_from_checkpoint(checkpoint, dtype="float32"), case


def run(model, prompts, **options):
    steps = list(generate_tokens(model, prompts, stop_ids=model.writing.stop, **options))
    tokens = np.concatenate([step.tokens for step in steps], axis=1)
    return [[int(token) for token in row if token >= 0] for row in tokens]


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_of_transformers(tmp_path, name):
    """All rows as one batch, of different lengths; the record has them one by one."""
    model, case = opened(name, tmp_path)
    frames = case.inputs.get("frames")
    prompts = CASES[name]["prompts"] if frames is None else list(frames.transpose(0, 2, 1))
    expected = CASES[name]["tokens"]
    assert run(model, prompts, max_tokens=max(len(row) for row in expected)) == expected


@pytest.mark.parametrize("name", ("mamba", "mamba2", "t5"))
def test_long_prompts_and_single_rows(tmp_path, name, monkeypatch):
    """A state goes from chunk to chunk, frozen in rows that have ended; a row does not depend on its batch."""
    monkeypatch.setattr("trustcore.generation.engine.CHUNKS", (16, 32))
    model, _ = opened(name, tmp_path)
    prompts = [np.random.default_rng(0).integers(5, 64, 70).tolist(), [7, 9, 11], [8] * 33]
    together = run(model, prompts, max_tokens=8)
    if name == "t5":
        assert run(model, prompts[:1], max_tokens=8) == together[:1]
        return
    for prompt, tokens in zip(prompts, together, strict=True):
        logits = families.jitted(model, jnp.asarray([prompt + tokens[:-1]], jnp.int32))[0]
        assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == tokens


def test_sampling_and_forbidden_tokens(tmp_path):
    model, _ = opened("bart", tmp_path, suppress_tokens=[53, 44])
    prompts = CASES["bart"]["prompts"]
    hot = run(model, prompts, max_tokens=40, sampling=Sampling(temperature=3.0), seed=2)
    assert not {53, 44} & {token for row in hot for token in row}
    assert hot == run(model, prompts, max_tokens=40, sampling=Sampling(temperature=3.0), seed=2)
    assert {token for row in run(model, prompts, max_tokens=5, only=[6, 8]) for token in row} <= {6, 8}
    # What the decoder begins with is not yielded, and counts.
    begun = run(model, prompts, max_tokens=4, first=[2, 7])
    assert run(model, prompts, max_tokens=3, first=[[2, 7, row[0]] for row in begun]) == [row[1:] for row in begun]


def sound(seconds):
    return np.sin(np.arange(int(16000 * seconds)) * 0.2).astype(np.float32)


def test_sounds_are_cut_and_their_texts_joined(tmp_path):
    """Sixteen positions of two frames of 160 samples: 5120 at once."""
    model, _ = opened("whisper", tmp_path)
    unigram(tmp_path)
    model.tokenizer = trustcore.Tokenizer.from_file(tmp_path)
    long = np.concatenate([sound(0.32), -0.5 * sound(0.3)])
    parts = [trustcore.generate(model, part, max_tokens=5) for part in (long[:5120], long[5120:])]
    assert trustcore.generate(model, long, max_tokens=5) == "".join(parts)
    assert trustcore.generate(model, [long, sound(0.1)], max_tokens=5)[0] == "".join(parts)
    assert "".join(trustcore.generate(model, long[:5120], max_tokens=5, stream=True)) == parts[0]
    with pytest.raises(GenerationError, match="no more than the model reads at once"):
        trustcore.generate(model, long, stream=True)
    with pytest.raises(GenerationError, match=r"the sound is int64\[3\]; this model reads samples as floats"):
        trustcore.generate(model, [1, 2, 3])
    with pytest.raises(ModelError, match=r"expected up to 5120 samples, or log-mel frames \[32, 8\]"):
        list(generate_tokens(model, [long]))


def test_the_language_is_heard(tmp_path):
    ids = {"<|en|>": 21, "<|de|>": 22, "<|fr|>": 23}
    said = {"lang_to_id": ids, "task_to_id": {"transcribe": 30}, "no_timestamps_token_id": 31}
    model, _ = opened("whisper", tmp_path, **said)
    assert model.writing.languages == (21, 22, 23) and model.writing.task == (30, 31)
    unigram(tmp_path)
    model.tokenizer = trustcore.Tokenizer.from_file(tmp_path)
    whole = np.pad(sound(0.3), (0, 5120 - 4800))
    memory = model.encode(jnp.asarray(model.encoder_input([whole])[0]))
    logits, _ = model.decode(jnp.asarray([[2]], jnp.int32), model.start(memory, slots=4))
    heard = 21 + int(np.argmax(logits[0, 0, 21:24]))
    told = trustcore.generate(model, sound(0.3), max_tokens=4, first=[2, heard, 30, 31])
    assert trustcore.generate(model, sound(0.3), max_tokens=4) == told


def unigram(folder):
    """SentencePiece's kind of tokenizer, as T5's tokenizer.json has it."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    alphabet = [*"abcdefghijklmnopqrstuvwxyz", "ab", "cd", "de", "an"]
    pieces += [(start + letter, -3.0 - i / 10) for i, letter in enumerate(alphabet) for start in ("", "\u2581")]
    made = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    return made


@pytest.mark.parametrize("name", ("t5", "mamba"))
def test_a_folder_with_its_tokenizer(tmp_path, name, capsys):
    model, _ = opened(name, tmp_path)
    made = unigram(tmp_path)
    loaded = trustcore.load(tmp_path)
    ids = made.encode("b dab").ids
    tokens = run(model, [ids if name == "t5" else loaded.tokenizer.encode("b dab")], max_tokens=6)[0]
    text = trustcore.generate(loaded, "b dab", max_tokens=6)
    assert text == loaded.tokenizer.decode(tokens, continuation=name == "mamba")
    with pytest.raises(SystemExit) as left:
        main(("generate", str(tmp_path), "b dab", "--max-tokens", "6"))
    assert left.value.code == 0 and capsys.readouterr().out.strip() == text.strip() != ""


@pytest.mark.parametrize(
    ("name", "prompts", "options", "message"),
    (
        ("bart", [[5] * 21], {}, "the prompt has 21 tokens, and the model reads 20; shorten it"),
        ("bart", [[5], []], {}, "prompt 1 is empty"),
        ("t5", [[64]], {}, r"outside 0 \.\. 63"),
        ("t5", [[5]], {"first": [64]}, r"first is \[64\]; expected tokens from 0 to 63, or as many for each of 1 rows"),
        ("t5", [[5], [6]], {"first": [[0], [0, 1]]}, "expected tokens from 0 to 63"),
        ("t5", [[5]], {"only": []}, r"only is \[\]"),
        ("t5", [[5]], {"cache_dtype": "int8"}, "a T5 has no choice of it"),
        ("mamba", [[5]], {"first": [1]}, "what this model begins with is its prompt"),
        ("bert", [[5]], {}, "a Bert writes no tokens"),
    ),
)
def test_what_is_refused(tmp_path, name, prompts, options, message):
    model = families.read(name).open(tmp_path)
    with pytest.raises(GenerationError, match=message):
        list(generate_tokens(model, prompts, **options))


def test_an_encoder_alone_writes_nothing(tmp_path):
    case = families.read("t5")
    weights = {key: array for key, array in case.weights.items() if not key.startswith("decoder.")}
    model = families.Case(case.config, weights, {}, {}).open(tmp_path)
    with pytest.raises(ModelError, match="an encoder alone"):
        list(generate_tokens(model, [[5]]))


def test_what_checkpoints_say(tmp_path):
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(vocab_size=10), reads="text", writing=Writing(first=(0,))
    )
    config = {"decoder_start_token_id": 5, "eos_token_id": 2, "forced_decoder_ids": [[1, 7], [2, 8]]}
    assert read_writing(tmp_path, config, model) == Writing(first=(5, 7, 8), stop=(2,))
    said = {
        "eos_token_id": [3, 4],
        "bad_words_ids": [[6], [7, 8]],
        "forced_decoder_ids": None,
        "forced_bos_token_id": 9,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert read_writing(tmp_path, config, model) == Writing(first=(5, 9), stop=(3, 4), banned=(6,))
    for wrong, message in (
        ({"decoder_start_token_id": 10}, "decoder_start_token_id has 10; expected a token from 0 to 9"),
        ({"eos_token_id": "a"}, "eos_token_id has 'a'; expected"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens has 'a'; expected"),
        ({"suppress_tokens": [0] * 70000}, "70000 tokens; more than 65536"),
        ({"forced_decoder_ids": [[2, 1]]}, "expected .place, token. with places 1, 2"),
        ({"lang_to_id": {"a": -1}}, "lang_to_id has -1"),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ModelError, match=message):
            read_writing(tmp_path, {}, model)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [10, -1, 3]}))
    assert read_writing(tmp_path, {}, model) == Writing(first=(0,), stop=(3,))
    model.reads = "prompt"
    assert read_writing(tmp_path, {"decoder_start_token_id": 99}, model) == Writing(first=(), stop=(3,))
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError):
        read_writing(tmp_path, {}, model)
