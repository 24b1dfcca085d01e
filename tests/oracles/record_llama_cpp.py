"""Records what llama.cpp makes of texts, prompts and vocabularies, as the fixtures of `tests/data/`.

The oracle is not a test dependency. In a virtual environment of its own (the source build takes about ten minutes):

    pip install llama-cpp-python==0.3.36 gguf==0.19.0
    python tests/oracles/record_llama_cpp.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out tests/data

Files written (each begins with "about": versions, the model's SHA-256, settings):
    smollm2_tokens.json   ids of `TEXTS`, special-token text parsed and not, and what decoding gives back
    smollm2_greedy.json   greedy continuations of 64 tokens, with the log-probability gap to the runner-up
    smollm2_logits.json   the 20 largest logits at several positions of several prompts
    smollm2_f32_greedy.json, smollm2_f32_logits.json
                          the same from the same weights decoded to float32 beforehand, with a float32 cache: llama.cpp
                          then rounds no activation to 8 bits, which it does before every product with a packed weight
    smollm2_chat.json     prompts rendered from the model's chat template and from templates written here
    vocab_bpe.json        one synthetic byte-level vocabulary under every pre-tokenizer
    vocab_spm.json        synthetic SentencePiece vocabularies: scores, ties, byte fallback
    vocab_wpm.json        synthetic WordPiece vocabularies, cased and uncased
A second run with the same versions writes the same ids; logits move in the last digits with the processor.

The file is long because the texts are part of the record: nothing else decides what is compared.
"""

# ruff: noqa: RUF001, SIM905 (the texts are to hold look-alikes; names read better as words than as a page of strings)
from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import platform
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\n\n\n",
    " \n \t\n  ",
    "Hello",
    " Hello",
    "Hello ",
    "  Hello  World  ",
    "Hello, World!",
    "The capital of France is",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they've said it's what you'd do, and we'll see they're right. DON'T SHOUT, IT'S LATE.",
    "It’s a “quoted” sentence — with an em dash… and an ellipsis.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "class A:\n\tdef f(self, *args, **kwargs) -> None:\n\t\tself.x[0] += 1  # trailing\n\n\n",
    "for (int i = 0; i < n; ++i) { a[i] = b[i] * 0x1F; }  // C\r\n\tif (!ok) return -1;\r\n",
    '{"key": [1, 2.5, -3e-7, null, true], "nested": {"a\\n": "\\u00e9"}}',
    "<html><body class='x'>&nbsp;<!-- note --></body></html>",
    "SELECT * FROM t WHERE a_b = 'c' AND d <> 3;",
    "$ pip install foo==1.2.3 && echo \"$HOME\" | grep -v '^#'",
    "x=1;y=2;z=x+y==3",
    "camelCaseName PascalCaseName snake_case_name SCREAMING_SNAKE kebab-case-name HTTPServer2Go",
    "0",
    "1234567890",
    "3.14159 2,718,281.828 1e10 0xdeadbeef 007 12:34:56 2024-02-29",
    "١٢٣ ४५६ ７８９ ½ ² ³ Ⅷ",
    "a1b22c333d4444e55555",
    "   leading",
    "trailing   ",
    "many      inner      spaces",
    "tabs\tand\t\ttabs",
    "line one\nline two\n\nline four\n\n\n\nline eight",
    " \u00a0non-breaking\u00a0space and\u2003em\u2009thin\u3000ideographic\u200bzero-width",
    "你好，世界！",
    "日本語のテキストとカタカナ、ひらがな。",
    "한국어 문장입니다.",
    "中文 English 混合 text１２３。",
    "𠀀𠮷 rare ideographs 㐀",
    "Привет, мир! Ёлка ПРОПИСНЫЕ строчные",
    "Ελληνικά ΚΕΦΑΛΑΙΑ μικρά",
    "مرحبا بالعالم، كيف الحال؟",
    "שלום עולם",
    "नमस्ते दुनिया क्षत्रिय",
    "สวัสดีชาวโลก",
    "Đây là tiếng Việt có dấu",
    "naïve café résumé Ångström Straße ŒUVRE İstanbul ǅ",
    "e\u0301 a\u030a n\u0303 o\u0308\u0304 Z\u0351\u0343\u0346",
    "😀",
    "Emoji: 😀😃🎉 👍🏽 👩‍👩‍👧‍👦 🇫🇷 ❤️ ☕",
    "x😀y 🚀to🌕",
    "math: ∀x∈ℝ, x²≥0 ⇒ √x ≈ 1.41 ± 0.01 × 10⁻³",
    "currency €100 £20 ¥3000 $5 ₹7",
    "!!!???...,,,;;;:::---___",
    "#$%&()*+,-./:;<=>?@[\\]^_`{|}~\"'",
    "a(b)c[d]e{f}g<h>i",
    "(parentheses) [brackets] {braces} ~tilde~ `tick` ^caret^ |pipe|",
    "\x00null\x01ctrl\x1b[0m\x7fdel",
    "replacement \ufffd noncharacter \uffff private \ue000 bom \ufeff soft\u00adhyphen",
    "unassigned \u0378 and \U000e0001 tag \U0010ffff end",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "before<|endoftext|>after <|im_end|> end",
    "<|im_start|><|im_start|><|im_end|>",
    "<|im_start <|im_start| im_start|> <<|im_start|>>",
    "<repo_name>a/b<file_sep>c.py<issue_start>",
    "a <mark> b</mark> <s> </s> <unk> [UNK] [MASK] <0x41>",
    "▁under▁score ▁▁ lower one eighth",
    "Ġtoken Ċ spelled in byte characters",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "                                 ",
    "=" * 70,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "Ankara'dan İzmir'deki 'twas O'Reilly'llama rock'n'roll'd'Ve",
    "a   12  345\t\t6 \n 7\n\n\n8   \n",
    "http://example.com/path?query=1&b=%20#frag user@example.org C:\\Users\\x",
    "The year 1984's   novel—by Orwell—sold 30,000,000 copies;\n\n\tsee p. 12 (ibid.)\n",
    "👋🏻 Hello नमस्ते 你好 مرحبا\n\n```python\nprint('héllo  wörld', 3.14)\n```\n\n* item 1\n* item 2\n\n"
    "> quote — “fin” … 1️⃣ ñandú\tend  ",
]

