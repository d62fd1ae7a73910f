"""The playground in headless Chromium, driven over the pipe of its DevTools protocol: no further package is needed."""

import base64
import gc
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

from vitrim.showing import app

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
SECONDS = 90
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
    "--hide-scrollbars",
]  # fmt: skip


@contextmanager
def served(spec: str) -> Iterator[str]:
    """The address of a playground that runs within this context."""
    with app.running(spec, port=0, device="cpu") as (server, place):
        thread = threading.Thread(target=server.run, args=([place],))
        thread.start()
        try:
            yield f"http://{app.HOST}:{place.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
            gc.collect()  # gradio leaves event loops open, which would be blamed on a later test.


class Browser:
    """One page. `requests` holds the address of everything that it asked for."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self.requests: list[str] = []
        self._number, self._rest = 0, b""
        self._folder = tempfile.mkdtemp()
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self._in, self._out = ours_in, ours_out

        def to_3_and_4() -> None:
            high_in, high_out = os.dup2(theirs_in, 100), os.dup2(theirs_out, 101)
            os.dup2(high_in, 3)
            os.dup2(high_out, 4)

        flags = [*FLAGS, f"--user-data-dir={self._folder}", f"--window-size={width},{height}"]
        self._process = subprocess.Popen(
            [CHROMIUM, *flags], close_fds=False, preexec_fn=to_3_and_4, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime", "DOM"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method: str, **options: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        self._number += 1
        words = {"id": self._number, "method": method, "params": options}
        words |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(words).encode() + b"\0")
        while (heard := self._next()).get("id") != self._number:
            if heard.get("method") == "Network.requestWillBeSent":
                self.requests.append(heard["params"]["request"]["url"])
        if "error" in heard:
            raise AssertionError(f"{method}: {heard['error']}")
        return heard["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select([self._in], [], [], SECONDS)[0]:
                raise AssertionError("the browser does not answer")
            self._rest += os.read(self._in, 1 << 20)
        one, self._rest = self._rest.split(b"\0", 1)
        return json.loads(one)

    def evaluate(self, script: str) -> Any:
        """The value of a piece of JavaScript."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """The first value of a piece of JavaScript that is true."""
        end = time.monotonic() + SECONDS
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"{script} stays {value!r}; the page shows {self.text()}"
            time.sleep(0.2)
        return value

    def text(self) -> str:
        """What the page shows, as text."""
        return self.evaluate("document.body ? document.body.innerText : ''")

    def choose_file(self, path: str | Path) -> None:
        """Give the first input of files this one, as a person drops it."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(Path(path).resolve())])

    def click(self, selector: str, at: float = 0.5) -> None:
        """Press and release the mouse on an element, at this share of its width."""
        script = f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            if (!found) return null;
            found.scrollIntoView({{block: "nearest"}});
            const box = found.getBoundingClientRect();
            return [box.x + {at} * box.width, box.y + box.height / 2];
        }})()"""
        before, now = None, self.wait(script)
        while now != before:  # Until nothing moves.
            time.sleep(0.3)
            before, now = now, self.wait(script)
        x, y = now
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, label: str, value: str) -> None:
        """Open a list and click one of its entries; again where the list was still moving."""
        chosen = f"document.querySelector(\"input[aria-label='{label}']\").value"
        for _ in range(5):
            if self.evaluate(chosen) == value:
                return
            self.click(f"input[aria-label='{label}']")
            self.click(f'[role=option][aria-label="{value}"]')
            time.sleep(0.5)
        raise AssertionError(f"{label} stays {self.evaluate(chosen)!r}")

    def picture(self, path: str | Path) -> None:
        """A PNG of the page."""
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
