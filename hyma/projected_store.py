"""Image vectors as coordinates along a hypernetwork's axes, for its losses and validation."""

import torch

from hyma.embeddings import ROWS_AT_ONCE
from hyma.machine import bytes_for_copies


class ProjectedStore:
    """A RowStore whose image vectors are coordinates [rows, k] along axes: made once, of the rows that a run uses, where they
    fit beside the embeddings, else of each batch. A batch has the same bits in both cases.

    Where the axes are those of the image encoder's space itself, its vectors are taken as they are.
    """

    def __init__(self, store, axes, rows, dtype):
        """axes: {image encoder: [D, k] orthonormal}. rows: indices of the rows that are used. dtype: of the training steps,
        and so of the coordinates that are kept."""
        self.store, self.device, self.dtype = store, store.device, dtype
        self.axes = {}
        self.dims = dict(store.dims)
        size = 0
        for image, columns in axes.items():
            self.dims[image] = columns.shape[1]
            if not is_identity(columns):
                self.axes[image] = columns
                size += dtype.itemsize * columns.shape[1] * len(store.tensors[image])
        self.coordinates = {}
        if store.is_resident and size < bytes_for_copies(store.device):
            for image in self.axes:
                self.coordinates[image] = self.project_all(image, rows)

    def project_all(self, image, rows):
        """The coordinates [all rows, k] of an image encoder; those of other rows than `rows` are zero."""
        count = len(self.store.tensors[image])
        coordinates = torch.zeros(count, self.dims[image], dtype=self.dtype, device=self.device)
        for part in rows.split(ROWS_AT_ONCE):
            coordinates[part.to(self.device)] = self.project(image, part, self.dtype)
        return coordinates

    def project(self, image, rows, dtype):
        """The coordinates [len(rows), k] of an image encoder. In 16 bits the product takes a fifth of the time."""
        return self.store.take(image, rows, dtype) @ self.axes[image].to(dtype)

    def take(self, name, rows, dtype=torch.float32):
        """[len(rows), k or D_t], on the device: unit vectors of texts, and coordinates of at most unit length of images."""
        if name not in self.axes:
            return self.store.take(name, rows, dtype)
        if name in self.coordinates and dtype == self.dtype:
            return self.coordinates[name].index_select(0, rows.to(self.device))  # half the time of [rows] on a CPU
        return self.project(name, rows, dtype)

    def projection_flops(self, row_count, images):
        """Of taking so many rows of image encoders: of a product for each whose coordinates are not kept."""
        made = [self.axes[image] for image in images if image in self.axes and image not in self.coordinates]  # [D, k] each
        return sum(2 * row_count * axes.numel() for axes in made)


def is_identity(columns):
    """Whether axes [D, k] are those of the space itself."""
    return columns.shape[0] == columns.shape[1] and torch.equal(columns, torch.eye(len(columns)).to(columns))
