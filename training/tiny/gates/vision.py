"""The gate of the image encoder: linear probes of each object's attributes and position.

The probes are fitted on training scenes and tested on unseen ones. Their input is the mean of the normalised
features of an object's patches.
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
from training.tiny.gates.plan import VALIDATION_SPLITS, GatePlan, prepare_pixels
from training.tiny.gates.probe import fit_probe
from training.tiny.gates.results import Bar, Measurement
from training.tiny.patch_labels import PATCH_CLASSES, label_patches
from training.world.scenes import HELD_OUT_PAIRS, SIZES, Scene, SceneObject, iter_scenes

SceneEncoder = Callable[[Sequence[Scene]], Tensor]  # image features [B, P, V], class token first

_BATCH_SIZE = 64
_ATTRIBUTE_BAR = 0.95
_POSITION_BAR = 0.95
_POSITION = "position within one cell"


@dataclass(frozen=True, slots=True)
class ObjectFeatures:
    """N objects: `features` [N, V], `classes` [N, 6] in the order of `PATCH_CLASSES`.

    num_objects: of the scene of each object.
    """

    features: Tensor
    classes: Tensor
    objects: Sequence[SceneObject]
    num_objects: Sequence[int]


def measure_vision_model(phase: str, plan: GatePlan) -> Measurement:
    """Measure the image encoder of a run."""
    encoder = load_vision_model(plan.result(phase)).to(plan.device)
    preprocess = ImagePreprocessor(encoder.image_size)

    def encode(scenes: Sequence[Scene]) -> Tensor:
        return encoder(prepare_pixels(scenes, preprocess).to(plan.device)).cpu()

    return measure_encoder(encode, plan)


def measure_encoder(encode: SceneEncoder, plan: GatePlan) -> Measurement:
    """Fit the probes to the features of `encode`, and compare their accuracies with the bars."""
    scenes = list(iter_scenes(plan.probe_seed, "train", plan.num_probe_scenes))
    fitted = pool_objects(encode, scenes)
    probes = [
        fit_probe(fitted.features, fitted.classes[:, k], count)
        for k, count in enumerate(PATCH_CLASSES.values())
    ]
    figures: dict[str, Figures] = {}
    for split in VALIDATION_SPLITS:
        tested = pool_objects(encode, plan.scenes(split))
        predicted = torch.stack([probe.predict(tested.features) for probe in probes], dim=1)  # [N, 6]
        hits = _hits(predicted, tested.classes)
        for name, members in _groups(tested):
            if any(members):
                mask = torch.tensor(members)
                figures[f"{split}{name}"] = {
                    key: float(hit[mask].float().mean()) for key, hit in hits.items()
                }
    return Measurement(figures, _bars(figures["unseen"]))


def pool_objects(encode: SceneEncoder, scenes: Sequence[Scene]) -> ObjectFeatures:
    """Compute the mean of the normalised features of each object's patches."""
    features, classes = [], []
    for start in tqdm(range(0, len(scenes), _BATCH_SIZE), desc="objects", mininterval=5):
        batch = scenes[start : start + _BATCH_SIZE]
        with torch.inference_mode():
            encoded = encode(batch)  # [B, P, V]
        patches = F.layer_norm(encoded, encoded.shape[-1:])[:, 1:]  # [B, P-1, V]
        for scene, scene_patches in zip(batch, patches.clone(), strict=True):
            object_masks, labels = _object_masks(scene, isqrt(len(scene_patches)))
            weights = object_masks.float() / object_masks.sum(dim=1, keepdim=True)
            features.append(weights @ scene_patches)  # [objects, V]
            classes.append(labels)
    return ObjectFeatures(
        features=torch.cat(features),
        classes=torch.cat(classes),
        objects=[item for scene in scenes for item in scene.objects],
        num_objects=[len(scene.objects) for scene in scenes for _ in scene.objects],
    )


def _object_masks(scene: Scene, grid_side: int) -> tuple[Tensor, Tensor]:
    """Return the patch masks [objects, P-1] of a scene's objects and their classes [objects, 6].

    A patch that lies on two objects belongs to the later one, unless the earlier would have no patch.
    """
    single_object_scenes = [Scene((item,), scene.background, scene.noise_seed) for item in scene.objects]
    labels = label_patches(single_object_scenes, grid_side)
    covered = labels.on_object  # [objects, P-1]
    num_covering = covered.int().flip(0).cumsum(dim=0).flip(0)  # this object and the later ones
    masks = covered & (num_covering == 1)
    masks = torch.where(masks.any(dim=1, keepdim=True), masks, covered)
    classes = torch.stack([row[mask][0] for row, mask in zip(labels.patches, covered, strict=True)])
    return masks, classes


def _hits(predicted: Tensor, classes: Tensor) -> dict[str, Tensor]:
    names = list(PATCH_CLASSES)
    hits = {name: predicted[:, k] == classes[:, k] for k, name in enumerate(names)}
    near = {axis: _is_near(predicted, classes, names.index(axis)) for axis in ("x", "y")}
    within = {f"{axis} within one cell": hit for axis, hit in near.items()}
    return {**hits, **within, _POSITION: near["x"] & near["y"]}


def _is_near(predicted: Tensor, classes: Tensor, column: int) -> Tensor:
    return (predicted[:, column] - classes[:, column]).abs() <= 1


def _groups(tested: ObjectFeatures) -> Iterator[tuple[str, list[bool]]]:
    """Yield groups of objects: a name and the membership of each object."""
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
