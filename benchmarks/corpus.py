"""The benchmark's pictures and captions: openclipart to train on and to choose by, emoji of four vendors to report on.

    apt-get install --no-install-recommends openclipart-png openclipart-svg

`write_corpus` makes captions.csv: openclipart's rows (`train`, `val`) and the first vendor's emoji (`test`).
`write_other_vendors` makes a table of the other vendors' emoji, which are embedded into a folder of their own. The emoji
come from npm's packages emoji-datasource-<vendor>.
"""

import csv
import json
import subprocess
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sample"))

import build  # the sample's builder: openclipart's captions and splits

from hyma.files import write_csv

OPENCLIPART = Path("/usr/share/openclipart")  # where the Debian packages install it
VENDORS = ("google", "apple", "twitter", "facebook")
EMOJI_VERSION = "16.0.0"
PICTURE_SIZE = 64  # pixels, of the emoji


def write_corpus(path):
    """Writes the table `path` and, beside it, the pictures: all of openclipart, and the first vendor's emoji."""
    openclipart = build.openclipart_rows(OPENCLIPART / "png", OPENCLIPART / "svg")
    folder = path.parent / "openclipart"
    build.write_sample(build.split(openclipart), folder, size=128, quality=80)
    rows = []
    with open(folder / "captions.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            # The emoji are the test rows here, so the sample's test rows can be trained on.
            split = "val" if row["split"] == "val" else "train"
            rows.append({"image": f"openclipart/{row['image']}", "caption": row["caption"], "split": split})
    write_csv(path, rows + emoji_rows(path.parent, VENDORS[0]))


def write_other_vendors(path):
    """Writes the table `path` and, beside it, the pictures of every vendor but the first."""
    rows = []
    for vendor in VENDORS[1:]:
        rows += emoji_rows(path.parent, vendor)
    write_csv(path, rows)


def emoji_rows(folder, vendor):
    """Downloads a vendor's pictures into `folder` and returns their rows: [{image, caption, split}].

    An emoji that this vendor has not drawn is left out.
    """
    archive_path = download_emoji(folder, vendor)
    pictures = folder / f"emoji-{vendor}"
    pictures.mkdir(exist_ok=True)
    rows = []
    with tarfile.open(archive_path) as archive:
        members = {member.name: member for member in archive}
        for emoji in json.load(archive.extractfile("package/emoji.json")):
            member = members.get(f"package/img/{vendor}/{PICTURE_SIZE}/{emoji['image']}")
            if member is None:
                continue
            (pictures / emoji["image"]).write_bytes(archive.extractfile(member).read())
            rows.append(
                {"image": f"{pictures.name}/{emoji['image']}", "caption": emoji_caption(emoji), "split": "test"}
            )
    return rows


def download_emoji(folder, vendor):
    """The path of the vendor's npm package in `folder`, downloaded if it is not there."""
    package = f"emoji-datasource-{vendor}"
    path = folder / f"{package}-{EMOJI_VERSION}.tgz"
    if not path.exists():
        command = ["npm", "pack", f"{package}@{EMOJI_VERSION}", "--silent", "--pack-destination", folder]
        subprocess.run(command, check=True)
    return path


def emoji_caption(emoji):
    """The emoji's name, and those of its short names that the name does not contain."""
    name = (emoji["name"] or emoji["short_name"]).lower()
    names = [name]
    for short_name in emoji["short_names"]:
        plain = short_name.replace("_", " ").replace("-", " ")
        if plain not in name and plain not in names:
            names.append(plain)
    return ", ".join(names)