LONG = (
    "The lighthouse keeper counted the ships every evening. There were never many: a coal barge, two trawlers, "
    "sometimes a white ferry that did not stop. He wrote each one down in a ledger, with the hour, the wind and the "
    "height of the water, because his father had done so and because nobody had told him to end. In the winter of "
    "1987 the ledger had 4,312 entries. His daughter, who studied mathematics in the city, once asked what the "
    "numbers were for. He said that a number is a kind of lamp: it shows you where you have been. She laughed, took "
    "the ledger to her room, and came back in the morning with a table. On days with a west wind, she said, the ferry "
    "was late by eleven minutes on average; on days with fog it did not come at all, except once, on the third of "
    'March, when it came twice. "That is not possible," said the keeper. "It is what you wrote," said his daughter. '
    "They looked at the page together. The two lines stood there in his own hand, one at 6:40 and one at 6:55, and "
    "beside the second a small mark that he did not remember making. He put on his coat and went up the stairs, all "
    "one hundred and ninety-six of them, and lit the lamp although it was day. Then he waited. Below, the sea was "
    "flat and grey as slate, and the fog came in from the west like a wall, slowly, without a sound. At twenty to "
    "seven the ferry passed. He wrote it down. At five to seven,"
)

CHAT = [
    [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
    [
        {"role": "system", "content": "You answer in rhyme."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model, small and true."},
        {"role": "user", "content": "And what can you do?"},
    ],
    [{"role": "user", "content": '  spaces kept \n<b>&amp; "quotes"</b> {{ not_a_variable }} {% raw %} é 😀'}],
]

PROMPTS = [
    ("france", "The capital of France is", False),
    ("fibonacci", "def fibonacci(n):", False),
    ("once", "Once upon a time", False),
    ("chat", None, True),  # CHAT[0] through the model's own template
    ("long", LONG, False),
    ("list", "Here are five facts about the planet Mars:\n\n1.", False),
    ("json", '{"name": "Alice", "age": 30, "city": "', False),
    ("question", "Q: What is the boiling point of water at sea level?\nA:", False),
    ("german", "Der Hund läuft durch den Wald und", False),
    ("code", "import numpy as np\n\ndef softmax(x):\n    ", False),
]
LOGIT_PROMPTS = ["france", "fibonacci", "chat", "long", "german"]

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "headers": """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{{- system }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "alternating": """{{ bos_token }}{% for message in messages %}
  {% if message.role == 'system' %}
    {% continue %}
  {% elif message.role == 'user' %}
[INST] {{ message.content | trim }} [/INST]
  {% else %}
 {{ message.content }}{{ eos_token }}
  {% endif %}
  {% if loop.last %}
    {% break %}
  {% endif %}
{% endfor %}
""",
    "blocks": """{# whitespace control as trim_blocks and lstrip_blocks leave it #}
{% set ns = namespace(count=0) %}
{% for m in messages %}
    {% set ns.count = ns.count + 1 %}
    {{ ns.count }}. {{ m | tojson }} / {{ m.role | upper }}
    {% generation %}{{ m.content[:4] }}{% endgeneration %}
{% endfor %}
{{ messages | map(attribute='role') | join(', ') }} {{ messages | tojson(indent=2) }}
""",
}

# Every `tokenizer.ggml.pre` that vocab_bpe.json records.
PRE = (
    "default llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe "
    "deepseek-llm deepseek-coder deepseek-v3 spark2_5 youtu falcon mpt starcoder gpt-2 phi-2 jina-es jina-de "
    "gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code roberta-bpe jais-2 "
    "refact command-r qwen2 deepseek-r1-qwen kormo f2llmv2 qwen35 stablelm2 olmo poro-chat chatglm-bpe glm4 glm5 "
    "viking jais tekken smollm codeshell bloom gpt3-finnish exaone exaone4 exaone-moe chameleon minerva-7b megrez "
    "gpt-4o llama4 kanana2 talkie granite-embed-multi-97m trillion granite-docling bailingmoe bailingmoe2 "
    "llada-moe seed-coder hunyuan hunyuan-dense hy_v4 joyai-llm "
    "ufakzeka grok-2 laguna minimax-m2 solar-open mellum2 minicpm5"
).split()

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Vocabulary:
    """A GGUF file's vocabulary in llama.cpp, without weights."""

    def __init__(self, path: str):
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) * 2 + 16))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), room, len(room), add_special, parse_special)
        if count < 0:
            raise SystemExit(f"llama_tokenize wants {-count} tokens for {len(data)} bytes")
        return list(room[:count])

    def piece(self, token: int, *, special: bool) -> bytes:
        room = ctypes.create_string_buffer(1024)
        count = llama_cpp.llama_token_to_piece(self.vocab, token, room, 1024, 0, special)
        return room.raw[:count]

    def stops(self) -> list[int]:
        return [i for i in range(self.size) if llama_cpp.llama_vocab_is_eog(self.vocab, i)]

    def free(self) -> None:
        llama_cpp.llama_model_free(self.model)


