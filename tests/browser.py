"""A headless Chromium for tests of pages, spoken to over its own protocol on loopback; no driver is needed."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "PageUp": 33, "PageDown": 34}
# elements that reach over the page's sides without lying in something that scrolls; what is cut off in silence; what
# scrolls though it holds neither table nor picture
STICKING_OUT = """(() => {
  const width = document.documentElement.clientWidth, all = document.documentElement.scrollWidth, found = [];
  const label = (e) => `${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 40)}`;
  const is = (e, ...kinds) => kinds.includes(getComputedStyle(e).overflowX);
  if (all > width) found.push(`the page: ${all}`);
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    let around = e.parentElement;
    while (around !== document.body && !is(around, "auto", "scroll")) around = around.parentElement;
    if (around === document.body && (box.right > width + 0.5 || box.left < -0.5)) found.push(label(e));
    if (is(e, "hidden", "clip") && e.scrollWidth > e.clientWidth + 1) found.push(`cut off, ${label(e)}`);
    const may = e.tagName === "PRE" || e.querySelector("table, img, svg");
    if (is(e, "auto", "scroll") && e.scrollWidth > e.clientWidth + 1 && !may) found.push(`scrolls, ${label(e)}`);
  }
  return found;
})()"""

# texts whose contrast with what lies behind them is below WCAG's 4.5
FAINT = """(() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number), found = [];
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (e) => numbers(getComputedStyle(e).backgroundColor);
  for (const e of document.body.querySelectorAll("*:not(script):not(style):not(option):not(select)")) {
    const own = [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !e.getBoundingClientRect().width) continue;
    let around = e;
    while (around !== document.documentElement && behind(around)[3] === 0) around = around.parentElement;
    const [a, b] = [numbers(getComputedStyle(e).color), behind(around)].map(light).sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`${e.tagName}: ${e.textContent.trim().slice(0, 40)}`);
  }
  return found;
})()"""


def faults(path: Path) -> list[str]:
    """What is wrong with a page at 1,300 and 400 pixels, by light and in the dark, and on paper."""
    lines = []
    with Page(path.as_uri(), 1300) as page:
        for width in (1300, 400):
            page.load_as_wide_as(width)
            for scheme in ("light", "dark"):
                page.look(prefers_color_scheme=scheme)
                lines += [f"{width}, {scheme}: {one}" for one in page.value(STICKING_OUT)]
                lines += [f"{width}, {scheme}, faint: {one}" for one in page.value(FAINT)]
                paper = page.value("getComputedStyle(document.body).backgroundColor")
                assert (paper == "rgb(255, 255, 255)") == (scheme == "light"), paper
        page.load_as_wide_as(718)  # of A4, less the margins
        page.look("print", prefers_color_scheme="dark")
        assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        lines += [f"on paper: {one}" for one in page.value(STICKING_OUT)]
        assert base64.b64decode(page.call("Page.printToPDF", {})["data"]).startswith(b"%PDF")
    return lines


class Page:
    """A page in a browser of its own; a context manager that ends the browser."""

    def __init__(self, url: str, width: int = 1300, height: int = 900):
        self.url, self.size, self.number = url, (width, height), 0

    def __enter__(self) -> "Page":
        self.folder = tempfile.mkdtemp(prefix="browser")
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
        options += ["--remote-debugging-address=127.0.0.1", "--disable-background-networking", "--disable-sync"]
        options += ["--hide-scrollbars"]  # so that a page is as wide as it is asked to be
        command = [CHROMIUM, *options, f"--user-data-dir={self.folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.loop = asyncio.new_event_loop()
        try:
            self.loop.run_until_complete(self._connect())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        async def close() -> None:
            if hasattr(self, "session"):
                await self.session.close()

        self.loop.run_until_complete(close())
        self.loop.close()
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _connect(self) -> None:
        import aiohttp

        port_file, until = Path(self.folder, "DevToolsActivePort"), time.monotonic() + 60
        while not port_file.exists() or not port_file.read_text().strip():
            assert time.monotonic() < until and self.process.poll() is None, "chromium does not start"
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json") as answer:
            (target, *_) = [one for one in await answer.json() if one["type"] == "page"]
        self.socket = await self.session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        await self._load()

    async def _load(self) -> None:
        width, height = self.size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self._call("Emulation.setDeviceMetricsOverride", metrics)
        await self._call("Page.navigate", {"url": self.url})

    async def _call(self, method: str, params: dict | None = None) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params or {}})
        async for message in self.socket:
            said = json.loads(message.data)
            if said.get("id") == self.number:
                assert "error" not in said, said
                return said["result"]
        raise AssertionError("chromium is gone")

    def call(self, method: str, params: dict | None = None) -> dict[str, Any]:
        """A call of the DevTools protocol."""
        return self.loop.run_until_complete(self._call(method, params))

    def value(self, script: str) -> Any:
        """What an expression is worth in the page."""
        reply = self.call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Until an expression is true."""
        until = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < until, f"{script} did not come true"
            time.sleep(0.05)

    def wait_for_width(self, width: int) -> None:
        """Until the file is there, as wide as that, without scrollbars."""
        self.wait("location.protocol === 'file:' && document.readyState === 'complete'")  # not the blank page before it
        self.wait(f"document.documentElement.clientWidth === {width}")

    def load_as_wide_as(self, width: int) -> None:
        """The page anew, at another width."""
        self.value("window.before = true")
        self.size = width, self.size[1]
        self.loop.run_until_complete(self._load())
        self.wait("!window.before")
        self.wait_for_width(width)

    def click(self, x: float, y: float) -> None:
        """With the left button, at a place in the window."""
        for kind in ("mousePressed", "mouseReleased"):
            press = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", press | {"buttons": int(kind == "mousePressed")})

    def tap(self, x: float, y: float) -> None:
        """With a finger."""
        self.call("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
        self.call("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def press(self, key: str) -> None:
        """A key of KEYS."""
        for kind in ("keyDown", "keyUp"):
            code = KEYS[key]
            self.call("Input.dispatchKeyEvent", {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code})

    def look(self, media: str = "screen", **features: str) -> None:
        """As by a device of this kind: prefers_color_scheme="dark"."""
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page."""
        reply = self.call("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        Path(path).write_bytes(base64.b64decode(reply["data"]))
