"""Turns a checkpoint of any kind into another kind, and says what that has no place for."""

from pathlib import Path
from typing import Literal

from model.checkpoints.adapter.save import save_generation_adapter, save_retrieval_adapter
from model.checkpoints.hub.save import DROPPED, save_hub
from model.checkpoints.lavis.save import save_lavis
from model.components import Blip2Parts
from model.errors import CheckpointError
from model.matching import MAX_TEXT_TOKENS
from model.preprocess import CLIP_MEAN, CLIP_STD

Format = Literal["hub", "lavis", "adapter"]


def convert(parts: Blip2Parts, target: Path, target_format: Format) -> list[str]:
    """Writes a loaded model in a format; gives a line for everything that the format cannot hold.

    target: a directory, or for LAVIS a .pth file. Weights are written in the types they are held in.
    Raises CheckpointError where the target exists, or cannot hold such a model.
    """
    beside = target.parent.glob(f"{target.stem}.*") if target_format == "lavis" else [target]
    for there in beside:
        if there.is_file() or (there.is_dir() and any(there.iterdir())):
            raise CheckpointError(f"{there} exists; name a new one, for nothing is overwritten")
    if target_format == "lavis" and target.suffix != ".pth":
        raise CheckpointError(f"a file of LAVIS ends in .pth, {target} does not; name it so")
    if parts.question_reader is not None and target_format != "adapter":
        raise CheckpointError(
            f"the Q-Former is shown the question, and the format {target_format!r} has no such model; "
            "convert to an adapter"
        )
    if target_format == "hub":
        save_hub(target, parts)
    elif target_format == "lavis":
        save_lavis(target, parts)
    else:
        _save_adapter(target, parts)
    return _left_out(parts, target_format)


def _save_adapter(target: Path, parts: Blip2Parts) -> None:
    """Writes an adapter with its frozen parts, and a retrieval adapter, in directories below it."""
    vision_directory, retrieval_directory = target / "vision_model", target / "retrieval"
    parts.vision_model.tower.save_pretrained(vision_directory)
    if parts.matcher is not None:
        save_retrieval_adapter(
            target if parts.language_model is None else retrieval_directory,
            parts.matcher,
            parts.preprocess,
            vision_directory=vision_directory,
        )
    if parts.language_model is not None:
        language_directory = target / "language_model"
        parts.language_model.llm.save_pretrained(language_directory)
        parts.language_model.tokenizer.save_pretrained(language_directory)
        save_generation_adapter(
            target,
            parts,
            vision_directory=vision_directory,
            language_directory=language_directory,
            retrieval_directory=None if parts.matcher is None else retrieval_directory,
        )


def _left_out(parts: Blip2Parts, target_format: Format) -> list[str]:
    if target_format == "adapter":
        return []
    lines = []
    if parts.language_model is not None:
        if parts.matcher is not None:
            lines.append("the retrieval model (text branch, heads): convert its own checkpoint")
        lines.append(f"the prompts {parts.prompts.caption!r} and {parts.prompts.question!r}")
    elif parts.matcher is not None:
        if target_format == "hub":
            held = [name for name in parts.matcher.state_dict() if name.startswith(DROPPED)]
            lines += [f"the tensor {name}" for name in held]
        if (length := parts.matcher.max_text_tokens) != MAX_TEXT_TOKENS:
            lines.append(f"that texts have up to {length} tokens: it is {MAX_TEXT_TOKENS} there")
    mean_and_std = (parts.preprocess.mean, parts.preprocess.std)
    if target_format == "lavis" and mean_and_std != (CLIP_MEAN, CLIP_STD):
        lines.append(f"mean and deviation of the pixels, {mean_and_std}: LAVIS' are CLIP's")
    return lines
