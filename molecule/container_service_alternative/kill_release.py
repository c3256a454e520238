"""Kill the run that releases a service, once the release is being proven; say what clients get before and after."""

import json
import os
import pathlib
import signal
import sys
import time
import urllib.error
import urllib.request

SERVICE, PORT = sys.argv[1:]


def ask() -> dict[str, object]:
    began = time.monotonic()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=10) as answer:
            found = {"status": answer.status, **json.load(answer)}
    except urllib.error.HTTPError as error:
        found = {"status": error.code, "retry_after": error.headers["Retry-After"], "error": json.load(error)["error"]}
    return {**found, "seconds": time.monotonic() - began}


def wait_for(lock: pathlib.Path, progress: pathlib.Path, said: int) -> int:
    """The process id of the run, when it has begun to prove its release."""
    while True:
        if "proving" in progress.read_text()[said:]:
            return int(json.loads(lock.read_text())["pid"])
        time.sleep(0.1)


progress = pathlib.Path("/run/nemo/progress") / SERVICE
run = wait_for(pathlib.Path("/run/nemo") / f"{SERVICE}.lock", progress, len(progress.read_text()))
meanwhile = ask()
os.kill(run, signal.SIGKILL)
end = time.monotonic() + 60
while (after := ask())["status"] != 200 and time.monotonic() < end:
    time.sleep(0.2)
print(json.dumps({"meanwhile": meanwhile, "after": after}))
