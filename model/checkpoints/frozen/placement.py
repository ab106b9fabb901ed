"""Puts a language model where it runs: in 8 bits, on one device or over several."""

from torch import nn
from transformers import PreTrainedModel

from model.checkpoints.load_options import LoadOptions
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
    """Lays the layers over all GPUs; what is left over stays on the CPU, and is copied to a GPU to run.

    A quarter of each GPU is kept for what grows: caches, activations, other models.
    """
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_max_memory
    except ImportError as error:
        raise CheckpointError(
            f"spreading a language model needs accelerate ({error}); pip install 'blip2-server[spread]'"
        ) from error
    free = get_max_memory()
    room = {device: size if device == "cpu" else size * 3 // 4 for device, size in free.items()}
    device_map = infer_auto_device_map(
        llm, max_memory=room, no_split_module_classes=list(llm._no_split_modules or [])
    )
    if "disk" in device_map.values():
        raise CheckpointError(
            "the language model fits neither the GPUs nor the memory beside them; load a smaller one, or "
            "in 8 bits"
        )
    skipped = getattr(llm, "_skip_keys_device_placement", None)
    dispatched: PreTrainedModel = dispatch_model(llm, device_map, skip_keys=skipped)
    return dispatched
