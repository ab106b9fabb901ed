from pathlib import Path

from training.tiny.gates import GatePlan
from training.world.scenes import iter_scenes


def test_the_default_plan_shares_no_scene_with_training_or_evaluation(tmp_path: Path) -> None:
    validation = set(GatePlan(tmp_path, num_scenes=50).scenes("unseen"))
    others = [
        set(iter_scenes(0, "train", 50)),
        set(iter_scenes(0, "unseen", 50)),
        set(iter_scenes(1, "unseen", 50)),
    ]
    assert all(not validation & other for other in others)
