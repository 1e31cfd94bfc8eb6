"""A headless Chromium, spoken to by the W3C WebDriver protocol. For the tests of the page."""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

SWITCHES = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync disable-dev-shm-usage hide-scrollbars"
).split()


def chromium() -> str | None:
    """Where the browser is; None if it, or its driver, is not installed."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return found if found and shutil.which("chromedriver") else None


class Browser:
    """One page at a time. To be used in a `with`."""

    def __init__(self, profile: Path):
        """`profile`: a fresh folder."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._process = subprocess.Popen(
            [shutil.which("chromedriver"), f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._base = f"http://127.0.0.1:{port}"
        arguments = [f"--{switch}" for switch in SWITCHES] + [f"--user-data-dir={profile}"]
        wanted = {
            "goog:chromeOptions": {"binary": chromium(), "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._wait_until_ready()
        opened = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{opened['sessionId']}"

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._ask("DELETE", "", None)
        finally:
            self._process.terminate()
            self._process.wait()

    def open(
        self,
        url: str,
        *,
        width: int = 1400,
        height: int = 1000,
        dark: bool = False,
        first: str = "",
    ) -> None:
        """A page, as a screen of this width and this colour scheme shows it, once it is loaded.

        Args:
            first: a script that runs in the page before its own.
        """
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._command("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._post("/url", {"url": "about:blank"})  # else another fragment would load nothing
        added = self._command("Page.addScriptToEvaluateOnNewDocument", {"source": first})
        self._post("/url", {"url": url})
        while self.run("return location.protocol + document.readyState") != "file:complete":
            time.sleep(0.02)
        self._command("Page.removeScriptToEvaluateOnNewDocument", added)

    def run(self, script: str) -> object:
        """What a script returns."""
        return self._post("/execute/sync", {"script": script, "args": []})

    def text(self, selector: str = "body") -> str:
        """What a reader sees of the first element."""
        return self.run(f"return document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """Clicks the first element."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def complaints(self) -> list[str]:
        """What the console has said since it was last asked."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def cpu_seconds(self) -> float:
        """What all processes of the browser have used so far, those that have ended included."""
        fields = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                fields[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        family = [self._process.pid]
        for pid in family:
            family += [child for child, of_child in fields.items() if int(of_child[1]) == pid]
        ticks = sum(int(ticks) for pid in family for ticks in fields[pid][11:15])
        return ticks / os.sysconf("SC_CLK_TCK")

    def screenshot(self, path: Path) -> None:
        """A PNG of what the screen shows."""
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot", None)))

    def _command(self, name: str, parameters: dict) -> object:
        return self._post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def _post(self, path: str, body: dict) -> dict:
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict | None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                if self._ask("GET", "/status", None)["ready"]:
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)
