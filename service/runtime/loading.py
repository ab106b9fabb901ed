"""Loads the checkpoints that the settings name."""

import torch

from model import Blip2, DecoderLimits
from model.checkpoints import LoadOptions, resolve_retrieval_model
from model.devices import find_device
from model.errors import DeviceUnavailableError
from model.packing import can_pack
from service.blip2_backend import Blip2Backend
from service.runtime.settings import Settings, SettingsError


def load_backend(settings: Settings) -> Blip2Backend:
    """Load model and weights, which may take minutes.

    Raises CheckpointError where they cannot be loaded, SettingsError where the device is not there or the
    second checkpoint cannot match.
    """
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    device = _find_device(settings)
    qformer_dtype = _qformer_dtype(settings, device)
    options = LoadOptions(
        device=device,
        dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        image_size=settings.image_size,
        quantize=settings.quantize,
        spread=settings.spread,
    )
    blip2, matching = Blip2.from_pretrained(settings.model, options, revision=settings.revision), None
    if settings.retrieval_model is not None:
        matching = _load_matching(settings.retrieval_model, settings.retrieval_revision, options)
    limits = DecoderLimits(settings.max_rows, settings.kv_bytes_on(str(device)), settings.max_prompt_tokens)
    backend = Blip2Backend(blip2, matching, limits)
    backend.pack(qformer_dtype)
    return backend


def _find_device(settings: Settings) -> torch.device:
    try:
        device = find_device(settings.device)
    except DeviceUnavailableError as error:
        raise SettingsError(f"BLIP2_DEVICE: {error}") from error
    if settings.spread and device.type != "cuda":
        raise SettingsError(
            f"BLIP2_SPREAD lays the language model over GPUs, and the device is {str(device)!r}; unset it"
        )
    return device


def _qformer_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, settings.qformer_dtype)
    if dtype == torch.float32:
        return dtype
    if device.type != "cpu":
        raise SettingsError(
            f"BLIP2_QFORMER_DTYPE is {settings.qformer_dtype!r}, which is for a CPU, and the device is "
            f"{str(device)!r}; unset it"
        )
    if not can_pack(dtype):
        raise SettingsError("BLIP2_QFORMER_DTYPE is 'bfloat16', which this CPU does not compute in; unset it")
    return dtype


def _load_matching(name: str, revision: str | None, options: LoadOptions) -> Blip2:
    path = resolve_retrieval_model(name, revision=revision)
    matching = Blip2.from_pretrained(str(path), options)
    if matching.matcher is None:
        raise SettingsError(
            f"BLIP2_RETRIEVAL_MODEL is {name!r}, which has no ITC and ITM heads; "
            "set it to a retrieval checkpoint"
        )
    matching.name = name
    return matching
