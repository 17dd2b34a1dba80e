"""Planted inputs: pictures with captions, a tiny text encoder, embeddings."""

import random
from pathlib import Path

import torch

from hyma.embeddings import hash_keys
from hyma.files import sha256_file, write_json, write_jsonl

IMAGE_WIDTHS = {"i1": 24, "i2": 20}
TEXT_WIDTHS = {"t1": 16, "t2": 12}
PICTURES = 24


def make_inputs(folder):
    """Everything that the stages read."""
    torch.set_num_threads(1)
    folder = Path(folder)
    make_pictures(folder / "pictures")
    make_text_encoder(folder / "words")
    make_embeddings(folder / "embeddings", planted_rows())


def make_pictures(folder):
    from PIL import Image

    folder.mkdir(parents=True)
    draw = random.Random(0)
    lines = ["image,caption,label,split"]
    for k in range(PICTURES):
        size = (48 + k, 64)
        Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(folder / f"{k}.png")
        split = "train" if k % 3 else "val"
        lines.append(f"{k}.png,a red square number {k},{'ab'[k % 2]},{split}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")


def make_text_encoder(folder):
    """A one-layer BERT of 40 words as a sentence-transformers folder."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square", "number", *map(str, range(30))]
    bert = folder.with_name("bert")
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(bert)
    word_model = models.Transformer(str(bert))
    SentenceTransformer(modules=[word_model, models.Pooling(16)], device="cpu").save(str(folder))


def planted_rows():
    """260 rows with splits; labels would ask for a text encoder."""
    splits = ["test"] * 60 + ["val"] * 40 + ["train"] * 160
    rows = []
    for k, split in enumerate(splits):
        rows.append({"key": f"{k}.png", "image": f"{k}.png", "caption": f"caption {k}", "split": split})
    return rows


def make_embeddings(folder, rows):
    """A sealed folder of these rows, whose vectors come from eight latent numbers a row and from noise."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(len(rows), 8, generator=draw)
    keys = hash_keys(rows)
    encoders = {}
    for place, (name, dim) in enumerate((IMAGE_WIDTHS | TEXT_WIDTHS).items()):
        vectors = latent @ torch.randn(8, dim, generator=draw) + place * torch.randn(len(rows), dim, generator=draw)
        path = folder / f"{name}.pt"
        torch.save(torch.nn.functional.normalize(vectors, dim=1).half(), path)
        is_image = name in IMAGE_WIDTHS
        encoders[name] = {
            "kind": "image" if is_image else "text",
            "spec": "random:test_vit" if is_image else "nobody/words",
            "dim": dim,
            "rows": len(rows),
            "keys_sha256": keys,
            "file_sha256": sha256_file(path),
        }
    manifest = {"format_version": 1, "dataset": "planted", "root": ".", "rows": len(rows), "keys_sha256": keys}
    write_jsonl(folder / "rows.jsonl", rows)
    write_json(folder / "manifest.json", manifest | {"quarantined": 0, "encoders": encoders})
    return folder