def encodings(vocab: Vocabulary, text: str) -> dict:
    """The ids of a text: with the special tokens of the model around it; `parsed` only where it differs."""
    plain = vocab.encode(text, add_special=True, parse_special=False)
    parsed = vocab.encode(text, add_special=True, parse_special=True)
    bare = vocab.encode(text, add_special=False, parse_special=False)
    return {"ids": plain} | ({"parsed": parsed} if parsed != plain else {}) | ({"bare": bare} if bare != plain else {})


def record_tokens(path: str) -> dict:
    vocab = Vocabulary(path)
    texts = [*TEXTS, LONG]
    cases = [{"text": text, **encodings(vocab, text)} for text in texts]
    pieces = {i: vocab.piece(i, special=True).hex() for i in [*range(64), *range(64, vocab.size, 997)]}
    controls = [i for i in range(vocab.size) if vocab.piece(i, special=False) != vocab.piece(i, special=True)]
    return {
        "cases": cases,
        "vocab_size": vocab.size,
        "bos": llama_cpp.llama_vocab_bos(vocab.vocab),
        "eos": llama_cpp.llama_vocab_eos(vocab.vocab),
        "stops": vocab.stops(),
        "controls": controls,
        "pieces_hex": pieces,
    }


def log_softmax(row: np.ndarray) -> np.ndarray:
    row = row.astype(np.float64)
    row = row - row.max()
    return row - np.log(np.exp(row).sum())


