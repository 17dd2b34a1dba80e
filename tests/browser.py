"""A real headless browser for tests: Chromium, driven by its DevTools protocol over a pipe."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
)


def find_chromium():
    """The path of a Chromium, None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab. `with Browser(profile, url) as page:`; every wait ends after `seconds`."""

    def __init__(self, profile, url, size=(1200, 900), seconds=60):
        self.seconds, self.number, self.buffer = seconds, 0, b""
        self.asked = []  # the addresses that the page has asked for
        for_browser, self.commands = os.pipe()
        self.answers, of_browser = os.pipe()
        # the browser takes them as 3 and 4: none of these two must be either
        to_browser, from_browser = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (for_browser, of_browser)]
        flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "--remote-debugging-pipe"]
        line = [
            "bash",
            "-c",
            f'exec "$@" 3<&{to_browser} 4>&{from_browser}',
            "bash",
            find_chromium(),
            *flags,
            "about:blank",
        ]
        self.process = subprocess.Popen(line, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL)
        for end in (for_browser, of_browser, to_browser, from_browser):
            os.close(end)
        self.session = None
        targets = self.send("Target.getTargets")["targetInfos"]
        tab = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "DOM", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=url)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)
        os.close(self.commands)
        os.close(self.answers)

    def send(self, method, **parameters):
        """The result of a command."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
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
            assert ready, "the browser does not answer"
            self.buffer += os.read(self.answers, 2**20)
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
