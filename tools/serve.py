"""Transcribe over HTTP, in the shape of OpenAI's interface, and on a page for people.

    python -m tools.serve --projector_model_path exp/model.safetensors --port 8000

    curl http://127.0.0.1:8000/v1/audio/transcriptions -F file=@talk.mp3 -F model=slim-asr

The page is at /, the interface's description at /docs, and /health says whether the model is there.
docs/serving.md has the rest.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import anyio
import uvicorn
from fastapi import APIRouter, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.hf_argparser import HfArg

from arguments import check_positive
from command import InputError, parse_arguments, run_command
from loading import read_config
from manifest import Utterance
from tools.audio import make_pieces, read_stream
from tools.batching import Batcher, Job
from tools.formats import Transcript, describe_segment, format_transcript
from tools.transcribe import ModelArguments, make_transcript, recognize_pieces

MODEL = "slim-asr"
PAGE = Path(__file__).with_name("page.html")
RETRY = {"Retry-After": "5"}  # seconds
PATIENCE = 0.2  # seconds after which it is looked whether a client has gone away
MEGABYTE = 1_000_000
ResponseFormat = Literal["json", "text", "verbose_json", "srt", "vtt"]


@dataclass(kw_only=True)
class Arguments(ModelArguments):
    """The flags of tools/serve.py."""

    host: str = HfArg(
        default="127.0.0.1", help="The address to listen at; 0.0.0.0 lets other machines in."
    )
    port: int = HfArg(default=8000, help="The port to listen at; 0 takes a free one.")
    max_waiting: int = HfArg(
        default=64, help="Most requests that wait or are recognised; others are told to come again."
    )
    max_megabytes: int = HfArg(default=25, help="Largest upload.")
    max_minutes: int = HfArg(default=60, help="Longest audio in an upload.")

    def __post_init__(self):
        super().__post_init__()
        check_positive("max_waiting", self.max_waiting)
        check_positive("max_megabytes", self.max_megabytes)
        check_positive("max_minutes", self.max_minutes)


class Service:
    """The model, which is loaded while the port is open already, and the requests that wait."""

    def __init__(self, args: Arguments):
        self.args = args
        self.model = None
        self.error = None  # why there will be no model
        self.batcher = None
        self.places = 0  # that are taken
        self.decoder = anyio.CapacityLimiter(1)  # an hour of audio takes a gigabyte
        self.give_up = None  # called when the model cannot be loaded

    def load(self) -> None:
        try:
            self.model = self.args.load_model()
        except Exception as error:
            self.error = error
            if self.give_up is not None:
                self.give_up()
            return
        self.batcher = Batcher(self.recognize, self.args.batch_size)

    def recognize(self, pieces: list[Utterance], word_times: bool) -> None:
        options = (self.args.num_beams, self.args.batch_size, word_times)
        for _ in recognize_pieces(self.model, [pieces], *options):
            pass  # each batch adds its hypotheses

    async def transcribe(self, request: Request, file: UploadFile, word_times: bool) -> Transcript:
        """The transcript of an upload; HTTPException for all that is in the way of one."""
        if self.batcher is None:
            raise HTTPException(503, "the model is still loading: see /health", RETRY)
        if self.places == self.args.max_waiting:
            raise HTTPException(429, f"{self.places} requests wait already: come again", RETRY)
        self.places += 1
        try:
            pieces = await anyio.to_thread.run_sync(self.decode, file, limiter=self.decoder)
            await wait(self.batcher.submit(pieces, word_times), request)
        except InputError as error:
            raise HTTPException(400, str(error)) from None
        finally:
            self.places -= 1
        return make_transcript(pieces, self.args.num_beams)

    def decode(self, file: UploadFile) -> list[Utterance]:
        name = file.filename or "file"
        samples = read_stream(file.file, name, max_seconds=60 * self.args.max_minutes)
        return make_pieces(samples, name)


async def wait(job: Job, request: Request) -> None:
    """Return when a job is done, and take it out of the queue if its client goes away."""
    done = asyncio.wrap_future(job.done)
    try:
        while not done.done():
            await asyncio.wait([done], timeout=PATIENCE)
            if not done.done() and await request.is_disconnected():
                raise HTTPException(499, "the client went away")
        await done
    finally:
        done.cancel()


class LimitUpload:
    """Middleware that ends requests of more than `limit` bytes with 413."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def receive_and_count() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limit:
                # a client that still sends does not read the answer
                while message.get("more_body", False):
                    message = await receive()
                megabytes = self.limit // MEGABYTE
                raise HTTPException(413, f"an upload may have {megabytes} MB: --max_megabytes")
            return message

        await self.app(scope, receive_and_count, send)


