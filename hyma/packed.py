"""A picture inside another file, by its address: a member of a tar archive, a cell of a parquet or an arrow file.

    00000.tar/000000012.jpg@1536+18213         18,213 bytes of the archive, from byte 1,536 on
    train-00000-of-00004.parquet/image@17      the column image of row 17, counted from 0

An address stands in a row where the path of a picture would. Nothing is extracted: no name in an archive becomes a path,
and `picture_bytes` takes a path and an address alike.
"""

import functools
import io
import os
import re
import threading
import urllib.parse
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from hyma.inflating import METHODS, read_inflated
from hyma.remote import find_remote, is_file, is_folder, open_file, read_bytes
from vlm import BadInput, open_image, reason_of

ENDINGS = (".tar", ".parquet", ".arrow", *METHODS)  # of the files that pictures are packed in
END_OF_FILE = re.compile(rf"(?P<kind>{'|'.join(map(re.escape, ENDINGS))})(?=/)", re.I)
PLACE = re.compile(r"/(?P<name>.*)@(?P<start>\d+)(\+(?P<size>\d+))?", re.S)  # within that file
CELLS_AT_ONCE = 32  # cells of a parquet file that are read together
BATCHES_KEPT = 8  # of so many cells: threads that read ahead do not come in order


class DamagedFile(ValueError):
    """Why a picture cannot be had from the file that it is in, whatever the machine does."""


class Address(NamedTuple):
    """Where a packed picture is."""

    file: Path  # that it is in
    kind: str  # how the name of that file ends
    name: str  # of the member or of the column
    start: int  # the first byte in a tar, else the row
    size: int | None  # in bytes, in a tar


def tar_address(name, start, size):
    """The address, within its archive, of a member. A name that is not UTF-8 is shown as far as it is."""
    return f"{name.encode(errors='replace').decode()}@{start}+{size}"


def cell_address(column, row):
    """The address of a cell within its file."""
    return f"{urllib.parse.quote(column, safe=' ')}@{row}"


def find_address(path) -> Address | None:
    """The Address that a path is, None for the path of a file of its own."""
    path = str(path)
    for end in END_OF_FILE.finditer(path):
        file = path[: end.end()]
        found = PLACE.fullmatch(path, end.end())
        if found and not is_spark_folder(file):
            size = None if found["size"] is None else int(found["size"])
            return Address(Path(file), end["kind"].lower(), found["name"], int(found["start"]), size)
    return None


def is_spark_folder(path):
    """Whether a path is a folder for all that it ends as a file: Spark writes such."""
    return is_remote_folder(path) if find_remote(path) else os.path.isdir(path)


@functools.lru_cache(maxsize=1024)
def is_remote_folder(path):
    """The same behind a URL, which is asked once."""
    return is_folder(path)


def containing_file(path):
    """The file whose bytes a picture is made of: that which it is packed in, or the picture's own."""
    address = find_address(path)
    return address.file if address else Path(path)


def picture_size(path):
    """How many bytes a picture has, as far as that is known before it is read: 0 for a cell and for a file behind a URL."""
    address = find_address(path)
    if address is None:
        return 0 if find_remote(path) else os.stat(path).st_size
    return address.size or 0


def picture_bytes(path):
    """The bytes of a picture, packed or in a file of its own. Raises DamagedFile if they are not in the file it names."""
    address = find_address(path)
    if address is None:
        return read_bytes(path)
    if not is_file(address.file):
        raise FileNotFoundError(address.file)
    if address.kind in (".parquet", ".arrow"):
        with CELLS_LOCK:
            return read_cell(address)
    return read_member(address)


def open_picture(path):
    """The PIL image of a picture, packed or in a file of its own."""
    return open_image(io.BytesIO(picture_bytes(path)))


def read_member(address):
    """The bytes of a tar's member."""
    if address.size is None:
        raise DamagedFile(f"{address.file.name}: no such member: {address.name}")
    data = b""
    if address.start < 2**63:  # a place that a file can have
        read = read_bytes if address.kind == ".tar" else read_inflated
        data = read(address.file, address.start, address.start + address.size)
    if len(data) < address.size:
        raise DamagedFile(f"{address.file.name} is cut off")
    return data


# ---------------------------------------------------------------------------------------------------- parquet and arrow

CELLS_LOCK = threading.Lock()  # what is read of these files is shared by the threads of a process


