"""Records what transformers computes with small random models of each family, as `tests/data/families/*.npz`.

The oracle is no test dependency. In a virtual environment of its own (CPU):

    pip install torch transformers
    python tests/oracles/record_families.py --out tests/data/families [CASE ...]

A file holds config.json as text ("config"), the tensors as `save_pretrained` wrote them ("w:NAME"), inputs ("i:NAME")
and what the library gave for them ("o:NAME"), float32. Weights are random, also those of norms and biases, so that no
swapped pair stays unseen; they are bfloat16 numbers, which pack well.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file

Recorded = tuple[Any, dict[str, Any], dict[str, Any]]
TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def main() -> None:
    """Writes one file a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("cases", nargs="*", help="names of cases; none: all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.cases or CASES:
        torch.manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            model, inputs, outputs = CASES[name]()
        write(args.out / f"{name}.npz", model, inputs, outputs)


def write(path: Path, model: Any, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    """Writes a case as the header of this file says."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
        weights = load_file(Path(folder, "model.safetensors"))
    config.pop("transformers_version", None)
    for name, value in outputs.items():
        if float(np.asarray(value, np.float64).std(axis=0).mean()) < 1e-2:
            raise SystemExit(f"{path.stem}: {name} hardly depends on the input; draw other weights")
    held: dict[str, np.ndarray] = {"config": np.array(json.dumps(config))}
    for mark, group in (("w", weights), ("i", inputs), ("o", outputs)):
        for name, value in group.items():
            held[f"{mark}:{name}"] = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
    np.savez_compressed(path, **held)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, {len(weights)} tensors")


def randomize(model: Any) -> Any:
    """Gives every weight, and the statistics of batch norms, numbers that are far from what they start with."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            learned = tensor.requires_grad or "running" in name or "logits_bias" in name
            if not tensor.is_floating_point() or not learned:
                continue
            ones = tensor.ndim == 1 and (name.endswith("weight") or bool((tensor == 1).all()))
            if name.endswith("running_var") or ones:  # scales, also those that start as something else than one
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim < 2:
                tensor.normal_(0, 0.2)
            else:
                fan = tensor[0].numel()
                tensor.normal_(0, 0.5 if "embed" in name and tensor.ndim == 2 else 1.2 * fan**-0.5)
            tensor.copy_(tensor.bfloat16().float())
    return model.eval()


def tokens(batch: int = 3, length: int = 12, vocab: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, none of them special, and a mask: a whole row, one padded on the right, one on the left."""
    ids = torch.randint(5, vocab, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, -4:] = 0
    mask[2, :3] = 0
    return ids, mask


def encoder(kind: str, types: int = 0, pad: int = 0, **changes: Any) -> Recorded:
    """A text encoder: states of a padded batch, with token types where it has them, and its pooler's output."""
    config = hf.AutoConfig.for_model(kind, **{**TEXT, **changes})
    model = randomize(hf.AutoModel.from_config(config, attn_implementation="eager"))
    ids, mask = tokens()
    ids[mask == 0] = pad
    inputs = {"input_ids": ids, "attention_mask": mask}
    if types:
        inputs["token_type_ids"] = torch.randint(0, types, ids.shape)
    found = model(**inputs)
    outputs = {"hidden": found.last_hidden_state}
    if getattr(found, "pooler_output", None) is not None:
        outputs["pooled"] = found.pooler_output
    return model, inputs, outputs


def headed(kind: str, task: str, **changes: Any) -> Recorded:
    """A text encoder with a head: its scores for a padded batch, and its states."""
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.AutoConfig.for_model(kind, **{**small, "intermediate_size": 24, **changes})
    model = randomize(getattr(hf, f"AutoModelFor{task}").from_config(config, attn_implementation="eager"))
    ids, mask = tokens(vocab=40)
    ids[mask == 0] = config.pad_token_id
    ids[2, :3], mask[2, :3] = 7, 1  # heads that read the first token read no padding
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = model(**inputs)
    if task == "QuestionAnswering":
        return model, inputs, {"scores": torch.stack([found.start_logits, found.end_logits], -1)}
    return model, inputs, {"scores": found.logits}


def seq2seq(kind: str, **changes: Any) -> Recorded:
    """An encoder-decoder of text: states of its encoder, logits of its decoder, for a padded batch."""
    config = hf.AutoConfig.for_model(kind, **changes)
    model = randomize(hf.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager"))
    ids, mask = tokens()
    ids[mask == 0] = config.pad_token_id
    written = torch.randint(5, 64, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": written}
    found = model(**inputs, use_cache=False)
    return model, inputs, {"memory": found.encoder_last_hidden_state, "logits": found.logits}


T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0}


def whisper() -> Recorded:
    """Whisper: frames to states and logits, and sound to frames by the library's feature extractor."""
    config = hf.WhisperConfig(**BART, **WHISPER)
    model = randomize(hf.WhisperForConditionalGeneration._from_config(config, attn_implementation="eager"))
    sound = np.concatenate([np.sin(np.arange(1200) * 0.2 + i) * (0.1 + i) for i in range(4)])
    sound = (sound + 0.01 * np.random.default_rng(0).normal(size=4800)).astype(np.float32)
    outputs = {}
    for bins in (80, 128):
        extractor = hf.WhisperFeatureExtractor(feature_size=bins, chunk_length=1)
        frames = extractor([sound, sound[:3000]], sampling_rate=16000, return_tensors="np").input_features
        outputs[f"frames{bins}"] = frames[:, :, :40]
    frames = torch.tensor(np.random.default_rng(1).normal(size=(2, 8, 32)).astype(np.float32))
    inputs = {"frames": frames, "decoder_input_ids": torch.randint(5, 64, (2, 7)), "sound": sound}
    found = model(input_features=frames, decoder_input_ids=inputs["decoder_input_ids"], use_cache=False)
    return model, inputs, {**outputs, "memory": found.encoder_last_hidden_state, "logits": found.logits}


BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40}
BART |= {"pad_token_id": 1, "decoder_start_token_id": 2}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 12, "eos_token_id": 2}
WHISPER |= {"bos_token_id": 2}


def pixels(height: int, width: int) -> torch.Tensor:
    """Two random images."""
    return torch.tensor(np.random.default_rng(2).normal(size=(2, 3, height, width)).astype(np.float32))


def vision(model: Any, height: int = 16, width: int = 16, other: tuple[int, int] | None = None) -> Recorded:
    """A model of images: its last states and its vector; and its states for images of another size."""
    model = randomize(model)
    inputs = {"pixels": pixels(height, width)}
    found = model(**{"pixel_values": inputs["pixels"]})
    outputs = {"hidden": found.last_hidden_state}
    if getattr(found, "pooler_output", None) is not None:
        outputs["pooled"] = found.pooler_output
    if other is not None:
        inputs["other"] = pixels(*other)
        outputs["other"] = model(inputs["other"], interpolate_pos_encoding=True).last_hidden_state
    return model, inputs, outputs


def classifier(model: Any, height: int = 16, width: int = 16, gain: float = 1) -> Recorded:
    """A classifier of images: its logits. `gain` grows windows, so that averages of many places still differ."""
    model = randomize(model)
    for tensor in model.parameters():
        if tensor.ndim == 4:
            tensor.mul_(gain)
    inputs = {"pixels": pixels(height, width)}
    return model, inputs, {"logits": model(inputs["pixels"]).logits}


def towers(kind: Any, config: Any) -> Recorded:
    """A pair of towers: logits of images with texts, and the vectors they are made of."""
    model = randomize(kind._from_config(config, attn_implementation="eager"))
    ids, mask = tokens(3, 10)
    mask[2] = 1
    ids[0, -1] = ids[1, 5] = ids[2, -1] = 63  # the end of a text
    inputs = {"pixels": pixels(16, 16), "input_ids": ids, "attention_mask": mask}
    found = model(pixel_values=inputs["pixels"], input_ids=ids, attention_mask=mask)
    outputs = {"logits": found.logits_per_image, "images": found.image_embeds, "texts": found.text_embeds}
    return model, inputs, outputs


VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 16, "patch_size": 4}
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
TOWER = {**TEXT, "max_position_embeddings": 12, "eos_token_id": 63}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "num_labels": 3}
EFFICIENT = {"width_coefficient": 0.025, "depth_coefficient": 1.5, "in_channels": [320, 320, 640]}
EFFICIENT |= {"out_channels": [320, 640, 640], "kernel_sizes": [3, 5, 3], "strides": [1, 2, 2]}
EFFICIENT |= {"num_block_repeats": [1, 1, 1], "expand_ratios": [1, 4, 2], "hidden_dim": 32, "num_labels": 3}


