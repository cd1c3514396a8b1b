"""The web application: one page, and one image per request, drawn one at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dinogen.config import describe_errors
from dinogen.errors import UserError
from dinogen.hub import cached_name, shown
from dinogen.serve.gallery import MAX_SEED, Gallery, Query

log = logging.getLogger(__name__)
TEMPLATE = Path(__file__).with_name("page.html")
MAX_IMAGES = 64  # most that the page shows
MAX_QUERY = 512  # characters; the longest valid query has half as many
MAX_HEAD = 16384  # bytes of headers
MAX_WAITING = 32  # requests, including the one being drawn; a browser sends one at a time
RETRY_SECONDS = "2"  # that a client should wait if the queue is full
# the page is self-contained: it may neither load from elsewhere nor send there
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def make_app(gallery: Gallery, hosts: Sequence[str]) -> Starlette:
    """The application of a run.

    Args:
        gallery: draws the images; called from one thread at a time.
        hosts: accepted host names, so that no page from elsewhere can reach it under a name of its
            own; ``*`` accepts all.
    """
    page = _render(gallery, None)
    turn = asyncio.Lock()
    num_waiting = 0
    unwanted: set[asyncio.Future[bytes]] = set()  # begun for clients that have disconnected since

    async def index(request: Request) -> Response:
        return HTMLResponse(page)

    async def draw(query: Query, begun: asyncio.Event) -> bytes:
        async with turn:
            begun.set()
            return await run_in_threadpool(gallery.draw, query)

    async def image(request: Request) -> Response:
        nonlocal num_waiting
        try:
            query = _query(request, gallery)
        except HTTPException as error:
            if "text/html" not in request.headers.get("accept", ""):
                raise
            # somebody entered the address of an image in the browser
            return HTMLResponse(_render(gallery, error.detail), error.status_code)
        if num_waiting >= MAX_WAITING:
            text = f"{num_waiting} requests are waiting already: try again soon"
            raise HTTPException(503, text, {"retry-after": RETRY_SECONDS, "connection": "close"})
        num_waiting += 1
        begun = asyncio.Event()
        drawing = asyncio.ensure_future(draw(query, begun))
        gone = asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                return Response(status_code=499)
            png = drawing.result()
        except UserError as error:
            raise HTTPException(409, f"{error}; the run has continued: start serve again") from None
        finally:
            # a disconnected request leaves the queue at once; a drawing that has begun cannot be
            # cancelled, and keeps the lock until it is done
            num_waiting -= 1
            gone.cancel()
            if not begun.is_set():
                drawing.cancel()
            elif not drawing.done():
                unwanted.add(drawing)
                drawing.add_done_callback(_forget(unwanted))
        return Response(png, media_type="image/png")

    return Starlette(
        routes=[Route("/", index), Route("/image.png", image)],
        middleware=[
            Middleware(_Guard),
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
        ],
    )


async def _hung_up(request: Request) -> None:
    """Return when the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _forget(drawings: set[asyncio.Future[bytes]]) -> Callable[[asyncio.Future[bytes]], None]:
    """A callback for the end of a drawing that no client waits for: it logs failures."""

    def forget(drawing: asyncio.Future[bytes]) -> None:
        drawings.discard(drawing)
        if not drawing.cancelled() and (error := drawing.exception()) is not None:
            log.warning("an image that no client waits for any more: %s", error)

    return forget


def _render(gallery: Gallery, problem: str | None) -> str:
    """The page, with the facts of the run, and what was wrong with the address, if anything."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=cached_name(gallery.run) or gallery.run.resolve().name,
        facts={
            "run": shown(gallery.run),
            "family": gallery.family,
            "truncates": gallery.truncates,
            "problem": problem,
            "stages": [asdict(stage) for stage in gallery.stages.values()],
        },
        max_seed=MAX_SEED,
        max_images=MAX_IMAGES,
    )


def _query(request: Request, gallery: Gallery) -> Query:
    """The validated query of a request.

    Raises:
        HTTPException: 400, with what is wrong and how to fix it.
    """
    items = request.query_params.multi_items()
    given = dict(items)
    if len(given) < len(items):
        raise HTTPException(400, "a key is given twice: give each once")
    try:
        query = Query.model_validate(given)
        gallery.stage(query)
    except ValidationError as error:
        raise HTTPException(400, describe_errors(error, Query, "image")) from None
    except UserError as error:
        raise HTTPException(400, str(error)) from None
    return query


class _Guard:
    """Rejects oversized requests before they are read; adds headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        app = self.app
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            if len(scope["query_string"]) > MAX_QUERY:
                app = PlainTextResponse(f"more than {MAX_QUERY} characters of query", 414)
            elif sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD:
                app = PlainTextResponse(f"more than {MAX_HEAD} bytes of headers", 431)
            elif headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
                app = PlainTextResponse("requests must not have a body", 413)
        await app(scope, receive, send_guarded)
