r"""The pre-tokenizers that a GGUF file may name in `tokenizer.ggml.pre`: how text is cut into words before BPE.

`PRE_TOKENIZERS[name]` holds Oniguruma patterns. Each pattern in turn cuts every piece that the pattern before it left:
a match becomes a piece of its own, and so does what lies between two matches; nothing is dropped. Lookahead ends
where the piece ends.

The patterns say what llama.cpp's `llama-vocab.cpp` and `unicode.cpp` do (as vendored by llama-cpp-python 0.3.36), so
a GGUF file gives the same ids here and there. Where llama.cpp knows no upper and lower case beyond ASCII (tekken,
gpt-4o, youtu), neither do we: a model's own tokenizer.json may differ in such words, and `Tokenizer.from_file` follows
that file instead. Families that llama.cpp serves with code
rather than with a pattern (kimi-k2, afmoe, tiny_aya, superbpe, the DNA tokenizer) are refused by name.
"""

from __future__ import annotations

import dataclasses

from trustcore.errors import TokenizerError


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How one family cuts text, and the two defaults that llama.cpp ties to the family's name.

    Attributes:
        patterns: applied in turn.
        ignore_merges: a whole word that is a token is taken as it stands, whatever the merges would make of it.
        add_bos: the value of `tokenizer.ggml.add_bos_token` where the file has none.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of that name.

    Raises:
        TokenizerError: no family has that name.
    """
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise TokenizerError(
            f"tokenizer.ggml.pre: the pre-tokenizer {name!r} is unknown. "
            f"Known are {', '.join(sorted(PRE_TOKENIZERS))}. "
            "If it cuts words as one of these does, set tokenizer.ggml.pre to that name, or load the model's "
            "tokenizer.json with Tokenizer.from_file."
        ) from None


def _class(ranges: str) -> str:
    """Code point ranges in hexadecimal, "41-5A B5", as the inside of a character class."""
    return "".join("-".join(rf"\x{{{end}}}" for end in part.split("-")) for part in ranges.split())


_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _llama3(digits: str) -> str:
    r"""The family of Llama 3: `digits` says how many make a word."""
    return rf"(?:{_CONTRACTION})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


# ASCII letters have case, other letters (and, for Granite, marks) count as both.
def _cased(letters: str, digits: str, contraction: str) -> str:
    upper, lower = rf"(?:(?={letters})[^a-z])", rf"(?:(?={letters})[^A-Z])"
    head = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{head}{upper}*{lower}+{contraction}|{head}{upper}+{lower}*{contraction}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_CJK = "[" + _class("4E00-9FA5 3040-309F 30A0-30FF") + "]+"
_IDEOGRAPHS = "[" + _class("4E00-9FA5 800-4E00 AC00-D7FF") + "]+"
_DEEPSEEK3_HEAD = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)

# Letters with case, as DeepSeek LLM's tokenizer lists them.
_DEEPSEEK_LETTERS = _class(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
# U+3000 heads this list upstream; llama.cpp treats it as white space before it looks here.
_DEEPSEEK_MARKS = _class("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3001-3002")

# The stops of Bloom: white space, brackets' opening and closing, and the full stops and commas of five scripts.
_BLOOM = r" ?[^(\s|.,!?" + _class("2026 3002 FF0C 3001 964 6D4 60C") + r")]+"

_YOUTU_SCRIPTS = "|".join(
    f"[{_class(ranges)}]+"
    for ranges in (
        "AC00-D7A3 3131-318E",
        "FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F",
        "3105-312F",
        "4E00-9FA5 3040-309F 30A0-30FF",
    )
)

_LLAMA3 = _llama3(r"\p{N}{1,3}")
_QWEN2 = _llama3(r"\p{N}")
_WIDE_SPACES = "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"\s{1,2}(?!\S)|\s{1}"

_FAMILIES: list[tuple[str, PreTokenizer]] = [
    ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("glm4 glm5", PreTokenizer((_LLAMA3,), ignore_merges=True)),
    (
        "jais-2",
        PreTokenizer((_LLAMA3.removesuffix(_SPACES) + r"\s*[\r\n]+|" + _WIDE_SPACES,)),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            (r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", rf"\s?[{_DEEPSEEK_MARKS}]+", r"\s+\z", _IDEOGRAPHS, r"\p{N}+")
        ),
    ),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}"))),
    (
        "deepseek-v3 hunyuan-dense hy_v4 joyai-llm",
        PreTokenizer((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3_HEAD}[\r\n]*|{_SPACES}")),
    ),
    (
        "spark2_5",
        PreTokenizer((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3_HEAD}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    ),
    (
        "youtu",
        PreTokenizer(
            (
                _YOUTU_SCRIPTS,
                rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+(?:{_CONTRACTION})?|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
            ),
            ignore_merges=True,
        ),
    ),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    (
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
        PreTokenizer((r"\p{N}", _GPT2)),
    ),
    (
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
        "roberta-bpe mpt olmo jais trillion granite-docling exaone4",
        PreTokenizer((_GPT2,)),
    ),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2",
        PreTokenizer((_QWEN2,)),
    ),
    (
        "qwen35",
        PreTokenizer(
            (
                rf"(?:{_CONTRACTION})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
            )
        ),
    ),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    ("tekken", PreTokenizer((_cased(r"\p{L}", r"\p{N}", ""),), ignore_merges=True, add_bos=True)),
    (
        "chameleon",
        PreTokenizer(
            (
                "<sentinel:[0-9]+>",
                "(?:IMGIMG)(?:(?:A|B|C|D|E|F|G|H|I){1,4})Z",
                r"(?:[\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
    (
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        PreTokenizer((_cased(r"\p{L}", r"\p{N}{1,3}", rf"(?:{_CONTRACTION})?"),)),
    ),
    (
        "granite-embed-multi-97m",
        PreTokenizer((_cased(r"[\p{L}\p{M}]", r"\p{N}{1,3}", rf"(?:{_CONTRACTION})?"),), ignore_merges=True),
    ),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer(
            (
                r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    (
        "seed-coder",
        PreTokenizer(
            (
                rf"(?:{_CONTRACTION})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
                rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
            )
        ),
    ),
    ("ufakzeka", PreTokenizer((_QWEN2.removeprefix(rf"(?:{_CONTRACTION})|"),))),
    ("laguna", PreTokenizer((r"[^\n]+|[\n]+", _QWEN2))),
    (
        "exaone-moe",
        PreTokenizer(
            (
                rf"(?:{_CONTRACTION})|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _llama3(r"\p{N}+")), ignore_merges=True)),
]

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: family for names, family in _FAMILIES for name in names.split()}
