"""Files that survive a kill and a full disk: atomic writes, locks, and what a script prints when one cannot be written."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import platform
import re
import signal
import stat
import sys
from pathlib import Path

import torch

from vlm import BadInput, check_regular


def sha256_file(path) -> str:
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


HOST = re.sub(r"\W", "-", platform.node()) or "host"


def remove_leftovers(folder, alone=False):
    """Removes what a killed process left half-written in a folder and below it.

    alone: nobody else writes there now. Otherwise only what processes of this machine left that are gone.
    """
    for path in Path(folder).rglob(".*.tmp"):
        found = re.fullmatch(rf".*\.{re.escape(HOST)}\.(\d+)\.tmp", path.name)
        if alone or (found is not None and not is_running(int(found[1]))):
            path.unlink(missing_ok=True)


def is_running(process):
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's
        return True
    return True


@contextlib.contextmanager
def atomic_file(path):
    """A file to write to: `path` holds either all of what is written or what was there before, whatever happens."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        # O_EXCL: a link that somebody has put there is not followed
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder):
    """Makes a folder of our own inside another, and refuses a link in its place: what is behind it is not ours to write."""
    folder = Path(folder)
    if folder.is_symlink():
        raise BadInput(f"{folder}: is a link, and nothing is written through links; remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_text(path, text):
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_csv(path, rows):
    """Rows: dicts with the same keys, which become the header."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def save_tensors(value, path):
    with atomic_file(path) as file:  # a file and not its path, whose name torch.save would write into the bytes
        try:
            torch.save(value, file)
        except RuntimeError as error:  # what torch makes of a write that failed
            raise OSError(
                errno.EIO, "could not be written (is the disk full?); what was there is kept", str(path)
            ) from error


def read_jsonl(path):
    """The objects of a file of JSON lines. Raises BadInput, one line, if it cannot be read or holds anything else."""
    try:
        check_regular(path)
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: cannot be read as JSON lines: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise BadInput(f"{path}: line {number}: expected a JSON object, found {type(row).__name__}")
    return rows


def lock_folder(folder, wait=False):
    """Keeps other processes out of `folder` until the returned file is closed or this process is gone. What a killed
    process left half-written there is removed."""
    path = Path(folder) / ".lock"
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise BadInput(f"{path}: is a link or no file; remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise BadInput(f"{path}: is no regular file; remove it")
    handle = open(number, "rb+")  # noqa: SIM115
    try:
        take_lock(handle, wait)
    except OSError:
        raise BadInput(f"{folder}: another process is writing here; wait for it, or choose another --out") from None
    remove_leftovers(folder, alone=not wait)  # others that wait for their turn may be writing
    return handle


def take_lock(handle, wait):
    """Locks an open file for this process alone. Systems without such locks (Windows) lock nothing."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


CHECKPOINT_SECONDS = 60  # between two saves of long work, at most, unless one step of it takes longer

# ------------------------------------------------------------------------------------------- errors of one line

OUT_OF_MEMORY = (
    "out of memory; what was saved is kept, and the same command goes on where memory is free; a trainer needs less with a lower "
    "--batch-size, --pairs-per-step or --pairs-per-pass, embed.py with fewer encoders at a time"
)


def run_script(main):
    """Runs a script's main. What the user can fix ends as one line on stderr and exit status 1."""
    script = Path(sys.argv[0]).name
    try:
        run_main(main, script)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)


def run_main(main, script):
    """Runs a main of which only Ctrl-C and errors of the program are left as exceptions. Once it has ended Ctrl-C is none any
    more, as no line would be left to catch it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks to save: outside of `hyma.signals` there is nothing to save
    earlier_handler = signal.getsignal(signal.SIGINT)  # of `hyma.before_main`
    if earlier_handler is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    earlier_hook, sys.unraisablehook = sys.unraisablehook, interrupt_again
    try:
        main()
    except BadInput as error:
        sys.exit(f"{script}: {error}")
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit(f"{script}: {OUT_OF_MEMORY}")
    except RuntimeError as error:
        if "alloc" not in str(error):
            raise
        sys.exit(f"{script}: {OUT_OF_MEMORY}")
    except OSError as error:  # a full disk, a read-only folder
        sys.exit(f"{script}: {error.filename or 'output'}: {error.strerror or error}")
    finally:
        sys.unraisablehook = earlier_hook
        signal.signal(signal.SIGINT, earlier_handler)


def interrupt_again(dropped):
    """A `sys.unraisablehook`: Python drops an exception that is raised in a `__del__` or in the callback of a weak reference, and
    Ctrl-C with it. It is sent once more, a moment later."""
    if dropped.exc_type is KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
    else:
        sys.__unraisablehook__(dropped)
