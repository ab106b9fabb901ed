"""Weights laid out for a CPU's matrix products, as oneDNN reads them fastest.

A product with few rows is bound by the reading of its weights, and the order of a checkpoint is a poor one
for that. What is packed computes only: it is neither trained nor moved.
"""

from typing import Any

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer with packed weights; gives what the layer it was made of gives, up to rounding.

    weight: [out, in], opaque to all but oneDNN. dtype: of the product; inputs and outputs keep their own.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(dtype).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Turns [.., in] into [.., out]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs.to(self.weight.dtype), self.weight, self.bias, "none", [], ""
        )
        return output.to(inputs.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, _keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.to_dense()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's products, and this CPU those of a type."""
    if not (torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_linears(module: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Packs all linear layers below a module that lie on a CPU in float32 or bfloat16; gives their number.

    One weight after the other, so that no more than one is there twice; one that is an embedding too stays.
    dtype: of the products, None for that of each weight.
    """
    found = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and _is_packable(child.weight, dtype)
    ]
    for parent, name in found:  # not the layers themselves: each is let go of when it is replaced
        setattr(parent, name, PackedLinear(getattr(parent, name), dtype))
    return len(found)


def _is_packable(weight: Tensor, dtype: torch.dtype | None) -> bool:
    is_plain = type(weight) is nn.Parameter and type(weight.data) is Tensor  # quantised weights are not
    known = (torch.float32, torch.bfloat16)
    return (
        is_plain
        and weight.device.type == "cpu"
        and weight.dtype in known
        and can_pack(weight.dtype if dtype is None else dtype)
    )
