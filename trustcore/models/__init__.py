"""Model families: configuration, modules, and the names their weights have in checkpoints."""

from trustcore.models.config import DecoderConfig
from trustcore.models.decoder import Decoder
from trustcore.models.from_checkpoint import decoder_from_checkpoint
from trustcore.models.importance import importance_by_path, importance_by_tensor

__all__ = ["Decoder", "DecoderConfig", "decoder_from_checkpoint", "importance_by_path", "importance_by_tensor"]
