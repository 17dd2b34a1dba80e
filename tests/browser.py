"""A real headless browser for tests: Chromium, driven by its DevTools protocol over a pipe."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-component-update",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)
COMMANDS_OF_CHROMIUM, ANSWERS_OF_CHROMIUM = 3, 4  # the descriptors that it reads from and writes to


def find_chromium():
    """The path of a Chromium, None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab. `with Browser(profile, url) as page:`; every wait ends after `seconds`, or when the browser does."""

    def __init__(self, profile, url, size=(1200, 900), seconds=60):
        self.seconds, self.number, self.buffer = seconds, 0, b""
        self.asked = []  # the addresses that the page has asked for
        self.log = Path(f"{profile}.log")  # what the browser prints
        flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "about:blank"]
        self.start(find_chromium(), flags)
        try:
            self.open_tab(url)
        except BaseException:
            self.stop()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self, program, flags):
        """Starts the browser, a group of processes, with its ends of two pipes and no other file of ours."""
        for_browser, self.commands = os.pipe()
        self.answers, of_browser = os.pipe()
        ends = []
        for end in (for_browser, of_browser):
            ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))  # neither is 3 or 4
            os.close(end)
        files = [
            (os.POSIX_SPAWN_OPEN, 2, self.log, os.O_WRONLY | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, ends[0], COMMANDS_OF_CHROMIUM),
            (os.POSIX_SPAWN_DUP2, ends[1], ANSWERS_OF_CHROMIUM),
        ]
        self.process = os.posix_spawn(program, [program, *flags], os.environ, file_actions=files, setpgroup=0)
        for end in ends:
            os.close(end)

    def open_tab(self, url):
        """Attaches to the one tab and goes to the address."""
        self.session = None
        targets = self.send("Target.getTargets")["targetInfos"]
        tab = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "DOM", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=url)

    def stop(self):
        """Ends the browser with all of its processes."""
        os.close(self.commands)
        os.close(self.answers)
        os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)

    def send(self, method, **parameters):
        """The result of a command."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
        with contextlib.suppress(BrokenPipeError):  # it has ended, as its answer tells
            os.write(self.commands, json.dumps(command).encode() + b"\0")
        until = time.monotonic() + self.seconds
        while True:
            message = self.receive(until)
            if message.get("method") == "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"])
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def receive(self, until):
        """The next message."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0, until - time.monotonic()))
            assert ready, f"the browser does not answer for {self.seconds} s; it prints into {self.log}"
            part = os.read(self.answers, 2**20)
            assert part, f"the browser has ended: {self.log.read_text(errors='replace')[-300:]!r}"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def value(self, expression):
        """The value of an expression of JavaScript."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    def wait_for(self, expression):
        """Waits until an expression is true."""
        until = time.monotonic() + self.seconds
        while not self.value(expression):
            assert time.monotonic() < until, f"never true: {expression}\n{self.value('document.body.innerText')}"
            time.sleep(0.3)

    def type(self, selector, text):
        """Types a text into a field, and Enter."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        self.value("document.activeElement.select && document.activeElement.select()")
        self.send("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.send("Input.dispatchKeyEvent", type=kind, **enter)

    def choose_file(self, selector, path):
        """Gives a file to a field that takes one."""
        root = self.send("DOM.getDocument", depth=-1)["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path):
        png = self.send("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(png))
