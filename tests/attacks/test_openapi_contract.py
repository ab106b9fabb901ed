"""The OpenAPI document and the validation agree: requests generated from the one are judged by the other.

schemathesis runs all its checks over a real service, with 50 examples an operation; a warning is a failure.
The deployment's limits of texts and tokens fit the 256 positions of `tiny`: how many tokens a text will have,
no schema can say. `contract_hooks` has the images, and two rules that compare numbers.
"""

import os
import subprocess
import sysconfig
from pathlib import Path

from tests.integration.processes import service

HERE = Path(__file__).parent
NUM_EXAMPLES = 50
TIMEOUT_S = 240
LIMITS = {
    "max_text_chars": 32,
    "max_questions": 2,
    "max_new_tokens": 32,
    "max_images": 4,
    "max_candidates": 8,
    "log_level": "WARNING",
}


def test_requests_generated_from_the_document_are_accepted_or_refused_as_it_says(tmp_path: Path) -> None:
    program = Path(sysconfig.get_path("scripts")) / "schemathesis"
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parents[1]),
        "SCHEMATHESIS_HOOKS": "tests.attacks.contract_hooks",
    }
    with service(tmp_path, **LIMITS) as server:
        done = subprocess.run(
            [
                program,
                f"--config-file={HERE / 'schemathesis.toml'}",
                "run",
                f"{server.url}/openapi.json",
                f"--max-examples={NUM_EXAMPLES}",
                "--generation-database=none",
                "--no-color",
            ],
            cwd=tmp_path,  # it writes a cache
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "No issues found" in done.stdout
        assert "Traceback" not in server.errors
