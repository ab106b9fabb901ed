"""BLIP-2 on FastAPI, as it is commonly written: transformers in async handlers, one request at a time.

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
    """An answer; num_tokens includes the end token."""

    answer: str
    num_tokens: int


class QuestionAnswer(BaseModel):
    """Response body with one answer."""

    answers: list[Answer]


def main() -> None:
    arguments = build_parser("Serve BLIP-2 with transformers, one request at a time.").parse_args()
    torch.set_num_threads(arguments.threads)
    app = build_app(TransformersModel(arguments.directory, arguments.attention))
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


def build_app(model: TransformersModel) -> FastAPI:
    """Build the application. Handlers run in one thread: several would each start torch's threads."""
    app = FastAPI()

    def generate(image: str, prompt: str, search: Search) -> Caption:
        (caption,) = model.generate(model.decode_image(image), prompt, search)
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
