"""The report's gallery: captions drawn at random, whether the chosen pair finds their pictures, and what it retrieves.

Its rows and small copies of its pictures are saved with the report (`make_gallery`), and the page's table is made from
these alone (`gallery_queries`). A picture is read only if it lies in the folder that the embedding folder's manifest names,
or in that of --pictures: the rows of a stranger's folder cannot bring other files of yours into a report.
"""

import base64
import hashlib
import io
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import vlm
from hyma.embeddings import unique
from hyma.packed import containing_file, picture_bytes
from hyma.pair_names import pair_name
from hyma.task_inputs import image_inputs, text_inputs

FOUND, MISSED = "found", "missed"
QUERIES = 3  # captions of each
NEAREST = 5  # pictures for each, among which its own is found or missed
PIXELS = 112  # longer edge of a thumbnail


class Gallery(NamedTuple):
    """What is saved of a gallery; of tasks without captions and pictures, nothing."""

    rows: list = []  # of gallery.csv: a caption, a pair, a picture and its place, from 1
    thumbnails: dict = {}  # file name in the report's folder -> JPEG bytes
    facts: dict | None = None  # what else the page shows
    warnings: list = []  # lines
    note: str = ""  # whose pictures are shown, where they do not lie beside the embedding folder


def make_gallery(result, tasks, pictures=None) -> Gallery:
    """The Gallery of the first retrieval task, by the chosen pair and by the truly worst.

    tasks: the Tasks. pictures: the folder that they lie in, None for that of the embedding folder's manifest.
    """
    task = find_gallery_task(tasks)
    if task is None:
        return Gallery()
    run = result.primary.runs[0]
    rows = [task.data.rows[i] for i in task.rows.tolist()]
    first_row = {}  # picture -> place in rows of the first that has it
    for place, row in enumerate(rows):
        first_row.setdefault(row["image"], place)
    roles = gallery_roles(result)
    ranks = {pair: caption_ranks(task, run, pair) for pair in roles}  # each [rows]
    of_chosen = ranks[result.pairs[result.chosen]]
    queries = draw_queries(rows, of_chosen)
    retrieved = {}  # pair -> [queries, nearest] indices of pictures
    for pair in roles:
        retrieved[pair] = nearest_pictures(task, run, pair, list(first_row.values()), queries)

    table = []
    names = list(first_row)
    for query, place in enumerate(queries):
        caption = rows[place]["caption"]
        right = {row["image"] for row in rows if row["caption"] == caption}
        for pair in roles:
            columns = {"caption": caption, "own": rows[place]["image"], "pair": pair_name(pair)}
            columns["rank"] = 1 + ranks[pair][place]
            for nth, k in enumerate(retrieved[pair][query], 1):
                table.append(columns | {"place": nth, "picture": names[k], "right": names[k] in right})

    shown = unique([row["picture"] for row in table] + [row["own"] for row in table])
    root = task.data.root
    digests = {row["image"]: row.get("image_sha256") for row in rows}
    files, thumbnails, outside = make_thumbnails(shown, digests, root, Path(pictures or root))
    facts = {
        "task": task.name,
        "pictures": len(first_row),
        "found": round(found_share(rows, of_chosen), 6),
        "nearest": NEAREST,
        "run": str(run.folder),
        "pairs": [{"pair": pair_name(pair), "role": role} for pair, role in roles.items()],
        "thumbnails": files,
        "missing": len(shown) - outside - len(files),
        "root": str(pictures or root),
    }
    warnings = []
    if outside:
        warnings.append(
            f"{outside} pictures of the gallery are left out: {task.data.folder}/rows.jsonl names them outside of "
            f"{pictures or root}; to show them, name the folder that holds them: --pictures FOLDER"
        )
    note = ""
    if files and not pictures and not lies_in(task.data.folder.absolute().parent, root.absolute()):
        manifest = task.data.folder / "manifest.json"
        note = f"pictures in the gallery: {len(files)} of {os.path.realpath(root)}, which {manifest} names"
    return Gallery(table, thumbnails, facts, warnings, note)


def find_gallery_task(tasks):
    """The first retrieval task whose folder says where its pictures are, None if there is none."""
    for task in tasks:
        if task.kind == "retrieval" and task.data.manifest and task.data.rows:
            return task
    return None


def gallery_roles(result):
    """{pair: its role}: the chosen pair and, if it is another, the truly worst."""
    worst = int(result.true_scores(result.headline).argmin())
    roles = {result.pairs[result.chosen]: "the pair to stitch"}
    roles.setdefault(result.pairs[worst], "the worst")
    return roles


@torch.no_grad()
def caption_ranks(task, run, pair):
    """[rows] how many pictures a run's connector puts before the first right one, of the caption of each row."""
    image, text = pair
    vectors = F.normalize(image_inputs(task, image).float(), dim=1)  # [rows, D_i]
    captions = F.normalize(text_inputs(task, text).float(), dim=1)  # [rows, D_t]
    mapped = vlm.map_text(vlm.load_connector(run.connector(image, text)), captions)  # [rows, D_i]
    caption_of_row = task.retrieval.place["caption"]
    device = caption_of_row.device
    of_captions, _ = task.retrieval.ranks(mapped.to(device), vectors.to(device))  # [different captions]
    return of_captions[caption_of_row].tolist()


