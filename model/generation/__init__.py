"""Batched decoding: `add(job)`, then `step()` until it is done."""

from model.generation.decoder import Decoder, run_jobs
from model.generation.params import GenerationParams
from model.generation.request import DecodeJob, DecoderLimits, Generation

__all__ = ["DecodeJob", "Decoder", "DecoderLimits", "Generation", "GenerationParams", "run_jobs"]