def decode_file(source: str, target: str) -> None:
    """Writes a copy of a GGUF file in which every tensor is float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(
            name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        )
    for tensor in reader.tensors:
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, np.ascontiguousarray(decoded))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def record_model(path: str, template: Jinja2ChatFormatter, **options: int) -> tuple[dict, dict]:
    threads = {"n_threads": 2, "n_threads_batch": 2}
    model = llama_cpp.Llama(path, n_ctx=1024, **threads, logits_all=True, verbose=False, **options)
    greedy, logits = [], []
    for name, given, parse in PROMPTS:
        text = template(messages=CHAT[0]).prompt if given is None else given
        prompt = model.tokenize(text.encode(), add_bos=True, special=parse)
        model.reset()
        model.eval(prompt)
        rows = np.array(model.scores[: len(prompt)])
        if name in LOGIT_PROMPTS:
            places = sorted({0, 1, len(prompt) // 2, len(prompt) - 2, len(prompt) - 1})
            top = {p: np.argsort(-rows[p], kind="stable")[:20] for p in places}
            logits.append(
                {
                    "name": name,
                    "prompt_ids": prompt,
                    "positions": [
                        {"position": p, "ids": top[p].tolist(), "logits": [round(float(rows[p][i]), 4) for i in top[p]]}
                        for p in places
                    ],
                }
            )
        ids, gaps, logprobs = [], [], []
        row = rows[-1]
        for _ in range(64):
            scores = log_softmax(row)
            best, second = np.argsort(-scores, kind="stable")[:2]
            ids.append(int(best))
            gaps.append(round(float(scores[best] - scores[second]), 5))
            logprobs.append(round(float(scores[best]), 5))
            model.eval([int(best)])
            row = np.array(model.scores[model.n_tokens - 1])
        stop = next((i for i, token in enumerate(ids) if llama_cpp.llama_vocab_is_eog(model._model.vocab, token)), None)
        print(f"{name}: {len(prompt)} prompt tokens, smallest gap {min(gaps)}", flush=True)
        greedy.append(
            {
                "name": name,
                "text": text,
                "parse_special": parse,
                "prompt_ids": prompt,
                "ids": ids,
                "gaps": gaps,
                "logprobs": logprobs,
                "first_stop": stop,
                "continuation": model.detokenize(ids[:stop]).decode("utf-8", "replace"),
            }
        )
    model.close()
    return {"prompts": greedy}, {"prompts": logits}


def record_chat(template: str) -> dict:
    def render(source: str, messages: list, generation: bool) -> str:
        formatter = Jinja2ChatFormatter(source, "</s>", "<s>", add_generation_prompt=generation)
        return formatter(messages=messages).prompt

    cases = [
        {"template": name, "messages": messages, "add_generation_prompt": g, "text": render(source, messages, g)}
        for name, source in {"smollm2": template, **TEMPLATES}.items()
        for messages in CHAT
        for g in (True, False)
    ]
    return {"bos_token": "<s>", "eos_token": "</s>", "templates": TEMPLATES, "cases": cases}


# Synthetic vocabularies


def train_pairs(sequences: list[list[str]], count: int) -> list[tuple[str, str]]:
    """Byte-pair merges over whole texts. Words are no boundary here: a pre-tokenizer's boundary then shows in ids."""
    merges = []
    for _ in range(count):
        pairs = Counter(pair for s in sequences for pair in itertools.pairwise(s))
        if not pairs:
            break
        left, right = max(pairs, key=lambda p: (pairs[p], p))
        merges.append((left, right))
        for s in sequences:
            i = 0
            while i < len(s) - 1:
                if s[i] == left and s[i + 1] == right:
                    s[i : i + 2] = [left + right]
                i += 1
    return merges


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte, in byte order."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in keep else chr(next(rest)) for b in range(256)]


