"""Files behind a URL: s3://, gs://, hf://, https:// and whatever else fsspec has a file system for.

`open_source` takes the URL that --data names. From then on a path below it, as pathlib writes it (s3:/bucket/00000.tar), is
read over the network by the functions here, and any other path from the disk. So only what the user has named is reached: no
row of a table, and no manifest, can make a program fetch something else.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path

from vlm import BadInput, reason_of

ROOTS = set()  # of this process: URLs of folders, as pathlib writes them


def open_source(data):
    """Makes the files of a URL readable. Returns whether `data`, a Path, is one. Raises BadInput if it cannot be reached."""
    protocol, colon, _ = str(data).partition(":/")
    if not colon or not protocol.isalnum() or len(protocol) < 2 or data.exists():
        return False
    try:
        import fsspec

        system = fsspec.core.url_to_fs(as_url(data))[0]
        if not system.exists(as_url(data)):  # some file systems say so of a machine that does not answer, too
            raise BadInput(f"--data {as_url(data)}: no such file or folder, or it cannot be reached")
        folder = data if system.isdir(as_url(data)) else data.parent
    except BadInput:
        raise
    except Exception as error:  # an unknown protocol, a file system that is not installed, a network, a login
        raise BadInput(f"--data {as_url(data)}: cannot be reached: {reason_of(error)}") from None
    ROOTS.add(str(folder))
    return True


def find_remote(path):
    """(file system, URL) of a path below an opened source, None for any other."""
    for root in ROOTS:
        before, found, after = str(path).partition(root)
        if found and (before == "" or before.endswith("/")) and ".." not in after.split("/"):
            import fsspec

            # fsspec keeps the file system, one for each process: most cannot be used after a fork
            return fsspec.core.url_to_fs(as_url(found + after))[0], as_url(found + after)
    return None


def local_path(data):
    """The path that a file:// URL names, any other path as it is."""
    protocol, colon, rest = str(data).partition(":")
    return Path(rest) if colon and protocol in ("file", "local") and rest.startswith("/") else data


def as_url(path):
    """The URL that pathlib has written with one slash."""
    protocol, _, rest = str(path).partition(":/")
    return f"{protocol}://{rest}"


def list_remote(data, pattern=None):
    """The files below an opened source, sorted: all of them, or those whose paths have the form of `pattern`, in which * is."""
    system, url = find_remote(data)
    top = system._strip_protocol(url).rstrip("/")
    files = []
    for name in system.glob(as_url(pattern)) if pattern else system.find(url):
        files.append(data / name[len(top) :].lstrip("/") if name != top else data)
    return sorted(files)


def list_folder(folder):
    """The files right in a folder, sorted; none where a server lists none."""
    remote = find_remote(folder)
    if remote is None:
        return sorted(path for path in folder.iterdir() if path.is_file())
    with network_errors(remote[1]), nothing_there():
        found = remote[0].ls(remote[1], detail=True)
        return sorted(folder / entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "file")
    return []


def is_file(path):
    """Whether there is a regular file. Raises OSError if that cannot be known now."""
    remote = find_remote(path)
    if remote is None:
        return stat.S_ISREG(os.stat(path).st_mode)
    with network_errors(remote[1]):
        return kind_of(*remote) == "file"


def is_folder(path):
    """Whether there is a folder."""
    remote = find_remote(path)
    if remote is None:
        return os.path.isdir(path)
    with network_errors(remote[1]):
        return kind_of(*remote) == "directory"


def kind_of(system, url):
    """What a URL is to its file system: "file", "directory" or, where it is nothing, None. Raises what the network
    does: fsspec's own isfile would take a server that does not answer for a missing file."""
    with nothing_there():
        return system.info(url)["type"]
    return None


@contextlib.contextmanager
def nothing_there():
    """Ends the block where a server says that there is no such file, or that it shows none: some say 401 or 403 of a
    missing file to those who may not list the others. Over http, fsspec turns every failure into a missing file, whose
    cause says what it was."""
    try:
        yield
    except Exception as error:  # file systems raise errors of many types
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        says_so = isinstance(cause, FileNotFoundError | PermissionError | NotImplementedError)
        if not (says_so or getattr(cause, "status", None) in (401, 403, 404, 410)):
            raise cause from None


def open_file(path):
    """A file to read from, in which one can seek."""
    remote = find_remote(path)
    if remote is None:
        return open(path, "rb")
    with network_errors(remote[1]):
        return RemoteFile(remote[0].open(remote[1], "rb"), remote[1])


class RemoteFile:
    """An open file of a file system: what goes wrong while it is read is the network's fault, and no row's."""

    def __init__(self, file, url):
        self.file, self.url = file, url

    def read(self, size=-1):
        with network_errors(self.url):
            return self.file.read(size)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def read_bytes(path, start=None, end=None):
    """The bytes of a file, or some of them."""
    remote = find_remote(path)
    if remote is not None:
        with network_errors(remote[1]):
            data = remote[0].cat_file(remote[1], start=start, end=end)
        if end is not None and len(data) > end - start:
            raise OSError(errno.EIO, "its server sends whole files and no parts of them; copy it here", remote[1])
        return data
    if start is None:
        return Path(path).read_bytes()
    with open(path, "rb") as file:
        end = min(end, os.fstat(file.fileno()).st_size)  # whatever somebody has written into an address
        file.seek(start)
        return file.read(max(0, end - start))


@contextlib.contextmanager
def network_errors(url):
    """What a file system raises becomes an OSError with a number: the machine's fault, and no row's. A missing file is one."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, reason_of(error), url) from error
