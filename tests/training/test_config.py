from pathlib import Path

import pytest
import yaml

from training.config import CONFIG_DIR, ConfigError
from training.tiny.config import load_tiny_config


def changed(tmp_path: Path, **changes: object) -> Path:
    raw = yaml.safe_load((CONFIG_DIR / "tiny.yaml").read_text())
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump({**raw, **changes}))
    return path


def test_the_shipped_configuration_is_valid() -> None:
    assert load_tiny_config(CONFIG_DIR / "tiny.yaml").qformer.num_query_tokens == 28


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, "unknown key 'sead'"),
        ({"seed": "one"}, "seed is .one.; it should be a valid integer"),
        ({"world": {"seed": 0}}, "world: missing key 'num_train_scenes'"),
        ({"stage1": 3}, "stage1 is 3; it must be keys with values"),
        ({"num_questions": 21}, "num_questions is 21; choose 1 to 20"),
        (
            {
                "language_model": {
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 32,
                    "max_position_embeddings": 128,
                }
            },
            "a language model has 2 layers of 4 heads; attention supervision needs 3 of both",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tiny_config(changed(tmp_path, **changes))


def test_an_absent_file_is_named_with_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml.*shipped: tiny\.yaml"):
        load_tiny_config(tmp_path / "absent.yaml")
