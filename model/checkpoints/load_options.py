"""Options of loading: device, types, image size, quantisation."""

from dataclasses import dataclass
from typing import Literal

import torch

from model.devices import CPU

Quantization = Literal["none", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Device and types of a model.

    device: of all components, except a language model that is spread.
    dtype: of the frozen models, image encoder and language model; None: see `pick_dtype`. All components
    between them are in float32.
    image_size: S, to which the position embeddings are interpolated; None: the checkpoint's.
    quantize: "int8" to hold the linear layers of the language model in 8 bits.
    runs: whether the model is loaded for inference, not only to be saved in another format.
    spread: whether to distribute the language model over all GPUs, for one that is too large for one GPU.
    """

    device: torch.device = CPU
    dtype: torch.dtype | None = torch.float32
    image_size: int | None = None
    quantize: Quantization = "none"
    spread: bool = False
    runs: bool = True

    @property
    def first_device(self) -> torch.device:
        """The device a language model is read to; it is quantised and spread from the CPU."""
        return CPU if self.quantize != "none" or self.spread else self.device

    def pick_dtype(self, half: torch.dtype) -> torch.dtype:
        """Return the type of a frozen model, whose authors ran it in `half`, a type of 16 bits.

        On a GPU it is `half`, or float32 where that is bfloat16 and the GPU has none. On a CPU it is
        bfloat16 with AMX, and float32 without, where bfloat16 is slower.
        """
        if self.dtype is not None:
            return self.dtype
        if self.device.type == "cuda":
            has_half = half == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
            return half if has_half else torch.float32
        return torch.bfloat16 if self.device.type == "cpu" and _has_amx() else torch.float32


IN_FLOAT32 = LoadOptions()


def _has_amx() -> bool:
    # The function is not public: absent means no.
    is_supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return is_supported is not None and bool(is_supported())
