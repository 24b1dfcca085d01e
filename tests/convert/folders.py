"""Models on disk that conversion starts from: a GGUF file, and a folder of Hugging Face's with a tokenizer."""

import dataclasses
import json

from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference

from tests.models.small import CONFIG, random_decoder, write_as_gguf, write_as_hugging_face
from trustcore.ops.rope import RopeConfig

# Every matrix is [256, 256]: K-quants take it, and one program packs them all.
SQUARE = dataclasses.replace(
    CONFIG, vocab_size=256, features=256, layers=1, heads=4, kv_heads=4, head_dim=64, hidden=256,
    rope=RopeConfig(64, theta=1e4, interleaved=True, original_context=128),
)  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["Hello, world! It's 1234 words, isn't it?\n\n  def f(x):\n\treturn x", "Привет, мир! 你好 😀 naïve café"] * 4
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def square_gguf(path, seed=0):
    model = random_decoder(SQUARE, seed)
    write_as_gguf(path, model)
    return model


def byte_level(pattern=None, digits=False, ignore_merges=False):
    """A byte-level BPE tokenizer that cuts words by `pattern`, or as GPT-2 does."""
    tokenizer = Reference(models.BPE(ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    first = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    first += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def write_tokenizer(folder, tokenizer, *, bos=None, **config):
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": "<|im_end|>", **config}))


def hugging_face_folder(folder, config=CONFIG, **changes):
    """A Llama of that shape with 300 tokens and rows for 320. Returns the module that was written."""
    config = dataclasses.replace(config, vocab_size=320)
    model = random_decoder(config, 1)
    write_as_hugging_face(folder, model)
    if changes:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    write_tokenizer(folder, byte_level(digits=True), bos="<|im_start|>", chat_template="{{ messages }}")
    return model
