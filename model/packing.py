"""Packed weights: linear layers in the memory layout that oneDNN's products read fastest on a CPU.

A product with few rows is bound by reading its weights, and the layout of a checkpoint is slow to read. A
packed layer is for inference only: it is neither trained nor moved.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer with packed weights; equal to the original layer up to rounding.

    weight: [out, in], in a layout only oneDNN reads. dtype: of the product; the output has the input's.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(dtype).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        # A copy: no view may keep the memory map of a whole weight file.
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype, copy=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [.., in] to [.., out]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs.to(self.weight.dtype), self.weight, self.bias, "none", [], ""
        )
        return output.to(inputs.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, _keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.to_dense()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether this build of torch has oneDNN, and this CPU products of a type."""
    if not (torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_linears(module: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Pack all linear layers of a module that lie on a CPU in float32 or bfloat16; return their number.

    One weight after the other on each thread, so that few are there twice. Weights shared with an embedding
    stay.
    dtype: of the products, None for that of each weight.
    """
    found = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and _is_packable(child.weight, dtype)
    ]

    def pack(place: tuple[nn.Module, str]) -> None:  # by name: each layer is freed when it is replaced
        parent, name = place
        setattr(parent, name, PackedLinear(getattr(parent, name), dtype))

    # Threads of one product would wait for each other at each page that is read from a file.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(pack, found))
    return len(found)


def copy_weights(module: nn.Module) -> None:
    """Copy all weights of a module that are not packed, one after the other.

    They may be views of the memory map of a weight file. Once nothing views it, its pages leave the memory of
    the process, in which the packed weights are there too.
    """
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if type(tensor.data) is Tensor:
            tensor.data = tensor.data.clone()


def _is_packable(weight: Tensor, dtype: torch.dtype | None) -> bool:
    is_plain = type(weight) is nn.Parameter and type(weight.data) is Tensor  # quantised weights are not
    known = (torch.float32, torch.bfloat16)
    return (
        is_plain
        and weight.device.type == "cpu"
        and weight.dtype in known
        and can_pack(weight.dtype if dtype is None else dtype)
    )