def import_arrow(path):
    """pyarrow. Raises BadInput where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"--data {path}: parquet and arrow files need pyarrow: pip install pyarrow") from None
    return pyarrow


def read_cell(address):
    """The bytes of the picture that a cell holds, as bytes or as {bytes, path}, the form of the datasets library."""
    column = urllib.parse.unquote(address.name)
    try:
        file = open_cells(address.file, address.kind, column, *file_version(address.file))
        value = file.read(address.start)
    except (ValueError, KeyError, IndexError) as error:  # Arrow's own errors are of these
        raise DamagedFile(f"{address.file.name}: {reason_of(error)}") from None
    except OSError as error:
        if error.errno is None:  # Arrow's word for bytes that cannot be unpacked; the machine's errors have a number
            raise DamagedFile(f"{address.file.name}: {reason_of(error)}") from None
        raise
    value = only_item(value)
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise DamagedFile(f"{address.file.name}: no picture in {column} of row {address.start}")
    return data


def only_item(value):
    """What a list of one thing holds; any other value as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def file_version(path):
    """What tells a file from what it was. What is open belongs to the process that has opened it: after a fork two would read on
    from one place in it."""
    if find_remote(path):
        return (os.getpid(),)
    status = os.stat(path)
    return os.getpid(), status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=4)
def open_cells(path, kind, column, *version):
    """The cells of a column. version: of the file, so that a file that has changed is opened again."""
    return ParquetCells(path, column) if kind == ".parquet" else ArrowCells(path, column)


class ArrowCells:
    """A column of an arrow file, which is mapped and not read."""

    def __init__(self, path, column):
        self.cells = open_arrow(path).column(column)

    def read(self, row):
        return self.cells[row].as_py()


def open_arrow(path):
    """The table of an arrow file: the stream that the datasets library saves, or a file with an index."""
    arrow = import_arrow(path)
    if find_remote(path):
        raise BadInput(f"--data {path}: arrow files are read from the disk alone; copy them here")
    source = arrow.memory_map(str(path))
    try:
        return arrow.ipc.open_stream(source).read_all()
    except arrow.ArrowInvalid:
        source.seek(0)
        return arrow.ipc.open_file(source).read_all()


class ParquetCells:
    """A column of a parquet file, of which only a few batches are in memory, however large its row groups are.

    Rows that are asked for in order, or nearly so, are read once.
    """

    def __init__(self, path, column):
        # pre_buffer would read a row group whole
        self.file = import_arrow(path).parquet.ParquetFile(open_file(path), pre_buffer=False, buffer_size=2**20)
        self.column = column
        self.first_rows = [0]  # of the row groups, and the number of all rows
        for group in range(self.file.num_row_groups):
            self.first_rows.append(self.first_rows[-1] + self.file.metadata.row_group(group).num_rows)
        self.group = None
        self.batches = iter(())
        self.next_row = 0  # of the file: that which the next batch begins with
        self.kept = OrderedDict()  # first row -> batch
        self.damage = {}  # row group -> (its first row that cannot be read, why)

    def read(self, row):
        if row >= self.first_rows[-1]:
            raise IndexError(f"has no row {row}")
        for first, batch in self.kept.items():
            if first <= row < first + len(batch):
                return batch[row - first].as_py()
        self.go_to(row)
        while True:
            batch = self.next_batch()
            first = self.next_row
            self.next_row += len(batch)
            if row < self.next_row:
                break
        self.kept[first] = batch
        if len(self.kept) > BATCHES_KEPT:
            self.kept.popitem(last=False)
        return batch[row - first].as_py()

    def next_batch(self):
        """The next batch of the group. Raises ValueError where it is damaged: so is what follows in the group, as
        nothing says where it begins."""
        try:
            return next(self.batches).column(0)
        except Exception as error:
            group, self.group = self.group, None  # its batches have ended
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise  # the machine's fault, or the network's
            self.damage[group] = self.next_row, reason_of(error)
            raise ValueError(reason_of(error)) from None

    def go_to(self, row):
        """Starts the row's group from its beginning, unless the next batches lead to the row."""
        group = 0
        while self.first_rows[group + 1] <= row:
            group += 1
        first_damaged, reason = self.damage.get(group, (row + 1, ""))
        if row >= first_damaged:
            raise ValueError(reason)
        if group != self.group or self.next_row > row:
            self.group = group
            self.next_row = self.first_rows[group]
            self.batches = self.file.iter_batches(CELLS_AT_ONCE, row_groups=[group], columns=[self.column])
