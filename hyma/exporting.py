"""An embedding folder in the formats of other programs: `embed.py --export npy|parquet|safetensors`.

    npy            img_emb/<encoder>/img_emb_0.npy, text_emb/<encoder>/text_emb_0.npy and metadata/metadata_0.parquet: what
                   clip-retrieval writes, and embedding-reader, autofaiss and faiss read
    parquet        <encoder>/<encoder>_0.parquet: each row with its vector, in the column `embedding`, for embedding-reader
    safetensors    <encoder>.safetensors: one tensor, `embeddings`
"""

import numpy as np
import torch

from hyma.embeddings import Embeddings
from hyma.files import atomic_file, make_folder, write_jsonl
from hyma.packed import import_arrow
from vlm import BadInput

ROWS_AT_ONCE = 16384
ROW_PARTS = ("key", "image", "caption", "label", "split")


def export_folder(folder, out, form, names):
    """Writes the encoders of an embedding folder, all of them if `names` is empty. Prints what it has written."""
    data = Embeddings(folder)
    for name in names:
        if name not in data.encoders:
            raise BadInput(f"--encoder {name}: {folder} has {', '.join(data.encoders)}")
    if out.is_dir() and (out / "manifest.json").exists():
        raise BadInput(f"--out {out}: is an embedding folder; choose a folder of its own for what is exported")
    make_folder(out)
    for name in names or data.encoders:
        vectors = data.load(name)
        path = WRITERS[form](out, name, data, vectors)
        print(f"{path}: {vectors.shape[0]:,} x {vectors.shape[1]}")
    if form == "npy" and data.rows:
        print(f"{write_metadata(out, data)}: what the rows are")


def write_npy(out, name, data, vectors):
    """One array, as numpy saves it, written a block at a time."""
    kind = {"image": "img_emb", "text": "text_emb"}[data.encoders[name].kind]
    path = make_folder(out / kind / name) / f"{kind}_0.npy"
    if vectors.dtype == torch.bfloat16:  # numpy has no such numbers
        vectors = vectors.float()
    header = {"descr": vectors[:1].numpy().dtype.str, "fortran_order": False, "shape": tuple(vectors.shape)}
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(vectors), ROWS_AT_ONCE):
            file.write(vectors[start : start + ROWS_AT_ONCE].contiguous().numpy().tobytes())
    return path


def write_metadata(out, data):
    """The rows as a parquet table, or, without pyarrow, as JSON lines."""
    folder = make_folder(out / "metadata")
    records = [row_record(row) for row in data.rows]
    try:
        arrow = import_arrow(folder)
    except BadInput:
        write_jsonl(folder / "metadata_0.jsonl", records)
        return folder / "metadata_0.jsonl"
    with atomic_file(folder / "metadata_0.parquet") as file:
        arrow.parquet.write_table(arrow.Table.from_pylist(records, schema=row_schema(arrow)), file)
    return folder / "metadata_0.parquet"


def row_record(row):
    """A row with the names of clip-retrieval's metadata."""
    record = {part: row.get(part) for part in ROW_PARTS}
    return {"image_path": record.pop("image"), **record}


def row_schema(arrow):
    """Texts, which may be missing: a column that is empty throughout has a type too."""
    names = ["image_path", *(part for part in ROW_PARTS if part != "image")]
    return arrow.schema([(name, arrow.string()) for name in names])


def write_parquet(out, name, data, vectors):
    """A table of the rows with their vectors, float32, a row group for each block."""
    path = out / name / f"{name}_0.parquet"
    arrow = import_arrow(path)
    make_folder(path.parent)
    schema = row_schema(arrow) if data.rows else arrow.schema([])
    schema = schema.append(arrow.field("embedding", arrow.list_(arrow.float32())))
    dim = vectors.shape[1]
    with atomic_file(path) as file, arrow.parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(vectors), ROWS_AT_ONCE):
            block = vectors[start : start + ROWS_AT_ONCE].float().numpy()
            offsets = arrow.array(np.arange(0, block.size + 1, dim, dtype=np.int32))
            columns = [arrow.ListArray.from_arrays(offsets, arrow.array(block.reshape(-1)))]
            if data.rows:
                records = [row_record(row) for row in data.rows[start : start + len(block)]]
                columns = [*arrow.Table.from_pylist(records, schema=row_schema(arrow)).columns, *columns]
            writer.write_table(arrow.Table.from_arrays(columns, schema=schema))
    return path


def write_safetensors(out, name, data, vectors):
    from safetensors.torch import save

    path = out / f"{name}.safetensors"
    with atomic_file(path) as file:
        file.write(save({"embeddings": vectors.contiguous().clone()}))
    return path


WRITERS = {"npy": write_npy, "parquet": write_parquet, "safetensors": write_safetensors}
