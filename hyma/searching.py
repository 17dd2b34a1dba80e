"""Search with the stitched pairs of a run: pictures by words, captions by a picture, classes.

The run's own embedding folder is the index, so no picture is encoded again. An encoder is loaded when a query needs it:
words need the text encoder, a picture the image encoder.
"""

import difflib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F

import vlm
from hyma.embeddings import check_trained_on
from hyma.gallery import find_picture
from hyma.merging import as_folders, open_embeddings
from hyma.pair_names import pair_name
from hyma.prompts import TEMPLATES
from hyma.search_index import VectorIndex
from hyma.splits import LEFT_OUT
from hyma.weights import open_encoders
from vlm import BadInput, reason_of


class Hit(NamedTuple):
    """What was found: a picture or a caption of the corpus, or a class."""

    score: float  # cosine
    text: str  # caption or class
    picture: str | None = None  # as the folder's rows name it
    sha256: str | None = None  # of the picture's bytes when it was embedded


class Search:
    """The pairs of a run on an embedding folder: the run's own, or another by the same encoders.

    weights: {encoder: file or folder}, instead of the hub. pictures: the folder that pictures may be shown from, None for
    that of the embedding folder's manifest.
    """

    def __init__(self, run, data=None, weights=None, pictures=None, device=None):
        self.run = run
        self.weights = weights or {}
        self.device = vlm.pick_device(device)
        self.data = open_data(run, data)
        rows = self.data.rows or [{"image": f"row {i}", "caption": f"row {i}"} for i in range(self.data.row_count)]
        self.rows = rows
        self.picture_rows = first_rows(rows, "image")
        self.caption_rows = first_rows(rows, "caption")
        self.root, self.allowed = self.data.root, Path(pictures or self.data.root)
        if pictures and not self.allowed.is_dir():
            raise BadInput(f"--pictures {pictures}: no such folder")
        self.cache = {}

    # ------------------------------------------------------------------------------------------------- pairs

    def choose_pair(self, name=None):
        """(image, text) of "IMAGE:TEXT", by default the run's first. Raises BadInput for a pair that it has not."""
        pairs = {pair_name(pair): pair for pair in self.run.ranks}
        if name is None:
            first = [pair for pair, rank in self.run.ranks.items() if rank == 1]
            if len(first) > 1 and not self.run.ledger:
                raise BadInput(f"{self.run.folder}: ranks no pair; name one with --pair: {', '.join(pairs)}")
            return first[0]
        if name not in pairs:
            guesses = difflib.get_close_matches(name, pairs, n=1, cutoff=0.5)
            hint = f" Did you mean {guesses[0]}?" if guesses else ""
            raise BadInput(f"--pair {name}: {self.run.folder} has no such pair.{hint} It has {', '.join(pairs)}")
        return pairs[name]

    def once(self, make, *key):
        """make(*key), which is made once: encoders and indexes are kept."""
        if (make, *key) not in self.cache:
            self.cache[make, *key] = make(*key)
        return self.cache[make, *key]

    def connector(self, pair):
        """The connector of a pair. Raises BadInput if it was trained on other weights or settings than the folder's."""
        path = self.run.connector(*pair)
        for name in pair:
            if name not in self.data.encoders:
                raise BadInput(f"{self.data.folder}: has no {name}, which {path} is for; name another folder: --data")
            check_trained_on(path, name, self.data)
        image, text = [self.data.encoders[name] for name in pair]
        return vlm.load_connector(path, image.dim, text.dim)

    # ----------------------------------------------------------------------------------------------- vectors

    def open_encoders(self, names):
        """Loads encoders that are not there yet; all whose weights are missing are named at once."""
        new = [name for name in names if name not in self.cache]
        self.cache.update(open_encoders(self.data, new, self.weights, self.device))

    def encode_texts(self, pair, texts):
        """Unit vectors [texts, D_i] in the space of the pair's pictures."""
        connector = self.once(self.connector, pair)
        self.open_encoders(pair[1:])
        return vlm.map_text(connector, self.cache[pair[1]].encode_text(texts).cpu())

    def encode_picture(self, pair, path):
        """The unit vector [1, D_i] of a picture's file."""
        picture = open_picture(path)  # before the encoder: it takes seconds
        self.open_encoders(pair[:1])
        encoder = self.cache[pair[0]]
        return encoder.encode_image(encoder.transform(picture)[None]).cpu()

    def pictures(self, image):
        """The VectorIndex of the different pictures."""
        vectors = self.data.load(image)
        every_row = len(self.picture_rows) == len(self.rows)
        return VectorIndex(vectors if every_row else vectors[self.picture_rows])

    def captions(self, pair):
        """The VectorIndex of the different captions, in the space of the pair's pictures."""
        vectors = self.data.load(pair[1])[self.caption_rows].float()
        return VectorIndex(vlm.map_text(self.once(self.connector, pair), F.normalize(vectors, dim=1)))

    # --------------------------------------------------------------------------------------------- questions

    def find_pictures(self, pair, text, top):
        """[Hit]: the pictures nearest to a text."""
        index = self.once(self.pictures, pair[0])
        return self.hits(index, self.encode_texts(pair, [text]), self.picture_rows, top)

    def find_captions(self, pair, path, top):
        """[Hit]: the captions nearest to a picture's file."""
        vector = self.encode_picture(pair, path)
        return self.hits(self.once(self.captions, pair), vector, self.caption_rows, top)

    def classify(self, pair, path, classes):
        """[Hit]: the classes, the nearest to a picture's file first."""
        open_picture(path)
        self.open_encoders(pair)
        scores = (self.encode_picture(pair, path) @ self.encode_classes(pair, classes).T)[0]
        order = scores.argsort(descending=True).tolist()
        return [Hit(scores[k].item(), classes[k]) for k in order]

    def classify_corpus(self, pair, classes, top):
        """{class: (how many pictures it is the nearest class of, [Hit] of the nearest of these)}."""
        index = self.once(self.pictures, pair[0])
        scores = index.scores(self.encode_classes(pair, classes))  # [pictures, classes]
        best, nearest = scores.max(1)
        counts = Counter(nearest.tolist())
        found = {}
        for k, name in enumerate(classes):
            own = (nearest == k).nonzero()[:, 0]
            order = own[best[own].argsort(descending=True)[:top]]
            found[name] = (counts[k], [self.hit(best[i].item(), self.picture_rows[i]) for i in order.tolist()])
        return found

    def encode_classes(self, pair, classes):
        """Unit vectors [classes, D_i] of the prompt that names a class."""
        (template,) = TEMPLATES["1"]
        return self.encode_texts(pair, [template.replace("{}", name) for name in classes])

    def hits(self, index, vector, rows, top):
        """[Hit] of the nearest to one vector [1, D_i]. rows: the row of each place of the index."""
        scores, places = index.nearest(vector, top)
        found = []
        for score, place in zip(scores[0].tolist(), places[0].tolist()):
            found.append(self.hit(score, rows[place]))
        return found

    def hit(self, score, row):
        """The Hit of a row's picture and caption."""
        found = self.rows[row]
        return Hit(score, found["caption"], found["image"], found.get("image_sha256"))

    # ----------------------------------------------------------------------------------------------- pictures

    def find_picture(self, name):
        """Where a picture of the corpus is; None if it lies outside of the folder that pictures may be shown from."""
        return find_picture(name, self.root, self.allowed)


