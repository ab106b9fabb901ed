"""BLIP-2 behind FastAPI as it is mostly written: transformers in async handlers, so one request at a time.

python -m benchmarks.serving.fastapi_server DIRECTORY --port 8001 [--threads 2] [--attention eager]
"""

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serving.transformers_model import (
    QUESTION,
    Caption,
    CaptionAnswer,
    CaptionBody,
    QuestionBody,
    Search,
    TransformersModel,
    build_parser,
)


class Answer(BaseModel):
    """num_tokens: the end token counts."""

    answer: str
    num_tokens: int


class QuestionAnswer(BaseModel):
    """The answer to the one question."""

    answers: list[Answer]


def main() -> None:
    arguments = build_parser("Serves BLIP-2 by transformers, one request at a time.").parse_args()
    torch.set_num_threads(arguments.threads)
    app = build_app(TransformersModel(arguments.directory, arguments.attention))
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


def build_app(model: TransformersModel) -> FastAPI:
    """One thread does it all. Handlers in several would bring torch's own threads along, and slow it down."""
    app = FastAPI()

    def generate(image: str, prompt: str, search: Search) -> Caption:
        (caption,) = model.generate(model.read_image(image), prompt, search)
        return caption

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.post("/caption")
    async def caption(body: CaptionBody) -> CaptionAnswer:
        return CaptionAnswer(captions=[generate(body.image, "", body)])

    @app.post("/vqa")
    async def vqa(body: QuestionBody) -> QuestionAnswer:
        answer = generate(body.image, QUESTION.format(body.question), body)
        return QuestionAnswer(answers=[Answer(answer=answer.text, num_tokens=answer.num_tokens)])

    return app


if __name__ == "__main__":
    main()
