"""Debian's Chromium without a window, driven over its DevTools protocol: open a page, click, read, photograph."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_S = 60.0


class Page:
    """One tab. Expressions are JavaScript; what they give comes back as JSON."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop = loop
        self._socket = socket
        self._number = 0
        self.errors: list[str] = []  # exceptions that the page threw

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), TIMEOUT_S))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def run(self, expression: str) -> Any:
        """The value of an expression; of a promise, what it becomes."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, file: Path) -> None:
        self.call("Runtime.enable")
        self.call("Page.enable")
        self.call("Page.navigate", url=file.resolve().as_uri())

    def wait(self, expression: str) -> Any:
        """Until it is true; its value."""
        poll = f"new Promise(done => {{ const look = () => {{ let v; try {{ v = {expression} }} catch {{}} "
        poll += "if (v) done(v); else setTimeout(look, 20); }; look(); })"
        return self.run(poll)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if kind == "keyDown" and len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def photograph(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """A PNG of the window, scrolled as it is."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=theme)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def open_browser() -> Iterator[Page]:
    """A browser with a profile of its own, gone afterwards."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        process = subprocess.Popen(
            [*command, "--window-size=1280,900", f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        loop = asyncio.new_event_loop()
        try:
            address = next(line.split()[-1] for line in process.stderr if "DevTools listening on" in line)
            base = address.split("/devtools")[0].replace("ws:", "http:")

            async def connect() -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
                session = aiohttp.ClientSession()
                async with session.get(f"{base}/json/list") as answer:
                    tab = next(tab for tab in await answer.json() if tab["type"] == "page")
                return session, await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

            session, socket = loop.run_until_complete(connect())
            yield Page(loop, socket)
            loop.run_until_complete(socket.close())
            loop.run_until_complete(session.close())
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
            loop.close()
