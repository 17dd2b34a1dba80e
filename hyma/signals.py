"""Signals of schedulers and of Ctrl-C: work is saved before it is left."""

import os
import signal
import sys
import time
from pathlib import Path

from hyma import ranks

FORWARDED_SECONDS = 10  # within which torchrun may pass on what a scheduler has sent to all processes


class Signals:
    """Signals of schedulers and of Ctrl-C, noticed between two steps of work so that everything can be saved first.

    SIGTERM, SIGINT and SIGXCPU (a batch system's limit of CPU time): save and leave, with exit status 128 + the signal's
    number (143, 130, 152). SIGUSR1: save and continue. A second signal to leave is obeyed at once.

        with Signals() as signals:
            for step in ...:
                ...
                if signals.arrived():
                    save()
                    signals.leave_if_asked()

    Processes that share a run (`hyma.ranks`) save and leave together: all of them call `arrived_anywhere` in its place.
    """

    LEAVE = (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU)

    def __enter__(self):
        self.save = False
        self.leave = None
        self.left_since = None  # when the first signal to leave came
        self.agreed = None  # the signal by which all ranks leave
        self.earlier = {number: signal.signal(number, self.handle) for number in (*self.LEAVE, signal.SIGUSR1)}
        return self

    def __exit__(self, *_):
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def handle(self, number, _):
        if number in self.LEAVE and self.leave is not None:
            if ranks.count() > 1 and time.monotonic() - self.left_since < FORWARDED_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.save = True
        if number in self.LEAVE:
            self.leave = number
            self.left_since = time.monotonic()

    def arrived(self):
        """Whether a signal requests a save. Reading this resets it, unless the signal requests to leave."""
        arrived, self.save = self.save, self.leave is not None
        return arrived

    def arrived_anywhere(self, step=0, due=False):
        """Whether all ranks save now: a signal requests it of one of them, or `due` is true on the first, which saves. Several
        ranks ask each other at every AGREE_EVERY-th step."""
        if ranks.count() == 1:
            return due or self.arrived()
        if step % ranks.AGREE_EVERY:
            return False
        saves, leaves = ranks.largest(int(self.arrived() or (due and ranks.is_first())), self.leave or 0)
        self.agreed = leaves or None
        return saves > 0

    def leave_if_asked(self):
        """Ends the process, its work being saved, if a signal requested that; of several ranks, if all have agreed on it."""
        leave = self.leave if ranks.count() == 1 else self.agreed
        if leave is not None:
            name = signal.Signals(leave).name
            print(f"\n{Path(sys.argv[0]).name}: {name}: saved; run the same command again to resume", file=sys.stderr)
            sys.exit(128 + leave)
