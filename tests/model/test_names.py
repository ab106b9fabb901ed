"""The names of the package: imported at their first use."""

import subprocess
import sys

import model


def test_every_name_is_there() -> None:
    assert all(getattr(model, name).__name__ == name for name in model.__all__)
    assert not hasattr(model, "no_such_name")


def test_reading_image_files_does_not_import_torch() -> None:
    code = "import sys, model.images.limits; assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
