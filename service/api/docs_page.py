"""The page /docs, from the service's own files: Swagger UI as fastapi-offline packs it, and no other host."""

from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, RedirectResponse

_SCRIPT, _STYLE, _ICON = "swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"
_CACHED: Final = {"Cache-Control": "public, max-age=86400"}
_METHODS: Final = ["GET", "HEAD"]


class DocsRoutes:
    """The page, its files, and the redirect from / to it.

    Its links are relative, so that a proxy may put any prefix before them.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._folder = Path(str(files("fastapi_offline") / "static"))

    def router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)
        router.add_api_route("/", self.home, methods=_METHODS)
        router.add_api_route("/docs", self.page, methods=_METHODS)
        for name in (_SCRIPT, _STYLE, _ICON):
            router.add_api_route(f"/docs/{name}", self._sender(name), methods=_METHODS)
        return router

    async def home(self, request: Request) -> Response:
        return RedirectResponse(f"{request.scope['root_path']}/docs")

    async def page(self) -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=self._title,
            swagger_js_url=f"docs/{_SCRIPT}",
            swagger_css_url=f"docs/{_STYLE}",
            swagger_favicon_url=f"docs/{_ICON}",
            swagger_ui_parameters={"validatorUrl": None},  # else a badge of swagger.io
        )

    def _sender(self, name: str) -> Callable[[], Awaitable[Response]]:
        async def send() -> Response:
            return FileResponse(self._folder / name, headers=_CACHED)

        return send
