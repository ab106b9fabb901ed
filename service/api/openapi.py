"""Parts of the OpenAPI document that FastAPI cannot derive: bodies that are JSON or a form, and problems."""

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api.responses import Problem
from service.api.schemas import Body, CaptionRequest, RetrieveRequest, VqaRequest
from service.errors import ServiceError

TAGS: Final = [
    {"name": "inference", "description": "Captions, answers and retrieval."},
    {"name": "operations", "description": "Probes, version and metrics."},
]
_REF: Final = "#/components/schemas/{model}"
_REQUESTS: Final[tuple[type[Body], ...]] = (CaptionRequest, VqaRequest, RetrieveRequest)


def request_body(schema: type[Body], example: dict[str, Any]) -> dict[str, Any]:
    """Return the requestBody of a route whose body is of `schema`, in JSON or as a form."""
    return {
        "required": True,
        "content": {
            "application/json": {"schema": _ref(schema), "example": example},
            "multipart/form-data": {"schema": _form_schema(schema)},
        },
    }


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the responses of these statuses, all of them problems."""
    return {
        status: {
            "description": " or ".join(sorted(_codes(status))),
            "content": {"application/problem+json": {"schema": _ref(Problem)}},
        }
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Replace the app's document by one that holds these schemas too."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                tags=TAGS,
            )
            schemas = app.openapi_schema.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(_definitions())
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _definitions() -> dict[str, Any]:
    models = [*((request, "validation") for request in _REQUESTS), (Problem, "validation")]
    _, schema = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
    definitions: dict[str, Any] = schema["$defs"]
    return definitions


def _form_schema(schema: type[Body]) -> dict[str, Any]:
    properties = dict(schema.model_json_schema(ref_template=_REF)["properties"])
    file = {"type": "string", "format": "binary", "description": "an image file"}
    properties["image"] = {"type": "array", "items": file} if properties.pop("images", None) else file
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _codes(status: int) -> set[str]:
    found, queue = set(), [ServiceError]
    while queue:
        error = queue.pop()
        queue += error.__subclasses__()
        if error.status == status and not error.__subclasses__():
            found.add(error.code)
    return found
