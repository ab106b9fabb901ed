"""The format of LAVIS."""

from model.checkpoints.lavis.config import ENCODERS, LavisConfig
from model.checkpoints.lavis.language_model import differing_fields
from model.checkpoints.lavis.load import load_lavis
from model.checkpoints.lavis.pickled_tensors import read_pickle
from model.checkpoints.lavis.save import save_lavis
from model.checkpoints.lavis.tensor_names import from_lavis

__all__ = [
    "ENCODERS",
    "LavisConfig",
    "differing_fields",
    "from_lavis",
    "load_lavis",
    "read_pickle",
    "save_lavis",
]
