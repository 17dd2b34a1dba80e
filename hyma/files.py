"""Files that survive a kill and a full disk: atomic writes, locks, provenance, and errors of one line."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from vlm import BadInput


def sha256_file(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(path):
    """A file to write to: `path` holds either all of what is written or what was there before, whatever happens."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON lines: {error}") from None


def lock_folder(folder, wait=False):
    """Keeps other processes out of `folder` until the returned file is closed or this process is gone."""
    handle = open(Path(folder) / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        raise BadInput(f"{folder}: another process is writing here; wait for it, or choose another --out") from None
    return handle


def provenance(device) -> dict:
    """What a result depends on beside its flags: versions, device, commit."""
    import importlib.metadata as metadata

    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "timm", "sentence-transformers", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    name = (
        torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else f"cpu ({os.cpu_count()} cores)"
    )
    return {
        "versions": versions,
        "device": name,
        "commit": commit,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def peak_bytes(device) -> int:
    """The most memory this process has held: on the GPU, or, on a CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage, whose maximum a process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, ValueError, IndexError):  # not on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def run_script(main):
    """Runs a script's main. What the user can mend ends as one line on stderr and exit status 1."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except BadInput as error:
        sys.exit(f"{script}: {error}")
    except OSError as error:  # a full disk, a read-only folder
        sys.exit(f"{script}: {error.filename or 'output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
