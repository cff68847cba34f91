"""The API's description as a page at ``/docs``: Swagger UI from a pinned package, with nothing from other hosts.

FastAPI's own page loads its program from a CDN and starts it with a script inside the page. The operator of the
CDN could read the key that a user types in, and a strict ``Content-Security-Policy`` refuses both.
"""

import html
from string import Template

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from flux2_shared.web.page_files import PageFiles, page_headers

PACKAGE_FOLDER = ("fastapi_swagger", "resources")
"""Where the release of Swagger UI is; the package's own code is not used."""
FILES = {"swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = page_headers(POLICY)
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>$title</title>
  <link rel="icon" href="$base/docs/favicon-32x32.png">
  <link rel="stylesheet" href="$base/docs/swagger-ui.css">
</head>
<body>
  <noscript>Without JavaScript: <a href="$base/openapi.json">openapi.json</a></noscript>
  <div id="swagger-ui" data-url="$base/openapi.json"></div>
  <script src="$base/docs/swagger-ui-bundle.js"></script>
  <script src="$base/docs/start.js"></script>
</body>
</html>
""")
START = """const element = document.getElementById("swagger-ui");
SwaggerUIBundle({
  url: element.dataset.url,
  domNode: element,
  deepLinking: true,
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  validatorUrl: "none",
});
"""


def add_docs_routes(app: FastAPI) -> None:
    """Add the page and its files. They need no key; the routes that the page calls may."""
    files = PageFiles(HEADERS, packages=[PACKAGE_FOLDER])

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        base = html.escape(request.scope["root_path"])
        return HTMLResponse(PAGE.substitute(title=html.escape(app.title), base=base), headers=HEADERS)

    @app.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(START, media_type="text/javascript", headers=HEADERS)

    @app.get("/docs/{name}", include_in_schema=False)
    async def file_of_docs(name: str, request: Request) -> Response:
        if name not in FILES:
            raise HTTPException(404)
        return await files.get_response(name, request.scope)
