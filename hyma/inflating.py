"""Compressed tar archives as files in which one can seek: their bytes are inflated as they are read, and never extracted.

To go forward is to inflate what lies between; to go back is to begin anew. So members are best read in their order, as a pass
does.
"""

import bz2
import functools
import gzip
import lzma
import os
import threading
import zlib

from hyma.remote import find_remote, open_file
from vlm import BadInput

try:
    from compression import zstd  # from Python 3.14 on
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None

# How the name of a compressed archive ends -> the module that opens it.
METHODS = {
    **dict.fromkeys((".tar.gz", ".tgz"), gzip),
    **dict.fromkeys((".tar.bz2", ".tbz2", ".tbz"), bz2),
    **dict.fromkeys((".tar.xz", ".txz"), lzma),
    **dict.fromkeys((".tar.zst", ".tzst"), zstd),
}
# What is raised where the bytes are cut off or are others.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, *([zstd.ZstdError] if zstd else []))
MOST_INFLATED = 100  # bytes for each byte of a file: pictures and captions have fewer, a bomb has more
AT_ONCE = 2**20  # bytes
INFLATED_LOCK = threading.Lock()  # the place in a file is shared by the threads of a process


def find_ending(path):
    """How the name of a compressed archive ends, None for any other file."""
    for ending in METHODS:
        if path.name.lower().endswith(ending):
            return ending
    return None


def open_inflated(path):
    """The inflated bytes of a compressed archive, as a file. Raises BadInput if what inflates it is not installed."""
    ending = find_ending(path)
    if METHODS[ending] is None:
        raise BadInput(f"--data {path}: {ending} files need a package: pip install backports.zstd")
    return METHODS[ending].open(open_file(path), "rb")


def inflated_size(path):
    """(how many bytes can be inflated of a file, whether these are all). Raises BadInput for one that is made to fill memory."""
    with open_file(path) as file:
        most = MOST_INFLATED * file.seek(0, os.SEEK_END) + 64 * AT_ONCE
    size = 0
    with open_inflated(path) as file:
        try:
            while data := file.read1(AT_ONCE):
                size += len(data)
                if size > most:
                    raise BadInput(
                        f"--data {path}: inflates to more than {MOST_INFLATED} times its size; "
                        "is it an archive of pictures?"
                    )
        except DAMAGE:
            return size, False
        except OSError as error:
            if error.errno is not None:  # the machine's
                raise
            return size, False
    return size, True


def read_inflated(path, start, end):
    """Some of the inflated bytes of a file, fewer where it is cut off."""
    version = os.stat(path).st_mtime_ns if not find_remote(path) else None
    with INFLATED_LOCK:
        file = keep_open(path, os.getpid(), version)
        try:
            file.seek(start)
            return file.read(end - start)
        except DAMAGE:
            keep_open.cache_clear()
            return b""


@functools.lru_cache(maxsize=2)
def keep_open(path, process, version):
    """The inflated file, where it was left. process: a place in a file cannot be shared after a fork. version: of the file."""
    return open_inflated(path)
