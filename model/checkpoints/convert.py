"""Converts checkpoints between formats, and lists what the target format does not have."""

from pathlib import Path
from typing import Literal

from model.checkpoints.adapter import save_generation_adapter, save_retrieval_adapter
from model.checkpoints.hub import DROPPED, save_hub
from model.checkpoints.lavis import differing_fields, save_lavis
from model.components import Blip2Components
from model.errors import CheckpointError
from model.matching import MAX_TEXT_TOKENS
from model.preprocess import CLIP_MEAN, CLIP_STD

Format = Literal["hub", "lavis", "adapter"]


def convert(components: Blip2Components, target: Path, target_format: Format) -> list[str]:
    """Save a loaded model in a format; return a line for everything that the format does not have.

    target: a directory, or for LAVIS a .pth file. Weights are saved in their present types. Raises
    CheckpointError where the target exists, or the format does not support the model.
    """
    paths = target.parent.glob(f"{target.stem}.*") if target_format == "lavis" else [target]
    for path in paths:
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise CheckpointError(f"{path} exists; name a new one, for nothing is overwritten")
    if target_format == "lavis" and target.suffix != ".pth":
        raise CheckpointError(f"a file of LAVIS ends in .pth, {target} does not; name it so")
    if components.question_embedder is not None and target_format != "adapter":
        raise CheckpointError(
            f"the Q-Former is shown the question, and the format {target_format!r} has no such model; "
            "convert to an adapter"
        )
    if target_format == "hub":
        save_hub(target, components)
    elif target_format == "lavis":
        save_lavis(target, components)
    else:
        _save_adapter(target, components)
    return _left_out(components, target_format)


def _save_adapter(target: Path, components: Blip2Components) -> None:
    """Save an adapter with its frozen models, and a retrieval adapter, in directories below it."""
    vision_directory, retrieval_directory = target / "vision_model", target / "retrieval"
    components.vision_model.vit.save_pretrained(vision_directory)
    if components.matcher is not None:
        save_retrieval_adapter(
            target if components.language_model is None else retrieval_directory,
            components.matcher,
            components.preprocess,
            vision_directory=vision_directory,
        )
    if components.language_model is not None:
        language_directory = target / "language_model"
        components.language_model.llm.save_pretrained(language_directory)
        components.language_model.tokenizer.save_pretrained(language_directory)
        save_generation_adapter(
            target,
            components,
            vision_directory=vision_directory,
            language_directory=language_directory,
            retrieval_directory=None if components.matcher is None else retrieval_directory,
        )


def _left_out(components: Blip2Components, target_format: Format) -> list[str]:
    if target_format == "adapter":
        return []
    lines = []
    if components.language_model is not None:
        if components.matcher is not None:
            lines.append("the retrieval model (text branch, heads): convert its own checkpoint")
        lines.append(f"the prompts {components.prompts.caption!r} and {components.prompts.question!r}")
        if target_format == "lavis":
            differing = differing_fields(components.language_model)
            lines += [
                f"{name} {value!r}: it is in the .json, which LAVIS does not read"
                for name, value in differing.items()
            ]
    elif components.matcher is not None:
        if target_format == "hub":
            dropped = [name for name in components.matcher.state_dict() if name.startswith(DROPPED)]
            lines += [f"the tensor {name}" for name in dropped]
        if (length := components.matcher.max_text_tokens) != MAX_TEXT_TOKENS:
            lines.append(f"that texts have up to {length} tokens: it is {MAX_TEXT_TOKENS} there")
    mean_and_std = (components.preprocess.mean, components.preprocess.std)
    if target_format == "lavis" and mean_and_std != (CLIP_MEAN, CLIP_STD):
        lines.append(f"mean and deviation of the pixels, {mean_and_std}: LAVIS' are CLIP's")
    return lines