def state_space(config: Any) -> Recorded:
    """A language model of Mamba layers: logits of whole rows and of a row that is padded on the left."""
    model = randomize(hf.AutoModelForCausalLM.from_config(config))
    for name, tensor in model.named_parameters():
        if name.endswith("A_log"):
            tensor.copy_(tensor.uniform_(-1.0, 2.0).bfloat16().float())
    ids = torch.randint(5, 64, (2, 75))
    mask = torch.ones(2, 75, dtype=torch.long)
    mask[1, :6] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return model, inputs, {"logits": model(**inputs, use_cache=False).logits}


MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
MAMBA |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 20}
DEBERTA = {"max_position_embeddings": 24, "relative_attention": True, "layer_norm_eps": 1e-7}
SMALL_DEBERTA = {**DEBERTA, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "type_vocab_size": 0}
SHORT = {"max_position_embeddings": 20}
LABELS = {0: "bad", 1: "fair", 2: "good"}
SMALL_DISTILBERT = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 20}
MODERN = {"local_attention": 6, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1}
MODERN |= {"eos_token_id": 2, **SHORT}

CASES: dict[str, Callable[[], Recorded]] = {
    "bert": lambda: encoder("bert", types=2, **SHORT),
    "roberta": lambda: encoder("roberta", pad=1, pad_token_id=1, type_vocab_size=1, **SHORT),
    "distilbert": lambda: encoder("distilbert", **DISTILBERT),
    "electra": lambda: encoder("electra", types=2, embedding_size=24, hidden_act="gelu_new", **SHORT),
    "modernbert": lambda: encoder(
        "modernbert",
        num_hidden_layers=4,
        local_attention=6,
        pad_token_id=0,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        **SHORT,
    ),
    "deberta-v2": lambda: encoder(
        "deberta-v2",
        types=2,
        type_vocab_size=2,
        conv_kernel_size=3,
        pos_att_type=["p2c", "c2p"],
        position_buckets=-1,
        **DEBERTA,
    ),
    "deberta-v3": lambda: encoder(
        "deberta-v2",
        type_vocab_size=0,
        position_biased_input=False,
        pos_att_type="p2c|c2p",
        position_buckets=4,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        embedding_size=32,
        **DEBERTA,
    ),
    "bert-masked": lambda: headed("bert", "MaskedLM", pad_token_id=0, **SHORT),
    "bert-labels": lambda: headed("bert", "SequenceClassification", pad_token_id=0, id2label=LABELS, **SHORT),
    "bert-tokens": lambda: headed("bert", "TokenClassification", pad_token_id=0, id2label=LABELS, **SHORT),
    "bert-spans": lambda: headed("bert", "QuestionAnswering", pad_token_id=0, **SHORT),
    "roberta-masked": lambda: headed("roberta", "MaskedLM", pad_token_id=1, type_vocab_size=1, **SHORT),
    "roberta-labels": lambda: headed("roberta", "SequenceClassification", pad_token_id=1, type_vocab_size=1, **SHORT),
    "distilbert-masked": lambda: headed("distilbert", "MaskedLM", **SMALL_DISTILBERT),
    "distilbert-labels": lambda: headed("distilbert", "SequenceClassification", id2label=LABELS, **SMALL_DISTILBERT),
    "distilbert-spans": lambda: headed("distilbert", "QuestionAnswering", **SMALL_DISTILBERT),
    "electra-masked": lambda: headed("electra", "MaskedLM", embedding_size=12, pad_token_id=0, **SHORT),
    "electra-labels": lambda: headed("electra", "SequenceClassification", embedding_size=12, pad_token_id=0, **SHORT),
    "modernbert-masked": lambda: headed("modernbert", "MaskedLM", **MODERN),
    "modernbert-labels": lambda: headed("modernbert", "SequenceClassification", classifier_pooling="mean", **MODERN),
    "modernbert-tokens": lambda: headed("modernbert", "TokenClassification", id2label=LABELS, **MODERN),
    "modernbert-spans": lambda: headed("modernbert", "QuestionAnswering", classifier_bias=True, **MODERN),
    "deberta-masked": lambda: headed("deberta-v2", "MaskedLM", **SMALL_DEBERTA),
    "deberta-own-masked": lambda: headed("deberta-v2", "MaskedLM", legacy=False, **SMALL_DEBERTA),
    "deberta-labels": lambda: headed("deberta-v2", "SequenceClassification", id2label=LABELS, **SMALL_DEBERTA),
    "deberta-tokens": lambda: headed("deberta-v2", "TokenClassification", id2label=LABELS, **SMALL_DEBERTA),
    "deberta-spans": lambda: headed("deberta-v2", "QuestionAnswering", **SMALL_DEBERTA),
    "t5": lambda: seq2seq("t5", **T5),
    "t5-gated": lambda: seq2seq("t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5),
    "bart": lambda: seq2seq("bart", **BART, **SHORT),
    "mbart": lambda: seq2seq("mbart", scale_embedding=True, **BART, **SHORT),
    "marian": lambda: seq2seq("marian", eos_token_id=2, forced_eos_token_id=2, scale_embedding=True, **BART, **SHORT),
    "pegasus": lambda: seq2seq("pegasus", activation_function="relu", **BART, **SHORT),
    "whisper": whisper,
    "vit": lambda: vision(hf.ViTModel(hf.ViTConfig(**VISION)), other=(12, 24)),
    "vit-classifier": lambda: classifier(hf.ViTForImageClassification(hf.ViTConfig(num_labels=5, **VISION))),
    "dinov2": lambda: vision(hf.Dinov2Model(hf.Dinov2Config(**DINO))),
    "dinov2-other": lambda: vision(hf.Dinov2Model(hf.Dinov2Config(**DINO)), 24, 8),
    "dinov2-registers": lambda: classifier(
        hf.Dinov2WithRegistersForImageClassification(
            hf.Dinov2WithRegistersConfig(use_swiglu_ffn=True, num_register_tokens=2, num_labels=3, **DINO)
        )
    ),
    "clip": lambda: towers(hf.CLIPModel, hf.CLIPConfig(text_config=TOWER, vision_config=VISION, projection_dim=24)),
    "clip-old": lambda: towers(
        hf.CLIPModel,
        hf.CLIPConfig(text_config={**TOWER, "eos_token_id": 2}, vision_config=VISION, projection_dim=24),
    ),
    "siglip": lambda: towers(hf.SiglipModel, hf.SiglipConfig(text_config=TOWER, vision_config=VISION)),
    "resnet": lambda: classifier(
        hf.ResNetForImageClassification(hf.ResNetConfig(depths=[2, 1], layer_type="bottleneck", **RESNET)), 32, 24
    ),
    "resnet-basic": lambda: vision(
        hf.ResNetModel(hf.ResNetConfig(depths=[1, 2], layer_type="basic", **RESNET)), 32, 24
    ),
    "convnext": lambda: classifier(
        hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[16, 24], depths=[1, 2], num_stages=2, num_labels=3)
        ),
        32,
        24,
    ),
    "efficientnet": lambda: classifier(
        hf.EfficientNetForImageClassification(hf.EfficientNetConfig(depthwise_padding=[4], **EFFICIENT)),
        30,
        32,
        gain=1.5,
    ),
    "mamba": lambda: state_space(hf.MambaConfig(time_step_rank=3, use_bias=True, **MAMBA)),
    "mamba2": lambda: state_space(hf.Mamba2Config(num_heads=4, head_dim=16, n_groups=2, chunk_size=16, **MAMBA)),
    "umt5": lambda: seq2seq("umt5", feed_forward_proj="gated-gelu", **T5),
}


if __name__ == "__main__":
    main()
