"""Puts a language model where it runs: in 8 bits, on one device or over several."""

from torch import nn
from transformers import PreTrainedModel

from model.checkpoints.options import LoadOptions
from model.errors import CheckpointError


def place_llm(llm: PreTrainedModel, options: LoadOptions) -> PreTrainedModel:
    """Quantises a language model and moves it as `options` say; else gives it as it is.

    Raises CheckpointError where a library that this needs is not installed.
    """
    if options.quantize == "int8":
        _quantize(llm)
    return _spread(llm) if options.spread else llm.to(options.device)


def _quantize(llm: PreTrainedModel) -> None:
    """Holds the weights of linear layers as int8 with a scale per row; the head stays as it is.

    Products are computed in the type of the activations, so only the rounding of the weights is lost.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise CheckpointError(
            f"quantize is 'int8', which needs torchao ({error}); pip install 'blip2-server[quantize]'"
        ) from error
    head = llm.get_output_embeddings()
    quantize_(
        llm,
        Int8WeightOnlyConfig(version=2),
        filter_fn=lambda module, _: isinstance(module, nn.Linear) and module is not head,
    )


def _spread(llm: PreTrainedModel) -> PreTrainedModel:
    """Lays the layers over all GPUs, and what is left over on the CPU; each runs where it lies."""
    try:
        from accelerate import dispatch_model, infer_auto_device_map
    except ImportError as error:
        raise CheckpointError(
            f"spreading a language model needs accelerate ({error}); pip install 'blip2-server[spread]'"
        ) from error
    device_map = infer_auto_device_map(llm, no_split_module_classes=list(llm._no_split_modules or []))
    if "disk" in device_map.values():
        raise CheckpointError(
            "the language model fits neither the GPUs nor the memory beside them; load a smaller one, or "
            "in 8 bits"
        )
    dispatched: PreTrainedModel = dispatch_model(llm, device_map)
    return dispatched
