"""The machine that a result is made on: how much memory may be used, and what is recorded: versions, device, commit, the
most memory held."""

import contextlib
import ctypes
import importlib.metadata as metadata
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch


def provenance(device) -> dict:
    """What a result depends on besides its flags: versions, device, commit."""
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


COPIES_BYTES = 2**31  # on a CPU, of copies that a run makes of embeddings beside the files that are mapped


def bytes_for_copies(device) -> int:
    """How much memory copies of embeddings may take: half of what a GPU has free; on a CPU a fixed part."""
    if device.type == "cuda":
        return free_bytes(device) // 2
    return COPIES_BYTES


def bytes_for_files() -> int:
    """How much of the files that this process maps can stay in memory: what the system has available, its page cache
    included; half of all memory where it does not say so, as on macOS."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
        return 1024 * int(meminfo.partition("MemAvailable:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def keep_freed_memory():
    """Lets this process keep the memory that it frees, to use it again.

    The C library gives blocks above 32 MB back to the system at once, which hands them out anew, page by page and filled with
    zeros: up to two thirds of the time of a convolutional network on a CPU. This is of glibc; others go without.
    """
    trim_threshold, most_mapped = -1, -4  # the numbers of these settings in malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, -1)  # never
        library.mallopt(most_mapped, 0)


def free_bytes(device) -> int:
    """How much more memory a device has for models and what they compute."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else bytes_for_files()


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
