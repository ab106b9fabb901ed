"""Parts of the OpenAPI document that FastAPI cannot derive: bodies that are JSON or a form, and problems."""

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api.disconnect import MAX_TIMEOUT_MS, TIMEOUT_HEADER
from service.api.documented import without_null
from service.api.responses import Problem
from service.api.retrieve_schema import Candidates, RetrieveRequest
from service.api.schemas import Body, CaptionRequest, VqaRequest
from service.errors import ServiceError
from service.runtime.settings import Settings

TAGS: Final = [
    {"name": "inference", "description": "Captions, answers and retrieval."},
    {"name": "operations", "description": "Probes, version and metrics."},
]
PARAMETERS: Final = [
    {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "required": False,
        "description": "a deadline from the first byte, in milliseconds; past it the answer is 504",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS},
    }
]
_SETTINGS_IN: Final = ("maxItems", "maxLength", "maximum")  # where `documented` may name a setting
_REF: Final = "#/components/schemas/{model}"
_FILE: Final = {"type": "string", "format": "binary", "description": "an image file"}
_REQUESTS: Final[tuple[type[Body], ...]] = (CaptionRequest, VqaRequest, RetrieveRequest)


def request_body(schema: type[Body], settings: Settings, example: dict[str, Any]) -> dict[str, Any]:
    """Return the requestBody of a route whose body is of `schema`, in JSON or as a form."""
    return {
        "required": True,
        "content": {
            "application/json": {"schema": _ref(schema), "example": example},
            "multipart/form-data": {"schema": _with_settings(_form_schema(schema), settings)},
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


def install(app: FastAPI, settings: Settings) -> None:
    """Replace the app's document by one that holds these schemas too, with the limits of the settings."""

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
            schemas.update(_with_settings(_definitions(), settings))
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _definitions() -> dict[str, Any]:
    models = [*((request, "validation") for request in _REQUESTS), (Problem, "validation")]
    _, schema = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
    definitions: dict[str, Any] = schema["$defs"]
    for request in _REQUESTS:
        _allow_nulls(definitions[request.__name__])
    return definitions


def _allow_nulls(schema: dict[str, Any]) -> None:
    """Allow null for each field that is not required: it is as good as absent."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and "type" in field:  # others have an anyOf with null
            field["type"] = [field["type"], "null"]


def _with_settings(schema: Any, settings: Settings) -> Any:
    """Return a schema in which the names of settings are replaced by their values."""
    if isinstance(schema, dict):
        return {
            key: getattr(settings, value)
            if key in _SETTINGS_IN and isinstance(value, str)
            else _with_settings(value, settings)
            for key, value in schema.items()
        }
    return [_with_settings(each, settings) for each in schema] if isinstance(schema, list) else schema


def _form_schema(schema: type[Body]) -> dict[str, Any]:
    """Return the schema of a form: images are files, one field repeats, and nothing is null."""
    form = schema.model_json_schema(ref_template=_REF)
    form.pop("$defs", None)
    properties = form["properties"]
    images = properties.pop("images", None)
    properties["image"] = {**_not_null(images), "items": _FILE} if images else _FILE
    form["properties"] = {name: _not_null(value) for name, value in properties.items()}
    if images:
        form["required"] = ["image"]
        form["allOf"] = form["allOf"][1:]
    form["allOf"] = without_null(form["allOf"])
    if schema is RetrieveRequest:
        _add_candidate_parts(form)
    return form


def _add_candidate_parts(form: dict[str, Any]) -> None:
    """Add the candidates of /retrieve as parts of their own, in place of their object."""
    members = Candidates.model_json_schema()["properties"]
    form["properties"] |= {
        "images": {**_not_null(members["images"]), "items": _FILE},
        "texts": _not_null(members["texts"]),
    }
    form.pop("required")
    form["allOf"].append({"oneOf": [{"required": [name]} for name in ("candidates", "images", "texts")]})
    (modes,) = (rule["anyOf"] for rule in form["allOf"] if "anyOf" in rule)
    modes += [{"required": ["text", "images"]}, {"required": ["image", "texts"]}]


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field without its null, and of a list without the single value for it."""
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    if not options:
        return schema
    return {**{key: value for key, value in schema.items() if key not in ("anyOf", "default")}, **options[-1]}


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
