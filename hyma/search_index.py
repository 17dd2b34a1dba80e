"""Vectors to search: by a matrix product in parts, or by faiss if it is installed, there are many, and more than one question.

Both are exact. An index of faiss takes twice as long to build as one product, and then answers in a fiftieth of it.
"""

import torch
import torch.nn.functional as F

FAISS_FROM = 200_000  # vectors; a product with fewer takes no time that anybody notices
AT_ONCE = 65_536  # vectors that are compared at a time, to bound the memory


class VectorIndex:
    """Unit vectors [N, D], as an embedding folder stores them, to find the nearest ones of."""

    def __init__(self, vectors):
        self.vectors = vectors
        self.questions = 0
        self.faiss_index = None

    def nearest(self, queries, count):
        """(cosines [Q, k], places [Q, k]) of the nearest vectors to unit vectors [Q, D], nearest first; k = count, or N."""
        count = min(count, len(self.vectors))
        self.questions += 1
        if self.questions == 2 and len(self.vectors) >= FAISS_FROM:
            self.faiss_index = make_faiss_index(self.vectors)
        if self.faiss_index is not None:
            scores, places = self.faiss_index.search(queries.cpu().numpy(), count)
            return torch.from_numpy(scores), torch.from_numpy(places)
        scores, places = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        for start in range(0, len(self.vectors), AT_ONCE):
            part = F.normalize(self.vectors[start : start + AT_ONCE].float(), dim=1)  # [n, D]
            scores = torch.cat([scores, queries.cpu() @ part.T], dim=1)
            places = torch.cat([places, torch.arange(start, start + len(part)).expand(len(queries), -1)], dim=1)
            scores, order = scores.topk(min(count, scores.shape[1]), dim=1)
            places = places.gather(1, order)
        return scores, places

    def scores(self, queries):
        """The cosines of all vectors with unit vectors [Q, D]: [N, Q]."""
        parts = []
        for part in self.vectors.split(AT_ONCE):
            parts.append(F.normalize(part.float(), dim=1) @ queries.cpu().T)
        return torch.cat(parts)


def make_faiss_index(vectors):
    """An index of faiss over the vectors, in float16 as they are stored; None where faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    index = faiss.IndexScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for part in vectors.split(AT_ONCE):
        index.add(F.normalize(part.float(), dim=1).numpy())
    return index
