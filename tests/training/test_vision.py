import torch

from training.scenes import SHAPES, Scene, SceneObject
from training.vision import PATCH_CLASSES, PatchProbe, label_patches

CIRCLE = SceneObject("star", "green", "large", "striped", x=0.25, y=0.75, radius=0.18)


def test_patches_within_an_object_carry_its_labels_and_the_others_none() -> None:
    labels = label_patches([Scene((CIRCLE,), "black", noise_seed=0)], grid_side=8)
    grid = labels.patches.view(8, 8, len(PATCH_CLASSES))
    on_object = grid[..., 0] != -100
    # the box spans 0.07 … 0.43 across and 0.57 … 0.93 down: the patches centred inside it
    rows, columns = torch.where(on_object)
    assert set(rows.tolist()) == {4, 5, 6, 7}
    assert set(columns.tolist()) == {0, 1, 2, 3}
    assert grid[6, 2].tolist() == [3, SHAPES.index("star"), 1, 1, 3, 9]
    assert labels.images.tolist() == [[2, 0]]


def test_the_probe_learns_to_read_features_that_hold_the_labels() -> None:
    torch.manual_seed(0)
    labels = label_patches([Scene((CIRCLE,), "black", noise_seed=0)], grid_side=8)
    features = torch.randn(1, 65, 32)
    probe = PatchProbe(32, grid_side=8)
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.02)
    first = probe.losses(features, labels)["loss"].item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = probe.losses(features, labels)["loss"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
    assert probe.accuracies(features, labels)["color"] == 1.0