router = APIRouter()


@router.get("/", include_in_schema=False)
async def show_page() -> HTMLResponse:
    return HTMLResponse(PAGE.read_text(encoding="utf-8"))


@router.get("/health")
async def report_health(request: Request) -> JSONResponse:
    """200 when requests are answered; before that 503, with `status` "loading" or "failed"."""
    service = request.app.state.service
    if service.error is not None:
        return JSONResponse({"status": "failed", "error": str(service.error)}, 503)
    if service.batcher is None:
        return JSONResponse({"status": "loading"}, 503, RETRY)
    return JSONResponse({"status": "ok", "waiting": service.places})


@router.get("/v1/models")
async def list_models() -> dict:
    """The one model. Requests may name any, as programs have OpenAI's names in them."""
    model = {"id": MODEL, "object": "model", "created": 0, "owned_by": MODEL}
    return {"object": "list", "data": [model]}


@router.post("/v1/audio/transcriptions")
async def transcribe(
    request: Request,
    file: Annotated[UploadFile, File(description="Audio of any length.")],
    model: Annotated[str, Form(description="Any name.")] = MODEL,
    response_format: Annotated[ResponseFormat, Form()] = "json",
    granularities: Annotated[
        list[Literal["word", "segment"]], Form(alias="timestamp_granularities[]")
    ] = ("segment",),
    language: Annotated[str, Form(description="Changes nothing.")] = "",
    temperature: Annotated[float, Form(description="Changes nothing.")] = 0.0,
) -> Response:
    """What is said in an audio file."""
    word_times = "word" in granularities
    transcript = await request.app.state.service.transcribe(request, file, word_times)
    if response_format == "json":
        return JSONResponse({"text": transcript.text})
    if response_format == "verbose_json":
        return JSONResponse(describe(transcript, granularities, language))
    kind = "txt" if response_format == "text" else response_format
    return PlainTextResponse(format_transcript(transcript, kind))


def describe(transcript: Transcript, granularities: list[str], language: str) -> dict:
    """The transcript as OpenAI's verbose_json has it."""
    answer = {
        "task": "transcribe",
        "language": language,
        "duration": transcript.duration,
        "text": transcript.text,
    }
    if "word" in granularities:
        answer["words"] = transcript.words
    if "segment" in granularities:
        segments = []
        for number, segment in enumerate(transcript.segments):
            segments.append({"id": number, **describe_segment(segment)})
        answer["segments"] = segments
    return answer


async def refuse(request: Request, error: StarletteHTTPException) -> JSONResponse:
    """An error in OpenAI's shape, so that its clients show the message."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = {"message": error.detail, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code, error.headers)


async def refuse_form(request: Request, error: RequestValidationError) -> JSONResponse:
    """A request with a wrong field: which, and what is wanted."""
    reasons = []
    for problem in error.errors():
        reasons.append(f"{problem['loc'][-1]}: {problem['msg']}")
    return await refuse(request, HTTPException(400, "; ".join(reasons)))


async def report_fault(request: Request, error: Exception) -> JSONResponse:
    """Of what is no user's mistake; the traceback goes to the log."""
    return await refuse(request, HTTPException(500, f"{type(error).__name__}: {error}"))


@asynccontextmanager
async def load_beside(app: FastAPI) -> AsyncIterator[None]:
    """Load the model in a thread, while the port opens."""
    threading.Thread(target=app.state.service.load, daemon=True).start()
    yield


def make_app(args: Arguments) -> FastAPI:
    app = FastAPI(title="Slim-ASR", lifespan=load_beside)
    app.state.service = Service(args)
    app.include_router(router)
    app.add_middleware(LimitUpload, limit=args.max_megabytes * MEGABYTE)
    app.add_exception_handler(StarletteHTTPException, refuse)
    app.add_exception_handler(RequestValidationError, refuse_form)
    app.add_exception_handler(Exception, report_fault)
    return app


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    read_config(args.projector_model_path)  # a wrong path is found before the port opens
    app = make_app(args)
    server = uvicorn.Server(uvicorn.Config(app, args.host, args.port))
    service = app.state.service

    def stop() -> None:
        server.should_exit = True

    service.give_up = stop
    server.run()
    if service.error is not None:
        raise service.error


if __name__ == "__main__":
    run_command(main)
