"""Batched decoding: `add(job)`, then `step()` until it is done."""

from model.decoding.decoder import Decoder, run_jobs
from model.decoding.job import DecodeJob, Generation
from model.decoding.params import GenerationParams
from model.decoding.task import DecoderLimits

__all__ = ["DecodeJob", "Decoder", "DecoderLimits", "Generation", "GenerationParams", "run_jobs"]
