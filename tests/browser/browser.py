"""A headless Chromium, driven over its pipe: what its DevTools protocol says, and nothing more."""

import base64
import fcntl
import json
import os
import select
import subprocess
import tempfile
import time

# Each is bound to the descriptor that --remote-debugging-pipe reads or writes.
START = 'exec "$@" 3<&"$COMMANDS" 4>&"$ANSWERS"'
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
WAIT = 60
# How readers see a page: width, height, scheme, and whether it is a phone.
LOOKS = {
    "light": (1280, 900, "light"),
    "dark": (1280, 900, "dark"),
    "phone": (390, 844, "light", True),
    "phone-dark": (390, 844, "dark", True),
}


class Browser:
    """One page; `events` are all that it said since the last `open`."""

    def __init__(self, executable):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ours, theirs = [], []
        for read, write in (os.pipe(), os.pipe()):
            ours.append(read if ours else write)
            theirs.append(write if theirs else read)
        # Out of the way of 3 and 4.
        given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in theirs]
        words = [executable, *OPTIONS, "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            ["bash", "-c", START, "_", *words, f"--user-data-dir={self.profile.name}"],
            env=os.environ | {"COMMANDS": str(given[0]), "ANSWERS": str(given[1])},
            pass_fds=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (*theirs, *given):
            os.close(fd)
        self.commands, self.answers = ours
        self.rest, self.count, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        os.close(self.commands)  # which ends it
        self.process.wait(WAIT)
        os.close(self.answers)
        self.profile.cleanup()

    def call(self, method, **parameters):
        """Result of one command."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (said := self.read()).get("id") != self.count:
            self.events.append(said)
        assert "error" not in said, said
        return said["result"]

    def read(self):
        """The next message of the browser."""
        end = time.monotonic() + WAIT
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.answers], [], [], max(0, end - time.monotonic()))
            assert ready, f"Chromium said nothing for {WAIT} s"
            found = os.read(self.answers, 2**20)
            assert found, "Chromium ended"
            self.rest += found
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path):
        """Load a file and wait until all of it is there."""
        self.events = []
        self.call("Page.navigate", url=path.as_uri())
        while not self.said("Page.loadEventFired"):
            self.events.append(self.read())

    def said(self, method):
        """Parameters of all events of a kind."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def evaluate(self, script):
        """The value of a JavaScript expression, by JSON."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def look(self, width, height, scheme, mobile=False):
        """Set the window's size and whether the reader likes it light or dark."""
        self.width = width
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def shown(self, page, look):
        """Itself with a page as the reader of a look in LOOKS sees it, whose picture lies beside
        the page.
        """
        self.look(*LOOKS[look])
        self.open(page)
        self.screenshot(page.with_name(f"{look}.png"))
        return self

    def screenshot(self, path):
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
