"""Pictures on disk: the file that a path means, what format it has, whether it can be decoded, the digest of its bytes.

A picture is what a file shows. `image` is its path, as rows and tables name it, the kind of its encoder, and, of tensors,
what that encoder makes of it (`images`, [n, D_i]).
"""

import errno
import hashlib
import io
import os
import unicodedata
import urllib.parse
from pathlib import Path
from typing import NamedTuple

from hyma import remote
from hyma.packed import DamagedFile, containing_file, picture_bytes, picture_size
from vlm import BadInput, open_image, reason_of

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
}
# Pictures and films that are not read: a folder's files of these kinds are refused by name and not passed over.
OTHER_SUFFIXES = {
    *(".svg", ".ico", ".jp2", ".j2k", ".jxl", ".psd", ".eps", ".tga", ".exr", ".dng", ".cr2", ".nef", ".arw", ".pdf"),
    *(".mp4", ".mov", ".avi", ".webm", ".mkv"),
}
LARGEST_FILE = 2**29  # bytes of a picture's file

# What a file begins with, and the format that this means.
SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
)
READ_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WebP", "AVIF")

# What the file system answers to a path that names no file. Anything else is the machine's fault and not the row's.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class Picture(NamedTuple):
    """What the pass found of a picture."""

    reason: str | None = None  # why it cannot be used
    image: str | None = None  # its path from the root, as it is on disk
    sha256: str | None = None  # of its bytes


def read_picture(root, image, known=frozenset()):
    """Finds, checks and decodes a picture, once: (its Picture, the picture as Pillow's RGB).

    image: its path as a table has it, from the folder `root`. The second is None where the picture cannot be used, and
    where its digest is in `known`: what it shows is not needed then.

    Raises BadInput if the machine cannot read now: too many open files, a disk's fault, no permission. A later pass may
    read the same file, so this says nothing about the row.
    """
    reason = why_no_path(image)
    if reason:
        return Picture(reason), None
    try:
        found = find_file(root, image)
        if found is None:
            return Picture("missing file"), None
        path = root / found
        size = picture_size(path)
        if size > LARGEST_FILE:
            reason = f"unreadable image: a file of {size / 2**20:,.0f} MiB; at most {LARGEST_FILE >> 20} are read"
            return Picture(reason), None
        data = picture_bytes(path)
    except FileNotFoundError:
        return Picture("missing file"), None
    except DamagedFile as error:
        return Picture(f"unreadable image: {error}"), None
    except OSError as error:
        raise BadInput(
            f"{root / image}: {error.strerror or error}; this says nothing about the picture, so the pass stops; fix it "
            "and run the same command again to resume"
        ) from None
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 in known:
        return Picture(None, found, sha256), None
    rgb, reason = decode(data)
    if reason:
        return Picture(reason), None
    return Picture(None, found, sha256), rgb


def why_no_path(image):
    """Why a table's value cannot be the path of a picture, or None."""
    start = image[:8].casefold()
    if start.startswith(("http:", "https:", "s3:", "gs:", "ftp:")):
        return "web address: nothing is downloaded here; use img2dataset, then embed what it wrote"
    if start.startswith("data:"):
        return "data URI: write the picture to a file"
    if "\0" in image:
        return "missing file"
    return None


def find_file(root, image):
    """The path, from `root`, of the file that a table means by `image`; None if there is none.

    Tables come from other machines: with blanks around, backslashes, percent signs, file://, ~, accents composed
    otherwise, .JPG for .jpg, or without the ending. As it is written counts first.
    """
    for spelling in spellings(image):
        if is_file(root / spelling):
            return spelling
    if not image.strip() or Path(image).suffix.lower() in IMAGE_SUFFIXES or "@" in image:
        return None
    with_ending = [image.strip() + suffix for suffix in sorted(IMAGE_SUFFIXES)]
    there = [path for path in with_ending if is_file(root / path)]
    return there[0] if len(there) == 1 else None


def spellings(image):
    """What may be meant by a path, likeliest first."""
    yield image
    plain = image.strip()
    yield plain
    if plain.casefold().startswith("file:"):
        plain = urllib.parse.unquote(urllib.parse.urlsplit(plain).path)
        yield plain
    if plain.startswith("~"):
        yield os.path.expanduser(plain)
    slashes = plain.replace("\\", "/")
    yield slashes
    yield "/".join(map(str.strip, slashes.split("/")))  # blanks behind a folder that was put before the path
    for decoded in (slashes, urllib.parse.unquote(slashes, errors="surrogateescape")):
        yield decoded
        for form in ("NFC", "NFD"):
            yield unicodedata.normalize(form, decoded)
        path = Path(decoded)
        for suffix in (path.suffix.lower(), path.suffix.upper()):
            yield str(path.with_suffix(suffix)) if path.suffix else decoded


def is_file(path):
    """Whether there is a regular file, or one that the picture of an address is in. Raises OSError if that cannot be known
    now."""
    try:
        return remote.is_file(containing_file(path))
    except (ValueError, UnicodeError):
        return False
    except OSError as error:
        if error.errno in NO_FILE:
            return False
        raise


def decode(data):
    """(the picture that the bytes of a file hold, None), or (None, why they hold none that can be decoded)."""
    if not data:
        return None, "unreadable image: an empty file"
    try:
        return open_image(io.BytesIO(data)), None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them raise
        return None, f"unreadable image: {why_not_decoded(data, error)}"


def why_not_decoded(data, error):
    """What is wrong with the bytes of a file that Pillow could not decode."""
    name = format_of(data)
    if type(error).__name__ != "UnidentifiedImageError" and str(error):
        return f"{name or 'unknown format'}: {reason_of(error)}"
    if name == "HTML":
        return "a web page"
    if name is None:
        return "of no known format"
    if name in READ_FORMATS:
        return f"a damaged {name} file"
    advice = " (pip install pillow-heif)" if name == "HEIC" else ""
    return f"{name} is not a format that is read{advice}"


def format_of(data):
    """The format that the first bytes of a file show, or None."""
    for signature, name in SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand in (b"avif", b"avis"):
            return "AVIF"
        return "HEIC" if brand in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1") else "a film (MP4)"
    head = data[:256].lstrip().lower()
    if b"<svg" in head:
        return "SVG"
    if head.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    return None


def holds_picture(path):
    """Whether a file, whatever its name, begins as a picture does."""
    with remote.open_file(path) as file:
        name = format_of(file.read(64))
    return name in READ_FORMATS or name == "HEIC"
