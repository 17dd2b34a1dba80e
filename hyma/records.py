"""The records of a report: the tables and thumbnails that were saved, and results.json, which lists them.

    report/results.json    the answer, every connector's scores, every method's, what the page shows besides tables, and
                           the sha256 of every record, its own too
           ranking.csv     a row for each task and pair, truly best first
           selectors.csv   a row for each task and method
           <figure>.csv    the data of a figure
           gallery.csv, thumbnails/    captions and the pictures that two pairs retrieve for them

Figures and page are drawn from these files alone (`hyma/report.py`). A record that is not as it was saved is refused before
anything is drawn, so that no other figure is ever drawn from it in silence.
"""

import csv
import hashlib
import io
import json
import re
from pathlib import Path

from hyma.embeddings import unique
from hyma.files import atomic_file, make_folder, remove_leftovers, write_csv, write_json
from vlm import BadInput, check_regular, read_json

RESULTS = "results.json"
FOLDERS = ("thumbnails", "clip_benchmark")


def check_report_folder(folder):
    """Raises BadInput for the folder of a run or of embeddings: a run has a ranking.csv, too, which a report would overwrite."""
    for name in ("config.json", "manifest.json"):
        if (folder / name).exists():
            raise BadInput(f"--out {folder}: holds other files, {name} among them; name a new folder for the report")


def save_records(folder, tables, thumbnails, images, results):
    """Writes the records of a report. What an earlier report left under a name of its own is deleted.

    tables: {file name: rows}. thumbnails: {file name: bytes}. images: names of the figures that will be drawn. results: what
    results.json holds besides the list of files and their checksums.
    """
    scores = benchmark_files(results["results"])
    files = ["report.html", RESULTS, *images, *tables, *thumbnails, *scores]
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    delete_stale(folder, files)
    for name, rows in tables.items():
        write_csv(folder / name, rows)
    for name in (*thumbnails, *scores):
        make_folder((folder / name).parent)
    for name, jpeg in thumbnails.items():
        with atomic_file(folder / name) as file:
            file.write(jpeg)
    for name, record in scores.items():
        write_json(folder / name, record)

    checksums = {}
    for name in (*tables, *thumbnails, *scores):
        checksums[name] = sha256((folder / name).read_bytes())
    results = {"files": files} | results | {"checksums": checksums}
    results["checksums"][RESULTS] = checksum_of_results(results)
    write_json(folder / RESULTS, results)


def benchmark_files(records):
    """{file name: record} of the connectors' scores: CLIP_benchmark's `build` makes a row of a CSV of each."""
    files = {}
    for number, record in enumerate(records):
        model = re.sub(r"[^\w.-]", "_", record["model"])
        files[f"clip_benchmark/{number:04}_{model}_{record['task']}.json"] = record
    return files


def delete_stale(folder, files):
    """Deletes what an earlier report wrote and this one will not, if that report's list can be read."""
    try:
        earlier = read_json(folder / RESULTS).get("files", [])
    except (BadInput, OSError):
        earlier = []
    for name in earlier if isinstance(earlier, list) else []:
        if name not in files and can_be_record(name):
            (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()


def can_be_record(name):
    """Whether a report gives a file such a name: a results.json cannot make us read, write or delete anything else."""
    names = r"[\w-]+\.(png|csv)|thumbnails/\d+\.jpg|clip_benchmark/\d+_[\w.-]+\.json"
    return isinstance(name, str) and re.fullmatch(names, name) is not None


def checksum_of_results(results):
    """The sha256 of what results.json holds, its own checksum left out."""
    checksums = dict(results["checksums"])
    checksums.pop(RESULTS, None)
    return sha256(json.dumps(results | {"checksums": checksums}).encode())


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Records:
    """The saved records of a report. Raises BadInput, one line that names the file, for what is damaged or missing."""

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / RESULTS
        if not path.is_file():
            raise BadInput(f"{folder}: holds no report (no {RESULTS}); make one with evaluate.py")
        self.results = read_json(path)
        if not isinstance(self.results.get("checksums"), dict) or "sentences" not in self.results:
            raise BadInput(f"{path}: is damaged, or of an earlier version of this program; run evaluate.py again")
        self.checksums = self.results["checksums"]
        self.check(RESULTS, checksum_of_results(self.results))
        for name in self.checksums:  # before anything is drawn
            if name != RESULTS:
                self.read(name)
        self.page = self.results["page"]
        self.method_rows = self.results["methods"]  # of selectors.csv
        self.methods = unique(row["method"] for row in self.method_rows)

    def check(self, name, digest):
        """Raises BadInput if a file's sha256 is not what results.json has."""
        if digest != self.checksums.get(name):
            message = "is not as evaluate.py saved it (sha256); run evaluate.py again"
            raise BadInput(f"{self.folder / name}: {message}")

    def path(self, name):
        """Where a file of the report is. Raises BadInput for a name that no report gives."""
        if not can_be_record(name):
            raise BadInput(f"{self.folder / RESULTS}: names {name!r}, which is no file of a report")
        return self.folder / name

    def read(self, name):
        """The bytes of a record, as they were saved."""
        path = self.path(name)
        try:
            check_regular(path)
            data = path.read_bytes()
        except FileNotFoundError:
            raise BadInput(f"{path}: no such file; run evaluate.py again") from None
        self.check(name, sha256(data))
        return data

    def read_table(self, name, texts=(), numbers=()):
        """The rows of a CSV as dicts. texts: columns that must be there. numbers: columns of floats, None in an empty cell.

        Raises BadInput for a missing column, a row of another length, and a text where a number must be.
        """
        path = self.path(name)
        try:
            table = csv.DictReader(io.StringIO(self.read(name).decode(), newline=""), strict=True)
            rows = list(table)
        except (UnicodeDecodeError, csv.Error) as error:
            raise BadInput(f"{path}: cannot be read as CSV: {error}") from None
        for column in (*texts, *numbers):
            if column not in (table.fieldnames or []):
                raise BadInput(f"{path}: has no column {column!r}; run evaluate.py again")
        if not rows:
            raise BadInput(f"{path}: has no rows; run evaluate.py again")
        for number, row in enumerate(rows, start=1):
            if None in row or None in row.values():
                raise BadInput(f"{path}: row {number}: expected {len(table.fieldnames)} fields; run evaluate.py again")
            for column in numbers:
                row[column] = read_number(row[column], f"{path}: row {number}: {column}")
        return rows

    def ranking(self):
        """The rows of ranking.csv on the first task: every pair, truly best first."""
        first_task = self.page["tasks"][0]["name"]
        rows = self.read_table("ranking.csv", ("task", "image", "text"))
        return [row for row in rows if row["task"] == first_task]


def read_number(cell, place):
    """The float in a cell of a table, None for an empty one. place: of the cell, for the error."""
    if not cell:
        return None
    try:
        return float(cell)
    except ValueError:
        raise BadInput(f"{place}: expected a number, found {cell!r}; run evaluate.py again") from None
