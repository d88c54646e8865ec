"""The HTTP side of a service: what is sent to it, what it answers, and what it refuses."""

# Annotations are left as they are: FastAPI reads those of functions that stand inside another one.
import asyncio
import base64
import contextlib
import hmac
import io
import logging
import platform
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from unperturb.data.pictures import Picture, decode, stored_size
from unperturb.data.sets import DataError
from unperturb.defenses import Protected
from unperturb.runs import digest_of, environment
from unperturb.serving.batching import Batcher, QueueFullError
from unperturb.serving.inference import Answer, Shape, answer_batch, check_model
from unperturb.serving.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

MAGIC = {b"\x89PNG\r\n\x1a\n": ("PNG",), b"\xff\xd8\xff": ("JPEG",)}
PATHS = ("/health", "/info", "/purify", "/classify", "/metrics", "/docs", "/openapi.json")
_log = logging.getLogger("unperturb.serving")


@dataclass(frozen=True)
class Served:
    """What a service is made of.

    model: in eval mode, on `device`. name: what it is called. shape: (C, H, W) of its images. token: what a client has
    to know, if anything.
    """

    model: Protected
    name: str
    shape: Shape
    device: torch.device
    limits: Limits
    token: str | None = None


# What is answered ---------------------------------------------------------------------------------------------------


class Problem(BaseModel):
    detail: str = Field(description="What was wrong, and what to do.")


class ClassProbability(BaseModel):
    label: int = Field(description="A class, as the number of its logit.")
    probability: float


class Prediction(BaseModel):
    prediction: int = Field(description="The most probable class.")
    confidence: float = Field(description="Its probability, by the classifier's softmax.")
    top: list[ClassProbability] = Field(description="The most probable classes, that first.")


class Detector(BaseModel):
    score: float
    threshold: float | None = Field(description="A score above it is rejected; none was set where it is null.")


class Classified(BaseModel):
    before: Prediction = Field(description="By the classifier alone.")
    after: Prediction = Field(description="By the classifier behind the purifier.")
    changed: bool = Field(description="Whether the two predictions differ.")
    suspicion: float = Field(
        description="Total variation distance between the class probabilities before and after, from 0 to 1."
    )
    detectors: list[Detector] = Field(description="Those of the purifier, if it has any.")
    rejected: bool = Field(description="Whether one of the detectors is above its threshold.")
    height: int = Field(description="Of the picture that was sent, in pixels.")
    width: int
    resized: bool = Field(description="Whether it was resized and cropped to the size that the model takes.")
    restored_png: str | None = Field(description="The restored picture as base64, where it was asked for.")


class Size(BaseModel):
    channels: int
    height: int
    width: int


class Info(BaseModel):
    model: str
    classifier: str
    purifier: str
    random: bool = Field(description="Whether two answers to one picture may differ.")
    input: Size = Field(description="Pictures are resized and cropped to it.")
    classes: int
    detectors: int
    formats: list[str]
    device: str
    weights_sha256: str
    limits: dict[str, int | float]
    versions: dict[str, str]


class Health(BaseModel):
    status: str


def _info(served: Served, classes: int) -> Info:
    channels, height, width = served.shape
    net, defense = served.model.classifier, served.model.defense
    return Info(
        model=served.name,
        classifier=str(getattr(net, "called", type(net).__name__)),
        purifier=defense.spec["name"] if defense.spec else type(defense).__name__,
        random=defense.random,
        input=Size(channels=channels, height=height, width=width),
        classes=classes,
        detectors=len(defense.thresholds),
        formats=["PNG", "JPEG"],
        device=str(served.device),
        weights_sha256=digest_of(served.model.state_dict()),
        limits=asdict(served.limits),
        versions={"python": platform.python_version(), **environment()["versions"]},
    )


def _prediction(probabilities: Tensor, top: int) -> Prediction:
    values, labels = probabilities.topk(min(top, len(probabilities)))
    best = [ClassProbability(label=k, probability=p) for k, p in zip(labels.tolist(), values.tolist())]
    return Prediction(prediction=best[0].label, confidence=best[0].probability, top=best)


def _classified(
    answer: Answer, thresholds: Sequence[float], sent: tuple[int, int], shape: Shape, top: int, png: bytes | None
) -> Classified:
    before, after = _prediction(answer.before, top), _prediction(answer.after, top)
    scores = answer.scores.tolist()
    return Classified(
        before=before,
        after=after,
        changed=before.prediction != after.prediction,
        suspicion=answer.suspicion,
        detectors=[
            Detector(score=s, threshold=None if t == float("inf") else t)
            for s, t in zip(scores, thresholds, strict=True)
        ],
        rejected=any(s > t for s, t in zip(scores, thresholds)),
        height=sent[0],
        width=sent[1],
        resized=sent != shape[1:],
        restored_png=None if png is None else base64.b64encode(png).decode(),
    )


