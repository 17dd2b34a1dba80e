"""Makes a process kill itself at its k-th write, or count its writes.

A write is an opening of a file to write, a half-written buffer, the moments before and after a rename, a removal, a new
folder. Before and after an fsync a kill leaves the same files as before the rename that follows.
"""

import io
import itertools
import os
import signal
import sys
from pathlib import Path


class Writes:
    """Counts the writes of this process, and kills it at one of them."""

    def __init__(self, kill_at=None):
        self.numbers = itertools.count(1)  # a counter that threads may share
        self.kill_at = kill_at
        self.count = 0

    def event(self):
        self.count = next(self.numbers)
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function):
        """A function that counts before and after it does what it did."""

        def wrapped(*arguments, **options):
            self.event()
            value = function(*arguments, **options)
            self.event()
            return value

        return wrapped

    def audit(self, name, arguments):
        """What Python reports of every opening, removal and new folder."""
        if name == "open":
            path, _, flags = arguments
            to_write = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, str) and to_write and not path.startswith("/dev"):
                self.event()
        elif name in ("os.remove", "os.mkdir", "os.rmdir"):
            self.event()

    def torn_open(self, path, mode="r", *arguments, **options):
        """`open`, but every write to the file has a moment when half of it is written."""
        file = open(path, mode, *arguments, **options)  # noqa: SIM115
        if mode != "wb":
            return file
        torn = io.BufferedWriter(TornFile(file, self.event))
        torn.kept = file  # else it would be closed at once
        return torn


class TornFile(io.RawIOBase):
    """Writes to a file in two parts, with an event between them."""

    def __init__(self, file, event):
        self.file = file
        self.whole_write = file.raw.write
        self.event = event

    def writable(self):
        return True

    def fileno(self):
        return self.file.fileno()

    def write(self, data):
        half = bytes(data[: len(data) // 2])
        if half:
            self.whole_write(half)
            self.event()
        return len(half) + self.whole_write(bytes(data[len(half) :]))


def install_hook(hook):
    """Prepares this process, in which a script is about to run. Returns what to call at the end.

    hook: {"kill_at": k} kills at the k-th write; {"count": file} writes their count; {"begun": file} is made once the
    script has begun; {"often": True} saves checkpoints after every step.
    """
    import hyma.files
    import hyma.runs

    writes = Writes(hook.get("kill_at"))
    if "kill_at" in hook or "count" in hook:
        sys.addaudithook(writes.audit)
        os.replace = writes.around(os.replace)
        hyma.files.open = writes.torn_open
    if hook.get("often"):
        hyma.runs.CHECKPOINT_SECONDS = 0
    if "begun" in hook:
        announce_start(hyma.files, Path(hook["begun"]))

    def report():
        if "count" in hook:
            total = writes.count  # before this file is a write, too
            Path(hook["count"]).write_text(str(total))

    return report


def announce_start(files, path):
    """Makes a file when a script hands its main to `run_script`."""
    run_script = files.run_script

    def run_and_announce(main):
        def announced_main():
            path.touch()
            main()

        run_script(announced_main)

    files.run_script = run_and_announce
