"""The results of a search as HTML: one self-contained page, or a part of the page that `--serve` shows."""

import base64
from pathlib import Path
from typing import NamedTuple

import jinja2

from hyma.gallery import small_jpeg


class Tile(NamedTuple):
    """One result on the page."""

    score: float
    text: str
    name: str | None = None  # of its picture, None of a class
    jpeg: str | None = None  # base64, None for a picture that is not shown


class Section(NamedTuple):
    """A question and its results."""

    title: str
    note: str = ""
    problem: str = ""  # what went wrong
    tiles: tuple = ()


class Page(NamedTuple):
    title: str
    sections: list


def make_section(search, title, note, hits):
    """The Section of a search's Hits, with a small copy of each picture that is there and may be shown."""
    tiles = []
    absent = 0
    for hit in hits:
        jpeg = thumbnail(search.find_picture(hit.picture), hit.sha256) if hit.picture else None
        absent += hit.picture is not None and jpeg is None
        tiles.append(Tile(hit.score, hit.text, hit.picture, jpeg))
    return Section(title, note, how_to_show(search, absent, len(hits)), tuple(tiles))


def thumbnail(path, digest):
    """A small copy of a picture as base64, None if it is not there or, by its digest, another than was embedded."""
    jpeg = small_jpeg(path, digest) if path else None
    return base64.b64encode(jpeg).decode() if jpeg else None


def how_to_show(search, absent, count):
    """A line about pictures that are not shown, "" if all are, or if the folder does not say where its pictures are."""
    if not absent or not search.data.rows:
        return ""
    return (
        f"{absent} of {count} pictures are not in {search.allowed} as they were embedded; "
        "name where they are now: --pictures FOLDER"
    )


def render_page(title, sections):
    """The whole page."""
    return template().render(page=Page(title, sections))


def render_part(sections):
    """The sections alone, with their style."""
    return str(template().make_module().part(sections))


def template():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("results.html")
