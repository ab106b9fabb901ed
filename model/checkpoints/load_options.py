"""How a checkpoint is put into memory."""

from dataclasses import dataclass
from typing import Literal

import torch

from model.devices import CPU

Quantization = Literal["none", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Where the parts of a model are held, and in which types.

    device: of all parts, but for a language model that is spread.
    dtype: of the frozen parts, image encoder and language model; None for what `pick_dtype` says. What
    stands between them is in float32.
    image_size: S of the images to read, to which the position table is interpolated; None: the checkpoint's.
    quantize: "int8" to hold the linear layers of the language model in 8 bits.
    runs: whether the model is going to, and not only to be written in another format.
    spread: whether the language model is laid over all GPUs, as one too large for one needs it.
    """

    device: torch.device = CPU
    dtype: torch.dtype | None = torch.float32
    image_size: int | None = None
    quantize: Quantization = "none"
    spread: bool = False
    runs: bool = True

    @property
    def first_device(self) -> torch.device:
        """Where a language model is read to; it is quantised and spread from the CPU."""
        return CPU if self.quantize != "none" or self.spread else self.device

    def pick_dtype(self, half: torch.dtype) -> torch.dtype:
        """Gives the type of a frozen part, whose authors ran it in `half`, a type of 16 bits.

        On a GPU it is `half`, or float32 where that is bfloat16 and the GPU has none. On a CPU it is
        bfloat16 where there is AMX, without which that would be slower than float32.
        """
        if self.dtype is not None:
            return self.dtype
        if self.device.type == "cuda":
            has_half = half == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
            return half if has_half else torch.float32
        return torch.bfloat16 if self.device.type == "cpu" and _has_amx() else torch.float32


def _has_amx() -> bool:
    # The probe is not public: absent means no.
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and bool(probe())
