"""MLflow's registry webhooks as releases: a new version of a watched model is quantized.

Prefect's server takes events of its own shape only, so this small server stands between: it checks
MLflow's signature (Standard Webhooks: HMAC-SHA256 over `id.timestamp.body`) and launches the
deployment `release/release` for versions that carry the tag `dpq.recipe`, with the version's source
as `model.id`, under the watched model's name with `-w4a8` after it. A delivery that is repeated
launches nothing: a version is one run.
"""

import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import httpx
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.orchestration.client import ClientError, launch

PATH = "/mlflow"
RECIPE_TAG = "dpq.recipe"
_FRESH = 300  # s, that a delivery's time may differ from ours
_MOST_BYTES = 1 << 20  # of a delivery; MLflow's have a few thousand
_READABLE = re.compile(r"(file://)?/|s3://")


class WebhookError(RuntimeError):
    """A delivery that is refused, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def application(secret: str) -> Starlette:
    """Takes MLflow's deliveries at `PATH`.

    200 with the id of the run; 204 what is not about a version with a recipe; 400 no delivery of
    MLflow's; 401 another signature, or too old; 413 more than a delivery has; 422 a release that
    Prefect does not take; 503 no answer of Prefect's, upon which MLflow tries again.
    """

    async def receive(request: Request) -> Response:
        try:
            check_stamp(request.headers)
            body = await bounded_body(request)
            check_signature(secret, request.headers, body)
            wanted = requested(body)
            if wanted is None:
                return Response(status_code=204)
            key, parameters = wanted
            run = await run_in_threadpool(launch, "release/release", parameters, key)
            return JSONResponse({"run": str(run)})
        except WebhookError as error:
            return JSONResponse({"error": str(error)}, error.status)
        except ClientError as error:
            return JSONResponse({"error": str(error)}, 422)
        except httpx.HTTPError as error:
            return JSONResponse({"error": f"Prefect does not answer: {error}"}, 503)

    return Starlette(routes=[Route(PATH, receive, methods=["POST"])])


def check_signature(secret: str, headers: Mapping[str, str], body: bytes) -> None:
    """Raises WebhookError (401) unless whoever sent this knows the secret."""
    delivery, stamp, signature = (
        headers.get(f"x-mlflow-{name}", "") for name in ("delivery-id", "timestamp", "signature")
    )
    content = f"{delivery}.{stamp}.".encode() + body
    digest = hmac.new(secret.encode(), content, hashlib.sha256).digest()
    # As bytes: a text that is not ASCII cannot be compared, and a header can hold one.
    if not hmac.compare_digest(b"v1," + base64.b64encode(digest), signature.encode()):
        raise WebhookError(401, "the signature is not that of this secret")


def check_stamp(headers: Mapping[str, str]) -> None:
    """Raises WebhookError (401) unless a delivery says that it was sent just now."""
    stamp = headers.get("x-mlflow-timestamp", "")
    if not re.fullmatch(r"[0-9]{1,12}", stamp) or abs(time.time() - int(stamp)) > _FRESH:
        raise WebhookError(401, f"delivered at {stamp[:40]!r}, more than {_FRESH} s from now")


async def bounded_body(request: Request) -> bytes:
    """A request's body; no more of it is read than a delivery has, whoever sent it.

    Raises:
        WebhookError: 413, it is longer.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            raise WebhookError(413, f"more than {_MOST_BYTES} bytes: no delivery of MLflow's")
    return body


def requested(body: bytes) -> tuple[str, dict[str, Any]] | None:
    """Idempotency key and parameters of the release that a delivery asks for, if it asks for one.

    Raises:
        WebhookError: 400, not what MLflow sends; 422, a source that a recipe cannot read.
    """
    try:
        delivery = json.loads(body)
        if (delivery["entity"], delivery["action"]) != ("model_version", "created"):
            return None
        version = delivery["data"]
        name, number, source = version["name"], version["version"], version["source"]
        recipe = (version["tags"] or {}).get(RECIPE_TAG)
        readable = recipe is None or bool(_READABLE.match(source))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WebhookError(400, f"no delivery of MLflow's: {error!r}") from error
    if recipe is None:
        return None
    if not readable:
        raise WebhookError(
            422, f"{name} version {number}: source {source}: a folder or an s3:// address is needed"
        )
    folder = unquote(source.removeprefix("file://")) if "file://" in source else source
    settings = {"model.id": folder, "registry.name": f"{name}-w4a8"}
    written = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    written.append("registry.any_base_model=true")  # the name says which model it is of
    return f"mlflow/{name}/{number}", {"recipe": recipe, "settings": written}
