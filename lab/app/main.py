"""The lab's AI service: small, but a real FastAPI application that can be made to fail on purpose.

LAB_BEHAVIOUR, baked into the image, says how: healthy, unhealthy, crash, crash-later, slow-start, hang, stubborn, errors (to
every second request but those for its health) or leak (memory with each request).
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel

BEHAVIOUR = os.environ.get("LAB_BEHAVIOUR", "healthy")
DELAY = float(os.environ.get("LAB_DELAY", "15"))  # seconds that slow-start takes, or that crash-later waits
SECRETS = pathlib.Path("/run/secrets")
VLLM_URL = os.environ.get("VLLM_URL", "")  # of the inference server, for example http://10.0.2.20:8002
VLLM_MODEL = os.environ.get("VLLM_MODEL", "")  # its name there; where it is empty, the server's first one answers
VLLM_TIMEOUT = float(os.environ.get("VLLM_TIMEOUT", "60"))  # seconds
STARTED = time.monotonic()

LEAKED: list[bytearray] = []
COUNT = 0

app = FastAPI(title="nemo lab AI service")


@app.middleware("http")
async def misbehave(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """What only shows with traffic: the service says that it is well."""
    global COUNT  # noqa: PLW0603 - one process, one event loop
    if request.url.path != "/health":
        COUNT += 1
        if BEHAVIOUR == "errors" and COUNT % 2:
            return Response("the model gave no answer", status_code=500)
        if BEHAVIOUR == "leak":
            LEAKED.append(bytearray(1 << 20))
    return await call_next(request)


def release() -> dict[str, str]:
    """Which release this is, as whoever started it says."""
    return {name: os.environ.get(f"IMAGE_{name.upper()}", "") for name in ("tag", "digest")}


@app.get("/health")
def health(response: Response) -> dict[str, str]:
    status = "ok"
    if BEHAVIOUR == "hang":
        time.sleep(3600)
    if BEHAVIOUR == "unhealthy":
        status = "model not loaded"
    if BEHAVIOUR == "slow-start" and time.monotonic() - STARTED < DELAY:
        status = "loading"
    if status != "ok":
        response.status_code = 503
    return {"status": status, **release()}


@app.get("/")
def index() -> dict[str, object]:
    return {"service": "nemo AI", "user": os.getuid(), **release()}


@app.get("/v1/echo")
def echo(text: str = "") -> dict[str, str]:
    return {"text": text}


@app.get("/v1/slow")
def slow(seconds: float = 4) -> dict[str, object]:
    """An answer that takes its time, as those of a model do."""
    time.sleep(min(seconds, 60))
    return {"slept": seconds, **release()}


@app.post("/v1/echo")
async def echo_body(request: Request) -> dict[str, object]:
    return {"body": await request.json()}


@app.get("/v1/settings")
def settings() -> dict[str, list[str]]:
    """The names of what this service was given, never a value."""
    secrets = sorted(path.name for path in SECRETS.iterdir() if path.is_file()) if SECRETS.is_dir() else []
    readable = [name for name in secrets if os.access(SECRETS / name, os.R_OK)]
    return {"secrets": secrets, "readable": readable, "environment": sorted(os.environ)}


class Question(BaseModel):
    """What a client asks the model."""

    prompt: str
    max_tokens: int = 16


@app.post("/v1/ask")
def ask(question: Question) -> dict[str, object]:
    """The model's answer, by the inference server; 503 while that loads or is not set up, 502 where it fails."""
    if not VLLM_URL:
        raise HTTPException(503, "no inference server is set up: VLLM_URL is empty")
    model = {"model": VLLM_MODEL} if VLLM_MODEL else {}
    body = {**model, "prompt": question.prompt, "max_tokens": question.max_tokens}
    try:
        with urllib.request.urlopen(completion(body), timeout=VLLM_TIMEOUT) as answer:
            found = json.load(answer)
        return {"text": found["choices"][0]["text"], "model": found["model"], **release()}
    except urllib.error.HTTPError as error:
        raise refusal(error) from error
    except (OSError, ValueError, LookupError) as error:
        raise HTTPException(502, f"the inference server at {VLLM_URL} gave no answer: {error}") from error


def completion(body: dict[str, object]) -> urllib.request.Request:
    """A request for one completion, with the key that this release was given."""
    headers = {"Content-Type": "application/json"}
    key = SECRETS / "VLLM_API_KEY"
    if key.is_file():
        headers["Authorization"] = f"Bearer {key.read_text().strip()}"
    return urllib.request.Request(f"{VLLM_URL}/v1/completions", json.dumps(body).encode(), headers)


def refusal(error: urllib.error.HTTPError) -> HTTPException:
    """What a client hears of an answer that is none: its own mistakes, when to come back, or who is at fault."""
    text = error.read(2000).decode(errors="replace").strip()
    if error.code == 400:
        return HTTPException(400, text)
    if error.code == 503:
        wait = error.headers.get("Retry-After")
        return HTTPException(503, f"the inference server is not ready: {text}", {"Retry-After": wait} if wait else None)
    if error.code in (401, 403):
        return HTTPException(
            502, f"the inference server refuses this service ({error.code}): VLLM_API_KEY or its rules"
        )
    return HTTPException(502, f"the inference server answered {error.code}: {text}")


def crash_later() -> None:
    time.sleep(DELAY)
    print("CRITICAL lost the model: exiting", file=sys.stderr, flush=True)
    os._exit(4)


def main() -> None:
    print(f"starting {release()['tag'] or 'an unnamed release'} as user {os.getuid()}", flush=True)
    if BEHAVIOUR == "crash":
        raise RuntimeError("cannot load the model index /models/index.json: no such file")
    if BEHAVIOUR == "unhealthy":
        print("ERROR cannot load the model index: /health will answer 503", file=sys.stderr, flush=True)
    if BEHAVIOUR == "crash-later":
        threading.Thread(target=crash_later, daemon=True).start()
    server = uvicorn.Server(
        uvicorn.Config(app, host="0.0.0.0", port=int(os.environ.get("PORT", "8000")), access_log=False)
    )
    if BEHAVIOUR == "stubborn":  # never ends by itself
        server.install_signal_handlers = lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server.run()


if __name__ == "__main__":
    main()