def distinct(items: list[str]) -> list[str]:
    return list(dict.fromkeys(items))


def write_vocabulary(path: str, fields: dict) -> None:
    """Writes a GGUF file that holds a vocabulary and the few numbers that llama.cpp insists on."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def record_vocabulary(fields: dict, texts: list[str]) -> tuple[list[dict], list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/vocab.gguf"
        write_vocabulary(path, fields)
        vocab = Vocabulary(path)
        cases = [encodings(vocab, text) for text in texts]
        stops = vocab.stops()
        vocab.free()
    return cases, stops


def record_bpe() -> dict:
    """`cases[i]` belongs to `texts[i]`: a list of {"ids", "parsed"?, "bare"?, "pre": the families that give them}."""
    texts = [*TEXTS, LONG[:400]]
    letters = byte_characters()
    special = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<mark>"]
    merges = train_pairs([[letters[b] for b in text.encode()] for text in [*texts, LONG]], 1100)
    merges = [pair for pair in merges if not any(name in "".join(pair) for name in special)]
    pieces = distinct([*sorted(letters), *(left + right for left, right in merges)])
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*pieces, *special],
        "tokenizer.ggml.token_type": [NORMAL] * len(pieces) + [CONTROL] * 3 + [USER_DEFINED],
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": len(pieces),
        "tokenizer.ggml.eos_token_id": len(pieces) + 2,
    }
    cases: list[list[dict]] = [[] for _ in texts]
    for pre in PRE:
        found, _ = record_vocabulary({**fields, "tokenizer.ggml.pre": pre}, texts)
        for known, case in zip(cases, found, strict=True):
            same = next((k for k in known if {**k, "pre": None} == {**case, "pre": None}), None)
            if same is None:
                known.append({**case, "pre": [pre]})
            else:
                same["pre"].append(pre)
    return {"metadata": fields, "texts": texts, "cases": cases}


def record_spm() -> dict:
    texts = [*TEXTS, LONG[:400]]
    merges = train_pairs([list(text.replace(" ", "▁")) for text in [*texts, LONG]], 500)
    covered = [c for c, n in Counter("".join(texts).replace(" ", "▁")).items() if n > 1 and ord(c) >= 32]
    pieces = distinct([*(left + right for left, right in merges), *sorted(covered)])
    # A piece of which no split is in the vocabulary, and one that starts with a character that is not.
    pieces += [p for p in ("ĸĸĸ", "ŋa", "ŋab") if p not in pieces]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tail = ["<|im_start|>", "<|im_end|>", "<mark>"]
    pieces = [piece for piece in pieces if piece not in {*head, *tail}]
    count = len(pieces)
    base = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*head, *pieces, *tail],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL]
        + [BYTE] * 256
        + [NORMAL] * count
        + [CONTROL] * 2
        + [USER_DEFINED],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    texts = [*texts, "ĸĸĸĸĸĸ ŋab ŋa ŋ ĸ", "aaaa aaaaa aaaaaa aaaaaaa"]
    scores = {
        "ranked": [-float(i) for i in range(count)],
        "ties": [-float(i // 24) for i in range(count)],
        "flat": [0.0] * count,
        "reversed": [float(i) for i in range(count)],
    }
    variants = {name: {"tokenizer.ggml.scores": [0.0] * len(head) + s + [0.0] * 3} for name, s in scores.items()}
    variants["no_prefix"] = {**variants["ranked"], "tokenizer.ggml.add_space_prefix": False}
    variants["bos_and_eos"] = {
        **variants["ranked"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }
    out = {}
    for name, extra in variants.items():
        cases, stops = record_vocabulary({**base, **extra}, texts)
        out[name] = {"metadata": extra, "stops": stops, "cases": cases}
    return {"metadata": base, "texts": texts, "variants": out}


def record_wpm() -> dict:
    texts = [*TEXTS, LONG[:400]]
    plain = "".join(c for c in unicodedata.normalize("NFD", " ".join(texts)) if unicodedata.category(c) != "Mn")
    words = Counter(w for t in (plain, plain.lower(), " ".join(texts)) for w in t.split())
    letters = sorted({c for w in words for c in w if ord(c) >= 32})
    whole = sorted(w for w, n in words.items() if n > 2 and len(w) > 1)
    tails = sorted({w[i : i + n] for w in whole for n in (2, 3) for i in range(1, len(w) - n + 1)})[:400]
    inside = [c for c in letters if c.isalnum()]
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = distinct([*marks, *("▁" + c for c in letters), *("▁" + w for w in whole), *tails, *inside])
    base = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, UNKNOWN] + [CONTROL] * 3 + [NORMAL] * (len(tokens) - 5),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
    }
    variants = {
        "uncased": {},
        "cased": {"tokenizer.ggml.normalizer.lowercase": False},
        "accents": {"tokenizer.ggml.normalizer.strip_accents": False},
    }
    out = {}
    for name, extra in variants.items():
        cases, _ = record_vocabulary({**base, **extra}, texts)
        out[name] = {"metadata": extra, "cases": cases}
    return {"metadata": base, "texts": texts, "variants": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", nargs="*", help="names of the files to write, without .json")
    args = parser.parse_args()
    llama_cpp.llama_backend_init()
    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, None)

    fields = gguf.GGUFReader(args.model).fields
    source = fields["tokenizer.chat_template"].contents()
    formatter = Jinja2ChatFormatter(source, "<|im_end|>", "<|im_start|>")
    about = {
        "llama_cpp_python": llama_cpp.__version__,
        "gguf": "0.19.0",
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    model = {
        "model": Path(args.model).name,
        "sha256": hashlib.sha256(Path(args.model).read_bytes()).hexdigest(),
        "settings": "n_ctx 1024, n_batch 512, 2 threads, KV cache f16, flash attention off",
    }

    def write(name: str, content: dict, **more) -> None:
        text = json.dumps({"about": {**about, **more}, **content}, ensure_ascii=True, separators=(",", ":"))
        (args.out / f"{name}.json").write_text(text + "\n")
        print(f"{name}.json: {len(text)} bytes", flush=True)

    def wanted(*names: str) -> bool:
        return not args.only or bool(set(names) & set(args.only))

    if wanted("smollm2_tokens"):
        write("smollm2_tokens", record_tokens(args.model), **model)
    if wanted("smollm2_greedy", "smollm2_logits"):
        greedy, logits = record_model(args.model, formatter)
        write("smollm2_greedy", greedy, **model)
        write("smollm2_logits", logits, **model)
    if wanted("smollm2_f32_greedy", "smollm2_f32_logits"):
        with tempfile.TemporaryDirectory() as folder:
            decode_file(args.model, f"{folder}/f32.gguf")
            wide = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
            greedy, logits = record_model(f"{folder}/f32.gguf", formatter, **wide)
        settings = "weights decoded to float32; n_ctx 1024, n_batch 512, 2 threads, KV cache f32, flash attention off"
        write("smollm2_f32_greedy", greedy, **(model | {"settings": settings}))
        write("smollm2_f32_logits", logits, **(model | {"settings": settings}))
    if wanted("smollm2_chat"):
        write("smollm2_chat", record_chat(source), **model)
    for name, record in (("vocab_bpe", record_bpe), ("vocab_spm", record_spm), ("vocab_wpm", record_wpm)):
        if wanted(name):
            write(name, record())


if __name__ == "__main__":
    main()
