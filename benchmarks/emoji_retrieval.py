"""The benchmark's test set: R@10 of the emoji in small galleries, caption to picture and picture to caption."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hyma.embeddings import Embeddings, RowStore
from hyma.metrics import number_names
from kernels import true_rank
from vlm import load_connector, map_text

CPU = torch.device("cpu")
GALLERIES = 4  # of a vendor's emoji, about 1,900: each is searched by itself


class EmojiRetrieval:
    """The test set: which emoji are among the ten nearest to their caption, and their caption to them.

    The emoji of each vendor are dealt into GALLERIES galleries of about 475. A query is searched for in its own gallery
    only, and a tie counts against the match.
    """

    def __init__(self, folders):
        """folders: embedding folders, whose rows of split `test` are the emoji; an image path begins with its vendor."""
        self.folders = list(map(Embeddings, folders))
        self.rows = []  # of each folder, the numbers of its emoji
        captions, vendors = [], []  # of all emoji
        for folder in self.folders:
            numbers = []
            for number, row in enumerate(folder.rows):
                if row["split"] == "test":
                    numbers.append(number)
                    captions.append(row["caption"])
                    vendors.append(row["image"].split("/")[0])
            self.rows.append(torch.tensor(numbers))
        # A caption of several emoji goes through a connector once.
        self.caption_of, self.first = number_names(captions)  # [n], [captions]
        self.galleries = deal_galleries(vendors)
        self.features = {}  # encoder -> what `take` has read

    def take(self, encoder):
        """Unit vectors of the emoji, or of their captions, [n, D]."""
        if encoder not in self.features:
            parts = []
            for folder, rows in zip(self.folders, self.rows):
                parts.append(RowStore(folder, [encoder], CPU).take(encoder, rows))
            self.features[encoder] = torch.cat(parts)
        return self.features[encoder]

    def hits(self, run, image, text):
        """[n]: for each emoji the mean over both directions, 0, 0.5 or 1, by the run's connector of a pair."""
        images = self.take(image)
        texts = self.take(text)
        connector = load_connector(run.connector(image, text), images.shape[1], texts.shape[1])
        mapped = map_text(connector, texts[self.first])[self.caption_of]  # [n, D_i]
        return hits_in_ten(mapped, images, self.galleries)


def deal_galleries(vendors):
    """Numbers of the emoji in each gallery. vendors [n]: of every emoji."""
    vendor_of, first = number_names(vendors)
    galleries = []
    for vendor in range(len(first)):
        emoji = (vendor_of == vendor).nonzero()[:, 0]
        galleries += [emoji[k::GALLERIES] for k in range(GALLERIES)]
    return galleries


def hits_in_ten(texts, images, galleries):
    """[n]: mean over both directions of whether a row's match is among the ten nearest in its gallery.

    texts, images: unit vectors [n, D]. galleries: lists of row numbers.
    """
    hits = torch.zeros(len(texts), dtype=torch.float64)
    for rows in galleries:
        match = torch.arange(len(rows))
        for queries, targets in ((texts, images), (images, texts)):
            hits[rows] += (true_rank(queries[rows], targets[rows], match) < 10).double() / 2
    return hits.numpy()
