"""Model families: configuration, modules, and the names their weights have in checkpoints."""

from trustcore.models.config import DecoderConfig
from trustcore.models.decoder import Decoder
from trustcore.models.from_checkpoint import decoder_from_checkpoint, model_from_checkpoint
from trustcore.models.importance import importance_by_path, importance_by_tensor
from trustcore.models.layer_form import tuned_layers
from trustcore.models.links import decoder_links, decoder_stream, untie
from trustcore.models.model import Model, TextEncoder
from trustcore.models.peft import load_adapters, save_adapters
from trustcore.models.random import random_model
from trustcore.models.scan import scan_layers, spill_layers, unscan_layers
from trustcore.models.sentence_vectors import embed

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Model",
    "TextEncoder",
    "decoder_from_checkpoint",
    "decoder_links",
    "decoder_stream",
    "embed",
    "importance_by_path",
    "importance_by_tensor",
    "load_adapters",
    "model_from_checkpoint",
    "random_model",
    "save_adapters",
    "scan_layers",
    "spill_layers",
    "tuned_layers",
    "unscan_layers",
    "untie",
]