def open_data(run, folder):
    """The embedding folder to search. Raises BadInput, one line, if it has moved."""
    folder = folder or run.data
    if folder is None:
        raise BadInput(f"{run.folder}: holds connectors alone; name the embedding folder to search: --data FOLDER")
    for each in as_folders(folder):
        if not each.is_dir():
            raise BadInput(f"{each}: no such folder from here; name the run's embedding folder: --data FOLDER")
    return open_embeddings(folder)


def first_rows(rows, part):
    """The first row of each different picture or caption, without rows that cannot be used."""
    first = {}
    for number, row in enumerate(rows):
        if row.get("split") != LEFT_OUT:
            first.setdefault(row[part], number)
    return list(first.values())


def open_picture(path):
    """A picture that the user gives. Raises BadInput, one line, if it cannot be opened."""
    try:
        vlm.check_regular(path)
        return vlm.open_image(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such picture") from None
    except BadInput:
        raise
    except Exception as error:  # Pillow raises errors of many types
        raise BadInput(f"{path}: cannot be opened as a picture: {reason_of(error)}") from None


def read_classes(words):
    """The classes of --classes: the words, or the lines of a file if it is one. No class twice."""
    if len(words) == 1 and Path(words[0]).is_file():
        try:
            words = Path(words[0]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--classes {words[0]}: cannot be read as text: {error}") from None
    classes = list(dict.fromkeys(filter(None, map(str.strip, words))))
    if len(classes) < 2:
        found = f"{classes[0]} is one, and no file" if len(words) == 1 and classes else f"there are {len(classes)}"
        raise BadInput(
            f"--classes: at least two different classes are needed, as words or as the lines of a file; {found}"
        )
    return classes
