"""Generation with continuous batching: `Decoder.add(request)`, then `Decoder.step()` until it is done."""

from model.generation.decoder import Decoder, run_requests
from model.generation.limits import DecoderLimits, check_fits
from model.generation.params import BOUNDS, MAX_BEAMS, GenerationParams
from model.generation.request import DecodeRequest, Generation, memory_requirement

__all__ = [
    "BOUNDS",
    "MAX_BEAMS",
    "DecodeRequest",
    "Decoder",
    "DecoderLimits",
    "Generation",
    "GenerationParams",
    "check_fits",
    "memory_requirement",
    "run_requests",
]