def draw_queries(rows, ranks):
    """Places of captions in the rows, drawn at random: first some whose picture is found, then some whose is missed.

    A caption that several rows have is drawn once. Where one kind has too few, the other has more.
    """
    found, missed, drawn = [], [], set()
    for place in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist():
        caption = rows[place]["caption"]
        if caption not in drawn:
            drawn.add(caption)
            (found if ranks[place] < NEAREST else missed).append(place)
    more_found = max(0, QUERIES - len(missed))
    more_missed = max(0, QUERIES - len(found))
    return found[: QUERIES + more_found] + missed[: QUERIES + more_missed]


def found_share(rows, ranks):
    """The share of the different captions whose picture is among the nearest."""
    rank_of_caption = {row["caption"]: rank for row, rank in zip(rows, ranks)}
    return sum(rank < NEAREST for rank in rank_of_caption.values()) / len(rank_of_caption)


@torch.no_grad()
def nearest_pictures(task, run, pair, places, queries):
    """The pictures nearest to each caption by a run's connector: [queries, NEAREST] indices into `places`.

    places: of the pictures in the task's rows. queries: places of the captions in the task's rows.
    """
    image, text = pair
    vectors = F.normalize(image_inputs(task, image)[places].float(), dim=1)  # [pictures, D_i]
    captions = F.normalize(text_inputs(task, text)[queries].float(), dim=1)  # [queries, D_t]
    mapped = vlm.map_text(vlm.load_connector(run.connector(image, text)), captions)  # [queries, D_i]
    return (mapped @ vectors.T).topk(min(NEAREST, len(places)), dim=1).indices.tolist()


def make_thumbnails(shown, digests, root, allowed):
    """({picture: its thumbnail's file}, {that file: JPEG bytes}, how many pictures lie outside of the folder `allowed`).

    shown: pictures as the rows name them. digests: of theirs, as far as they are known. root: the folder of the manifest.
    Pictures that are missing, unreadable or others by now have no thumbnail.
    """
    files, thumbnails = {}, {}
    outside = 0
    for picture in shown:
        path = find_picture(picture, root, allowed)
        if path is None:
            outside += 1
            continue
        jpeg = small_jpeg(path, digests[picture])
        if jpeg:
            files[picture] = f"thumbnails/{len(files)}.jpg"
            thumbnails[files[picture]] = jpeg
    return files, thumbnails, outside


def find_picture(picture, root, allowed):
    """Where a picture is, by its path in a row; None if it lies outside of the folder `allowed`.

    root: the folder of the manifest. The path starts from there, or from `allowed` if the pictures have moved.
    """
    inside = []
    for base in (allowed, root):
        path = base / picture
        file = containing_file(path)
        if os.path.isfile(file) and lies_in(allowed, file):
            return path
        if lies_in(allowed, file):
            inside.append(path)
    return inside[0] if inside else None


def lies_in(folder, path):
    """Whether a path ends below a folder, whatever `..` and links there are on the way."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # a NUL in a name
        return False


def embedded_bytes(path, digest):
    """The bytes of a picture, None if it is missing or, by its digest, another than was embedded. digest: None if unknown."""
    try:
        vlm.check_regular(containing_file(path))
        data = picture_bytes(path)
    except Exception:  # remote files and archives raise errors of many types
        return None
    return data if digest in (None, hashlib.sha256(data).hexdigest()) else None


def small_jpeg(path, digest):
    """A thumbnail's bytes, or None for a picture that is missing, unreadable or, by its digest, another."""
    data = embedded_bytes(path, digest)
    if data is None:
        return None
    try:
        picture = vlm.open_image(io.BytesIO(data))
        picture.thumbnail((PIXELS, PIXELS))
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=80)
    except Exception:  # Pillow raises errors of many types; none of them stops a report
        return None
    return jpeg.getvalue()


# ------------------------------------------------------------------------------------------------------------ on the page


class Tile(NamedTuple):
    """A picture on the page."""

    name: str
    jpeg: str | None  # base64, None for a picture that is not shown
    right: bool  # whether the caption is its own


class Retrieved(NamedTuple):
    """What a pair retrieves for a caption."""

    tiles: list  # of Tile, nearest first
    rank: int  # the place of the caption's own picture, from 1


class Query(NamedTuple):
    """A caption on the page."""

    caption: str
    own: Tile  # a picture of it
    outcome: str  # FOUND or MISSED, by the chosen pair
    of_pairs: list  # of Retrieved


def gallery_queries(records):
    """The page's [Query]; None of a report without a gallery."""
    facts = records.page["gallery"]
    if facts is None:
        return None
    jpegs = {}
    for picture, file in facts["thumbnails"].items():
        jpegs[picture] = base64.b64encode(records.read(file)).decode()
    queries = []
    texts = ("caption", "own", "pair", "picture", "right")
    for row in records.read_table("gallery.csv", texts, ("place", "rank")):
        if row["place"] == 1 and row["pair"] == facts["pairs"][0]["pair"]:  # a new caption
            own = Tile(row["own"], jpegs.get(row["own"]), True)
            outcome = FOUND if row["rank"] <= facts["nearest"] else MISSED
            queries.append(Query(row["caption"], own, outcome, []))
        if row["place"] == 1:
            queries[-1].of_pairs.append(Retrieved([], int(row["rank"])))
        tile = Tile(row["picture"], jpegs.get(row["picture"]), row["right"] == "True")
        queries[-1].of_pairs[-1].tiles.append(tile)
    return queries
