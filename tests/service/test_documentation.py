"""What the documents say of the settings is what the settings are."""

import re
from pathlib import Path

from service.settings import Settings

TABLE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_every_setting_and_its_default_is_in_the_table_and_no_other() -> None:
    rows = re.findall(
        r"^\| `BLIP2_([A-Z0-9_]+)` \| `([^`]*)` \|", TABLE.read_text(encoding="utf-8"), re.MULTILINE
    )
    defaults = {name.upper(): str(field.default) for name, field in Settings.model_fields.items()}
    assert dict(rows) == {name: "unset" if value == "None" else value for name, value in defaults.items()}
