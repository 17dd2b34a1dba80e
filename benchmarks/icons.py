"""The ladder's pictures and captions: icons of npm's @iconify/json, each drawn at 128 pixels.

    pip install resvg-py              # draws the icons; npm brings them

`write_table` makes a table of the coloured or of the monochrome sets: image, caption, split. A caption is an icon's name in
words. The same thing is drawn by many sets, so the split is by caption: all pictures of a caption are in one part. The test
rows are the same for every rung of the ladder. All other rows follow in an order of their captions that looks random, so that
the first N of them are a corpus of N rows, of which a tenth, by caption, is there to choose by.
"""

import csv
import hashlib
import json
import re
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from tqdm import tqdm

PACKAGE, VERSION = "@iconify/json", "2.2.535"
PICTURE_SIZE = 128  # pixels
TEST_ROWS = 2000
# Licences under which nothing may be made of an icon, or not by everybody.
FORBIDDING = re.compile(r"\bN[CD]\b")
# Words of a name that tell a drawing's size or style and not what it shows.
STYLE_WORDS = {"flat", "fill", "filled", "duo", "color", "colored", "1x1", "4x3", "icon", "logo", "wordmark"}
# The same of monochrome sets, most of which draw all of their icons several times.
WEIGHT_WORDS = {"bold", "regular", "thin", "line", "linear", "outline", "outlined", "solid", "stroke"}
WEIGHT_WORDS |= {"sharp", "round", "rounded", "broken", "remix", "duotone", "tone", "two", "twotone", "alt", "24px"}
PREFIX_WORDS = ("file type ", "folder type ")
# One drawing in several colours: skin tones of emoji, light and dark variants of logos.
TONE = re.compile(r"-((medium-)?(light|dark)|medium)(-skin-tone)?$|-skin-tone(-|$)|-tone-?[1-6]$")


class Icon(NamedTuple):
    """One picture of the corpus."""

    path: str  # of the picture, from the table's folder
    caption: str
    svg: str


def write_table(table, coloured=True, drawn=None):
    """Writes the table and, beside it in icons/, those pictures of its first `drawn` rows (default: all) that are missing.
    Downloads the package if it is not there."""
    folder = table.parent
    folder.mkdir(parents=True, exist_ok=True)
    icons = read_icons(download(folder), coloured)
    rows = rows_of(icons)
    of_path = {icon.path: icon for icon in icons}
    draw([of_path[row["image"]] for row in rows[:drawn]], folder)
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "caption", "split"])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{table}: {len(rows)} icons, {len({row['caption'] for row in rows})} captions")


def download(folder):
    """The path of the npm package in `folder`, downloaded if it is not there."""
    path = folder / f"iconify-json-{VERSION}.tgz"
    if not path.exists():
        command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


# ----------------------------------------------------------------------------------------------------------- icons


def read_icons(package, coloured):
    """The coloured icons, or the monochrome ones, whose licence allows it, in the order of sets and names, each drawing
    once; of a monochrome set one for each caption."""
    icons = []
    drawn = set()
    with tarfile.open(package) as archive:
        collections = json.load(archive.extractfile("package/collections.json"))
        for prefix, about in sorted(collections.items()):
            if bool(about.get("palette")) != coloured or FORBIDDING.search(about["license"].get("title", "")):
                continue
            icon_set = json.load(archive.extractfile(f"package/json/{prefix}.json"))
            for name, icon in sorted(icon_set["icons"].items()):
                caption = caption_of(name, STYLE_WORDS if coloured else STYLE_WORDS | WEIGHT_WORDS)
                key = (icon["body"] if coloured else prefix, caption)
                base = TONE.split(name)[0]
                if (
                    caption is None
                    or icon.get("hidden")
                    or key in drawn
                    or (base != name and base in icon_set["icons"])
                ):
                    continue
                drawn.add(key)
                icons.append(Icon(f"icons/{prefix}/{name}.png", caption, svg_of(icon, icon_set)))
    return icons


def caption_of(name, style_words):
    """An icon's name in words, without those of its size or style; None where nothing is left to search for."""
    words = name.replace("_", "-").split("-")
    caption = " ".join(words)
    for prefix in PREFIX_WORDS:
        caption = caption.removeprefix(prefix)
    words = caption.split()
    while len(words) > 1 and (words[-1] in style_words or words[-1].isdigit()):
        words.pop()
    caption = " ".join(words)
    return caption if len(caption) > 2 and re.search("[a-z]{2}", caption) else None


def svg_of(icon, icon_set):
    """The icon as an SVG file. Sizes that an icon does not name are its set's, else 16 (Iconify's format)."""

    def size(key, otherwise):
        return icon.get(key, icon_set.get(key, otherwise))

    view = f"{size('left', 0)} {size('top', 0)} {size('width', 16)} {size('height', 16)}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view}">{icon["body"]}</svg>'


def draw(icons, folder):
    """Draws the icons that are not there yet, on white, inside a square."""
    missing = []
    for icon in icons:
        if not (folder / icon.path).exists():
            missing.append((folder / icon.path, icon.svg))
    for path in {path.parent for path, _ in missing}:
        path.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(tqdm(pool.map(draw_one, missing, chunksize=64), total=len(missing), desc="draw", unit="icon"))


def draw_one(job):
    """Draws one icon. job: (path of the PNG, SVG)."""
    import resvg_py  # needed for this alone

    path, svg = job
    data = resvg_py.svg_to_bytes(svg_string=svg, width=PICTURE_SIZE, height=PICTURE_SIZE, background="white")
    partial = path.with_suffix(".partial")
    partial.write_bytes(bytes(data))
    partial.replace(path)


# ------------------------------------------------------------------------------------------------------------ rows


def rows_of(icons):
    """[{image, caption, split}]: the test rows, then all others, captions in the order of their digests."""
    by_caption = {}
    for icon in icons:
        by_caption.setdefault(icon.caption, []).append(icon.path)
    captions = sorted(by_caption, key=digest)
    rows = []
    for caption in captions:
        if len(rows) < TEST_ROWS:
            split = "test"
        else:
            split = "val" if digest(f"split {caption}") % 10 == 0 else "train"
        for path in by_caption[caption]:
            rows.append({"image": path, "caption": caption, "split": split})
    return rows


def digest(text):
    """A number that looks random and is the same on every machine."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)
