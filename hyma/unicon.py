"""UniCon's closed form (arXiv 2604.16678): the leading directions in which pictures and captions agree, weighed equally.

The gradient of InfoNCE with temperature 1 with respect to the similarities is -S. At similarities that do not change, the
best linear maps into a shared space are the leading singular vectors of Y^T S X; S is then computed anew with them.
"""

import torch
import torch.nn.functional as F

from hyma.seeds import seeded_generator

RANK = 128  # of the shared space
OWN_WEIGHT = 2.0  # nu, of a row's own pair
ITERATIONS = 2
BLOCK = 2048  # rows of S that are there at a time


def unicon_map(texts, images):
    """The map [D_i, D_t] from texts x [n, D_t] to pictures y [n, D_i], both centred, which its authors' code does not do:
    centring gains 1.6 points R@10 (NOTES.md).

    With P and Q the softmax over each row and over each column of the similarities, nu = OWN_WEIGHT,

        S = (nu I - (P + Q) / 2) / n,   Y^T S X ~ U D V^T,   map = U V^T of the RANK leading directions

    Similarities are cosines of U^T y and V^T x. They start from random U and V. A connector is followed by cosines with
    whole pictures instead of U^T y, which costs nothing (NOTES.md).
    """
    rank = min(RANK, texts.shape[1], images.shape[1])
    generator = seeded_generator("unicon", 0)
    left = torch.randn(images.shape[1], rank, generator=generator).to(images)  # U [D_i, r]
    right = torch.randn(texts.shape[1], rank, generator=generator).to(texts)  # V [D_t, r]
    for _ in range(ITERATIONS):
        agreement = weighted_agreement(texts, images, texts @ right, images @ left)
        left, _, right = torch.linalg.svd(agreement, full_matrices=False)
        left, right = left[:, :rank], right[:rank].T
    return left @ right.T


def weighted_agreement(texts, images, shared_texts, shared_images):
    """Y^T S X [D_i, D_t], S [n, n] a block of rows at a time. shared_texts, shared_images [n, r]: in the shared space."""
    count = len(texts)
    shared_texts, shared_images = F.normalize(shared_texts, dim=1), F.normalize(shared_images, dim=1)
    of_columns = torch.zeros(count).to(texts)  # the denominator of Q; cosines are at most 1, so exp cannot overflow
    for block in shared_images.split(BLOCK):
        of_columns += (block @ shared_texts.T).exp().sum(0)
    agreement = OWN_WEIGHT * images.T @ texts
    for block, block_images in zip(shared_images.split(BLOCK), images.split(BLOCK)):
        scores = (block @ shared_texts.T).exp()  # [block, n]
        both = scores / scores.sum(1, keepdim=True) + scores / of_columns  # P + Q
        agreement -= block_images.T @ (both @ texts) / 2
    return agreement / count