def _png(image: Tensor) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    pixels = image.squeeze(0) if len(image) == 1 else image.permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


# What is counted ----------------------------------------------------------------------------------------------------


class _Metrics:
    """What Prometheus is told; a registry of its own, so that one program may hold several services."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # CPU seconds and memory
        self.requests = Counter("unperturb_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "unperturb_request_seconds", "Seconds from a request to its answer.", ["path"], registry=self.registry
        )
        self.under_way = Gauge(
            "unperturb_queue_requests", "Requests that were taken and are not yet answered.", registry=self.registry
        )
        self.batch = Histogram(
            "unperturb_batch_images",
            "Images that the model saw at once.",
            registry=self.registry,
            buckets=[2**k for k in range(11)],
        )
        self.batch_seconds = Histogram(
            "unperturb_batch_seconds", "Seconds that the model took for a batch.", registry=self.registry
        )


class _Observed:
    """An ASGI app whose requests are counted and logged: path, status and time, nothing of what was sent."""

    def __init__(self, app: Any, metrics: _Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - start
            path = scope["path"] if scope["path"] in PATHS else "other"  # what clients make up would fill the memory
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            _log.info("%s %d %.1f ms", path, status, 1000 * seconds)


# What is sent -------------------------------------------------------------------------------------------------------


def _decoded(data: bytes, shape: Shape, most: int) -> tuple[Tensor, tuple[int, int]]:
    """(uint8 `(C, H, W)`, the size that the picture had); raises `HTTPException` for what is no such picture."""
    from fastapi import HTTPException
    from PIL.Image import DecompressionBombError

    if not data:
        raise HTTPException(400, "the body is empty; send the bytes of a PNG or a JPEG")
    formats = next((kinds for magic, kinds in MAGIC.items() if data.startswith(magic)), None)
    if formats is None:
        raise HTTPException(415, "the body is neither a PNG nor a JPEG; convert the picture to one of them")
    picture = Picture(data, 0, "the picture", formats=formats)
    try:
        height, width = stored_size(picture)
        if height * width > most:
            raise HTTPException(413, f"the picture has {height}x{width} pixels, more than {most:,}; send it smaller")
        pixels, _ = decode(picture, shape[1:], grey=shape[0] == 1)
    except DataError as error:
        if isinstance(error.__cause__, DecompressionBombError):
            raise HTTPException(413, f"the picture has more than {most:,} pixels; send it smaller") from error
        raise HTTPException(400, f"{error}; send a whole PNG or JPEG") from error
    image = torch.tensor(pixels)
    return (image[None] if image.ndim == 2 else image.permute(2, 0, 1)), (height, width)


# The app ------------------------------------------------------------------------------------------------------------


def create_app(served: Served) -> "FastAPI":
    """The ASGI app of a service. Its first batch is run here, so that a model that fails does so before it is asked.

    Raises `ImportError` without the extra `serve`, `ValueError` where the model fails.
    """
    from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import UploadFile
    from starlette.requests import ClientDisconnect

    model, shape, limits = served.model, served.shape, served.limits
    metrics = _Metrics()
    info = _info(served, check_model(model, shape, limits.batch, served.device))
    thresholds = model.defense.thresholds.tolist()

    def answers(images: list[Tensor]) -> list[Answer]:
        metrics.batch.observe(len(images))
        with metrics.batch_seconds.time():
            return answer_batch(model, images, served.device)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher = Batcher(answers, batch=limits.batch, wait=limits.wait_ms / 1000, places=limits.queue)
        app.state.batcher = batcher
        yield
        await run_in_threadpool(batcher.close)

    async def authorize(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        known = (served.token or "").encode()
        if given is None or not hmac.compare_digest(given.credentials.encode(), known):
            raise HTTPException(
                401, "send the service's token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    async def body_of(request: Request) -> bytes:
        too_large = HTTPException(
            413, f"the body has more than {limits.max_bytes:,} bytes; send a smaller picture, or a JPEG"
        )
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limits.max_bytes:
            raise too_large
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > limits.max_bytes:
                raise too_large
        return bytes(data)

    async def sent_file(request: Request, body: bytes) -> bytes:
        """The picture in a body: all of it, or the one file of a form."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/"):
            return body

        async def replay() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        how = "send one file, such as curl -F image=@FILE"
        try:
            async with Request(request.scope, replay).form(max_files=1, max_fields=10) as form:
                for value in form.values():
                    if isinstance(value, UploadFile):
                        return await value.read()
        except HTTPException as error:
            raise HTTPException(400, f"the form cannot be read: {error.detail}; {how}") from error
        except Exception as error:  # of whatever kind the parser's are in its versions
            raise HTTPException(400, f"the form cannot be read; {how}") from error
        raise HTTPException(422, f"the form holds no file; {how}")

    async def answer_to(request: Request) -> tuple[Answer, tuple[int, int]]:
        """(what the model says of the picture sent, the picture's size)."""
        stage = "read"
        try:
            with request.app.state.batcher.place(), metrics.under_way.track_inprogress():
                async with asyncio.timeout(limits.timeout):
                    body = await sent_file(request, await body_of(request))
                    stage = "answered"
                    image, size = await run_in_threadpool(_decoded, body, shape, limits.max_pixels)
                    future = asyncio.wrap_future(request.app.state.batcher.ask(image))
                    with the_models():
                        answer: Answer = await future
        except QueueFullError:
            raise HTTPException(
                503,
                f"{limits.queue} requests are under way, and there is room for no more; send it again later",
                {"Retry-After": "1"},
            ) from None
        except TimeoutError:
            said = f"it could not be {stage} within {limits.timeout:g} s"
            raise HTTPException(408 if stage == "read" else 504, f"{said}; send it again") from None
        except ClientDisconnect:
            raise HTTPException(400, "the connection ended before the body did; send it again") from None
        if not answer.finite:
            raise HTTPException(500, "the model gave no finite numbers for this picture: use another model")
        return answer, size

    @contextlib.contextmanager
    def the_models() -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a model may raise anything; the log has it
            raise HTTPException(
                500, f"the model failed ({type(error).__name__}); the service's log says more"
            ) from error

    picture = {"schema": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "properties": {"image": picture["schema"]}, "required": ["image"]}}
    takes: Any = {
        "requestBody": {
            "required": True,
            "content": {"image/png": picture, "image/jpeg": picture, "multipart/form-data": form},
        }
    }
    said = {
        400: "The picture is damaged, or the form.",
        408: "The body did not come in time.",
        413: "Too many bytes or pixels.",
        415: "Neither PNG nor JPEG.",
        422: "A parameter or the form's file is wrong or missing.",
        500: "The model failed.",
        503: "As many requests as there are places; Retry-After says when to come again.",
        504: "The model did not answer in time.",
    }
    guarded: list[Any] = [] if served.token is None else [Depends(authorize)]
    denied: dict[int | str, Any] = (
        {} if served.token is None else {401: {"model": Problem, "description": "The token is missing or wrong."}}
    )
    refused: dict[int | str, Any] = {**{c: {"model": Problem, "description": t} for c, t in said.items()}, **denied}

    app = FastAPI(
        title="unperturb", version=info.versions["unperturb"], summary=info.model, lifespan=lifespan, redoc_url=None
    )
    app.add_middleware(_Observed, metrics=metrics)

    @app.exception_handler(RequestValidationError)
    async def wrong_parameter(request: Request, error: RequestValidationError) -> JSONResponse:
        told = [f"{'.'.join(str(p) for p in e['loc'][1:])}: {e['msg']}" for e in error.errors()]
        return JSONResponse({"detail": f"{'; '.join(told)}; see /docs"}, 422)

    @app.get("/health", summary="Whether the service is there; needs no token")
    async def health() -> Health:
        return Health(status="ok")

    @app.get("/info", dependencies=guarded, responses=denied, summary="The model, its sizes, versions and limits")
    async def about() -> Info:
        return info

    @app.get("/metrics", dependencies=guarded, responses={**denied, 200: {"content": {"text/plain": {}}}})
    async def figures() -> Response:
        """Counts and times for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post(
        "/purify",
        dependencies=guarded,
        openapi_extra=takes,
        response_class=Response,
        responses={**refused, 200: {"content": {"image/png": picture}, "description": "The restored picture."}},
        summary="A picture in, the restored one out, as a PNG of the model's size",
    )
    async def purify(request: Request) -> Response:
        answer, (height, width) = await answer_to(request)
        data = await run_in_threadpool(_png, answer.restored)
        return Response(data, media_type="image/png", headers={"X-Received-Size": f"{height}x{width}"})

    @app.post(
        "/classify",
        dependencies=guarded,
        openapi_extra=takes,
        response_model=Classified,
        responses=refused,
        summary="The class of a picture, before and after the purifier",
    )
    async def classify(
        request: Request,
        top: Annotated[int, Query(ge=1, le=1000, description="How many classes are listed.")] = 5,
        restored: Annotated[bool, Query(description="Whether the restored picture comes along.")] = False,
    ) -> Response:
        answer, size = await answer_to(request)
        png = await run_in_threadpool(_png, answer.restored) if restored else None
        found = _classified(answer, thresholds, size, shape, top, png)
        return Response(found.model_dump_json(), media_type="application/json")

    return app
