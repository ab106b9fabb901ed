"""BLIP-2 on LitServe: transformers on batches of captions, one worker.

python -m benchmarks.serving.litserve_server DIRECTORY --port 8002 [--threads 2] [--attention eager]
    [--max-batch-size 16] [--batch-timeout 0.05]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import litserve
import torch
from torch import Tensor

from benchmarks.serving.transformers_model import (
    Caption,
    CaptionAnswer,
    CaptionBody,
    Search,
    TransformersModel,
    build_parser,
)


class Inputs(NamedTuple):
    """Model inputs of a batch; pixel_values: [B, 3, S, S]."""

    pixel_values: Tensor
    search: Search


class CaptionApi(litserve.LitAPI):
    """Decode each image, stack the images, and run `generate` once per batch."""

    def __init__(
        self, directory: Path, attention: str, num_threads: int, *, max_batch_size: int, batch_timeout: float
    ) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout, api_path="/caption")
        self._directory = directory
        self._attention = attention
        self._num_threads = num_threads

    def setup(self, device: str) -> None:  # noqa: ARG002 - the only one
        torch.set_num_threads(self._num_threads)
        self._model = TransformersModel(self._directory, self._attention)

    def decode_request(self, request: dict[str, Any]) -> Inputs:
        body = CaptionBody.model_validate(request)
        return Inputs(self._model.decode_image(body.image), Search(**body.model_dump(exclude={"image"})))

    def batch(self, inputs: Sequence[Inputs]) -> Inputs:
        (search,) = {one.search for one in inputs}  # all requests of the benchmark have the same parameters
        return Inputs(torch.cat([one.pixel_values for one in inputs]), search)

    def predict(self, x: Inputs) -> list[Caption]:
        return self._model.generate(x.pixel_values, "", x.search)

    def unbatch(self, output: list[Caption]) -> list[Caption]:
        return output

    def encode_response(self, output: Caption) -> dict[str, Any]:
        return CaptionAnswer(captions=[output]).model_dump()


def main() -> None:
    parser = build_parser("Serve captions with transformers and LitServe.")
    parser.add_argument("--max-batch-size", type=int, default=16)
    parser.add_argument("--batch-timeout", type=float, default=0.05, help="seconds")
    arguments = parser.parse_args()
    api = CaptionApi(
        arguments.directory,
        arguments.attention,
        arguments.threads,
        max_batch_size=arguments.max_batch_size,
        batch_timeout=arguments.batch_timeout,
    )
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=arguments.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
