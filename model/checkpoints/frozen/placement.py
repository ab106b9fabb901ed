"""Placement of a language model: quantised, on one device or over several."""

from torch import nn
from transformers import PreTrainedModel

from model.checkpoints.load_options import LoadOptions
from model.errors import CheckpointError


def place_llm(llm: PreTrainedModel, options: LoadOptions) -> PreTrainedModel:
    """Quantise a language model and move it to its devices, as `options` say.

    Raises CheckpointError where a required library is not installed.
    """
    if options.quantize == "int8":
        _quantize(llm)
    return _spread(llm) if options.spread else llm.to(options.device)


def _quantize(llm: PreTrainedModel) -> None:
    """Store the weights of linear layers as int8 with a scale per row; the head stays as it is.

    Products are computed in the type of the activations, so only the weights are rounded.
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
    """Distribute the layers over all GPUs; the rest stays on the CPU, and is copied to a GPU to run.

    A quarter of each GPU is reserved for caches, activations and other models.
    """
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_max_memory
    except ImportError as error:
        raise CheckpointError(
            f"spreading a language model needs accelerate ({error}); pip install 'blip2-server[spread]'"
        ) from error
    free = get_max_memory()
    usable = {device: size if device == "cpu" else size * 3 // 4 for device, size in free.items()}
    device_map = infer_auto_device_map(
        llm, max_memory=usable, no_split_module_classes=list(llm._no_split_modules or [])
    )
    if "disk" in device_map.values():
        raise CheckpointError(
            "the language model exceeds the memory of the GPUs and of the host together; load a smaller "
            "one, or in 8 bits"
        )
    skipped = getattr(llm, "_skip_keys_device_placement", None)
    dispatched: PreTrainedModel = dispatch_model(llm, device_map, skip_keys=skipped)
    return dispatched
