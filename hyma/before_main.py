"""What a signal does while a script imports torch, which takes seconds, and once its work has ended: nothing can be lost, and
no traceback is shown.

Each script imports this before anything that takes time, when it is run and not imported. Ctrl-C ends it in one line;
SIGUSR1 asks to save, and there is nothing to save; SIGTERM ends it at once, as it does by itself. Within `run_script`
Ctrl-C is an exception again, and within `hyma.signals.Signals` all of them save first.
"""

import os
import signal
import sys
from pathlib import Path


def leave(*_):
    """Ends the process. An exception would not do: modules that are half imported catch some, and change others."""
    os.write(2, f"\n{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(128 + signal.SIGINT)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore Ctrl-C
    signal.signal(signal.SIGINT, leave)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
