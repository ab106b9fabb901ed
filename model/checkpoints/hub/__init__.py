"""The format of the Hugging Face Hub, and its downloads."""

from model.checkpoints.hub.load import GENERATION, RETRIEVAL, load_hub
from model.checkpoints.hub.save import DROPPED, save_hub

__all__ = ["DROPPED", "GENERATION", "RETRIEVAL", "load_hub", "save_hub"]
