"""The gate of the image encoder: what a linear probe reads off the patches of each object.

A probe is fitted on training scenes, to the mean of the normalised features of an object's own patches, and
tested on objects of scenes the encoder has not seen.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.checkpoints import load_vision_model
from model.preprocess import ImagePreprocessor
from training.evaluation.metrics import Figures
from training.tiny.gates.findings import Bar, Measured
from training.tiny.gates.plan import VALIDATION_SPLITS, Plan, prepare_pixels
from training.tiny.gates.probe import fit_probe
from training.tiny.vision import PATCH_CLASSES, label_patches
from training.world.scenes import HELD_OUT_PAIRS, SIZES, Scene, SceneObject, iter_scenes

SceneEncoder = Callable[[Sequence[Scene]], Tensor]  # image features [B, P, V], class token first

_BATCH = 64
_ATTRIBUTE_BAR = 0.95
_POSITION_BAR = 0.95
_POSITION = "position within one cell"


@dataclass(frozen=True, slots=True)
class ObjectFeatures:
    """N objects: `features` [N, V], `classes` [N, 6] as `PATCH_CLASSES` counts them, the objects
    themselves, and how many objects the scene of each holds."""

    features: Tensor
    classes: Tensor
    objects: Sequence[SceneObject]
    num_objects: Sequence[int]


def measure_vision_model(phase: str, plan: Plan) -> Measured:
    """Measures the encoder of a run."""
    encoder = load_vision_model(plan.result(phase)).to(plan.device)
    preprocess = ImagePreprocessor(encoder.image_size)

    def encode(scenes: Sequence[Scene]) -> Tensor:
        return encoder(prepare_pixels(scenes, preprocess).to(plan.device)).cpu()

    return measure_encoder(encode, plan)


def measure_encoder(encode: SceneEncoder, plan: Plan) -> Measured:
    """Fits the probes to features that `encode` gives, and judges them."""
    training = list(iter_scenes(plan.probe_seed, "train", plan.num_probe_scenes))
    known = pool_objects(encode, training)
    probes = [
        fit_probe(known.features, known.classes[:, k], count)
        for k, count in enumerate(PATCH_CLASSES.values())
    ]
    figures: dict[str, Figures] = {}
    for split in VALIDATION_SPLITS:
        tested = pool_objects(encode, plan.scenes(split))
        predicted = torch.stack([probe.predict(tested.features) for probe in probes], dim=1)  # [N, 6]
        hits = _hits(predicted, tested.classes)
        for name, chosen in _groups(tested):
            if any(chosen):
                mask = torch.tensor(chosen)
                figures[f"{split}{name}"] = {
                    key: float(hit[mask].float().mean()) for key, hit in hits.items()
                }
    return Measured(figures, _bars(figures["unseen"]))


def pool_objects(encode: SceneEncoder, scenes: Sequence[Scene]) -> ObjectFeatures:
    """The mean of the normalised features of each object's own patches."""
    features, classes = [], []
    for start in tqdm(range(0, len(scenes), _BATCH), desc="objects", mininterval=5):
        batch = scenes[start : start + _BATCH]
        with torch.inference_mode():
            encoded = encode(batch)  # [B, P, V]
        patches = F.layer_norm(encoded, encoded.shape[-1:])[:, 1:]  # [B, P-1, V]
        for scene, of_scene in zip(batch, patches.clone(), strict=True):
            own, labels = _own_patches(scene, isqrt(len(of_scene)))
            weights = own.float() / own.sum(dim=1, keepdim=True)
            features.append(weights @ of_scene)  # [objects, V]
            classes.append(labels)
    return ObjectFeatures(
        features=torch.cat(features),
        classes=torch.cat(classes),
        objects=[item for scene in scenes for item in scene.objects],
        num_objects=[len(scene.objects) for scene in scenes for _ in scene.objects],
    )


def _own_patches(scene: Scene, grid_side: int) -> tuple[Tensor, Tensor]:
    """Which patches are each object's, [objects, P-1], as `label_patches` has it; its classes, [objects, 6].

    A patch that two objects reach into is the later one's, unless the other would be left without any.
    """
    alone = [Scene((item,), scene.background, scene.noise_seed) for item in scene.objects]
    labels = label_patches(alone, grid_side)
    reached = labels.on_object  # [objects, P-1]
    claims = reached.int().flip(0).cumsum(dim=0).flip(0)  # by this object and the later ones
    own = reached & (claims == 1)
    own = torch.where(own.any(dim=1, keepdim=True), own, reached)
    classes = torch.stack([row[mask][0] for row, mask in zip(labels.patches, reached, strict=True)])
    return own, classes


def _hits(predicted: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    names = list(PATCH_CLASSES)
    hits = {name: predicted[:, k] == wanted[:, k] for k, name in enumerate(names)}
    near = {axis: _is_near(predicted, wanted, names.index(axis)) for axis in ("x", "y")}
    within = {f"{axis} within one cell": hit for axis, hit in near.items()}
    return {**hits, **within, _POSITION: near["x"] & near["y"]}


def _is_near(predicted: Tensor, wanted: Tensor, column: int) -> Tensor:
    return (predicted[:, column] - wanted[:, column]).abs() <= 1


def _groups(tested: ObjectFeatures) -> Iterator[tuple[str, list[bool]]]:
    """Names of groups of objects, each with who belongs to it."""
    yield "", [True] * len(tested.objects)
    for count in sorted(set(tested.num_objects)):
        yield f", {count}_objects", [number == count for number in tested.num_objects]
    for size in SIZES:
        yield f", {size}", [item.size == size for item in tested.objects]
    yield ", the held-out object alone", [(o.color, o.shape) in HELD_OUT_PAIRS for o in tested.objects]


def _bars(unseen: Figures) -> tuple[Bar, ...]:
    attributes = [
        Bar(f"unseen: {name}", unseen[name], _ATTRIBUTE_BAR) for name in ("color", "size", "texture", "shape")
    ]
    return (*attributes, Bar(f"unseen: {_POSITION}", unseen[_POSITION], _POSITION_BAR))
