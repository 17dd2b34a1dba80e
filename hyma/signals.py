"""Signals of schedulers and of Ctrl-C: work is saved before it is left."""

import os
import signal
import sys
from pathlib import Path


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
    """

    LEAVE = (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU)

    def __enter__(self):
        self.save = False
        self.leave = None
        self.earlier = {number: signal.signal(number, self.handle) for number in (*self.LEAVE, signal.SIGUSR1)}
        return self

    def __exit__(self, *_):
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def handle(self, number, _):
        if number in self.LEAVE and self.leave is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.save = True
        if number in self.LEAVE:
            self.leave = number

    def arrived(self):
        """Whether a signal requests a save. Reading this resets it, unless the signal requests to leave."""
        arrived, self.save = self.save, self.leave is not None
        return arrived

    def leave_if_asked(self):
        """Ends the process, its work being saved, if a signal requested that."""
        if self.leave is not None:
            name = signal.Signals(self.leave).name
            print(f"\n{Path(sys.argv[0]).name}: {name}: saved; run the same command again to resume", file=sys.stderr)
            sys.exit(128 + self.leave)
