"""Whether the rows of two encoders belong together, by their vectors alone, without the encoders.

Pictures that are alike to one encoder are mostly alike to another, and so are their captions. So similarities between rows
correlate where the rows are the same, and less where one side is shifted: a single row that was lost midway shifts all that
follow. Stretches of the rows are compared one by one, at many shifts; the neighbours of a row are often of its kind, so
that it is the peak at one shift that counts and not the correlation.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

STRETCHES = 10
ROWS_OF_STRETCH = 300  # at most
LEAST_ROWS = 40  # that say anything
SHIFTS = 30  # rows up and down
LEAST_PEAK = 6  # in standard deviations of the other shifts


class Stretch(NamedTuple):
    """How a stretch of rows fits."""

    start: int  # its first row
    shift: int | None  # of the other encoder's rows at which both fit: 0 if they are the same; None if they fit at none
    correlation: float  # of the similarities of the rows as they are


def compare_rows(one, other):
    """The Stretches of two Vectors of equal row counts: none if there are too few rows."""
    stretches = []
    count = max(1, min(STRETCHES, one.rows // ROWS_OF_STRETCH))
    for number in range(count):
        start = number * one.rows // count
        end = min((number + 1) * one.rows // count, start + ROWS_OF_STRETCH)
        if end - start >= LEAST_ROWS:
            stretches.append(compare_stretch(start, one.block(start, end), other.block(start, end)))
    return stretches


def compare_stretch(start, one, other) -> Stretch:
    """one [n, dim], other [n, another dim]: the same rows of two encoders, from row `start` on."""
    own, others = similarities(one), similarities(other)  # [n, n]
    most = min(SHIFTS, len(one) // 3)
    shifts = torch.arange(-most, most + 1)
    correlations = []
    for shift in shifts.tolist():
        correlations.append((own * others.roll((-shift, -shift), (0, 1))).sum())
    correlations = torch.stack(correlations)  # [shifts]
    around = F.avg_pool1d(correlations.view(1, -1), 5, 1, 2, count_include_pad=False).view(-1)
    peaks = correlations - around  # neighbours of a row are often of its kind, which is no peak
    best = int(peaks.argmax())
    rest = peaks[(torch.arange(len(peaks)) - best).abs() > 2]
    is_peak = peaks[best] > LEAST_PEAK * rest.std()
    return Stretch(start, int(shifts[best]) if is_peak else None, float(correlations[most]))


def similarities(vectors):
    """The cosines between rows, [n, n], of mean 0 and norm 1 off the diagonal and 0 on it."""
    cosines = F.normalize(vectors - vectors.mean(dim=0), dim=1)  # [n, dim]
    cosines = cosines @ cosines.T
    count = len(cosines)
    off_diagonal = 1 - torch.eye(count)
    mean = (cosines * off_diagonal).sum() / (count * (count - 1))
    cosines = (cosines - mean) * off_diagonal
    return cosines / max(cosines.norm().item(), math.ulp(1.0))
