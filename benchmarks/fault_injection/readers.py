"""The readers of untrusted input, each with a generator of what it reads: files, folders, tables, flags, pictures."""

import argparse
import contextlib
import io
import json
import random
import runpy
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch

import vlm
from fault_injection.inputs import make_embeddings
from fault_injection.odd_values import mutate_bytes, mutate_value, odd_flag, odd_text, odd_value
from fault_injection.processes import ROOT
from hyma.embeddings import Embeddings, hash_keys
from hyma.files import read_jsonl, sha256_file, write_json, write_jsonl
from hyma.pair_names import choose_pairs
from hyma.splits import split_rows
from vlm import load_tensors, read_json

CONNECTOR = "i1_mlp0_t1"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", "TGA")
MODES = ("RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16")


class Readers:
    """Each method `read_...` is one kind of input: it writes one random input into its folder, and reads it.

    A reader gives a value, or raises BadInput with one line. What else it raises is a fault.
    """

    def __init__(self, folder, inputs):
        """folder: to write into. inputs: the planted ones, with runs."""
        self.folder = Path(folder)
        self.inputs = Path(inputs)
        self.embed = runpy.run_path(str(ROOT / "embed.py"), run_name="embed")
        self.evaluate = runpy.run_path(str(ROOT / "evaluate.py"), run_name="evaluate")
        self.data = Embeddings(self.inputs / "embeddings")
        self.manifest = read_json(self.inputs / "embeddings" / "manifest.json")
        self.rows = read_jsonl(self.inputs / "embeddings" / "rows.jsonl")[::20]
        self.run = self.inputs / "runs" / "hyma"
        self.connector = (self.run / "connectors" / f"{CONNECTOR}.pt").read_bytes()
        self.pictures = make_picture_files()
        self.model = torch.nn.Linear(2, 2)
        self.small = make_embeddings(self.folder / "small", self.rows)
        write_json(self.small / "manifest.json", self.small_manifest())
        self.input = b""  # the last one, for the record
        self.kinds = [name for name in dir(self) if name.startswith("read_")]

    def write(self, name, data):
        """The input as a file."""
        self.input = data if isinstance(data, bytes) else data.encode(errors="surrogateescape")
        path = self.folder / name
        path.write_bytes(self.input)
        return path

    def keep(self, text):
        """The input as text, which no file holds."""
        self.input = text.encode(errors="surrogatepass")
        return text

    # ------------------------------------------------------------------------------------------------- JSON and tensors

    def read_one_json(self, draw):
        data = as_json(mutate_value(self.manifest, draw))
        if draw.random() < 0.5:
            data = mutate_bytes(data, draw)
        read_json(self.write("x.json", data))

    def read_rows(self, draw):
        data = json_lines([mutate_value(row, draw) for row in self.rows[:3]])
        read_jsonl(self.write("x.jsonl", mutate_bytes(data, draw) if draw.random() < 0.5 else data))

    def read_journal(self, draw):
        """What an interrupted pass has found of pictures."""
        from hyma.pass_shards import read_journal

        lines = as_json("digest") + b"\n" + b"null\n" * 3
        data = mutate_bytes(lines, draw) if draw.random() < 0.7 else lines + as_json(odd_value(draw)) + b"\n"
        read_journal(self.write("000000000.jsonl", data))

    def read_tensors(self, draw):
        path = self.write("x.pt", self.mutated_archive(draw))
        value = load_tensors(path, mmap=draw.random() < 0.5)
        if torch.is_tensor(value) and value.numel() < 10**6:
            value.float().sum()

    def mutated_archive(self, draw):
        """A torch file with other bytes, or with sound checksums around other contents."""
        if draw.random() < 0.4:
            return mutate_bytes(self.connector, draw)
        mutated = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.connector)) as old, zipfile.ZipFile(mutated, "w") as new:
            for member in old.namelist():
                data = old.read(member)
                if member.endswith("data.pkl") or draw.random() < 0.1:
                    data = mutate_bytes(data, draw)
                new.writestr(member, data)
        return mutated.getvalue()

    # ------------------------------------------------------------------------------------------ connectors and encoders

    def read_mutated_connector(self, draw):
        vlm.load_connector(self.write(f"{CONNECTOR}.pt", self.mutated_archive(draw)))

    def read_odd_connector(self, draw):
        """Tensors of other shapes, types and names under the name of a connector."""
        values = odd_tensors()
        keys = ["weight", "bias", "0.weight", "0.bias", "2.weight", "2.bias", 0, "", "x"]
        state = {draw.choice(keys): draw.choice(values) for _ in range(draw.randrange(5))}
        if draw.random() < 0.5:
            state = {"weight": draw.choice(values), "bias": draw.choice(values)}
        data = saved(draw.choice([state, state, state, draw.choice(values)]))
        name = draw.choice(["a_mlp0_b.pt", "a_mlp1_b.pt", "vit_l16_mlp0_mpnet.pt", "_mlp0_.pt", "a.pt"])
        vlm.load_connector(self.write(name, data))

    def read_connector_card(self, draw):
        path = self.folder / f"{CONNECTOR}.pt"
        card = read_json(self.run / "connectors" / f"{CONNECTOR}.json")
        data = as_json(mutate_value(card, draw))
        self.write(f"{CONNECTOR}.json", mutate_bytes(data, draw) if draw.random() < 0.3 else data)
        vlm.encoder_of_connector(path, "image", "i1")
        vlm.check_trained_on(path, "i1", SimpleNamespace(model=self.model, config={"precision": "float32"}))

    def read_encoder_name(self, draw):
        encoder = vlm.find_encoder(self.keep(odd_text(draw)))
        path = self.folder / f"{encoder.name}.pt"
        if path.parent != self.folder or "/" in encoder.name or not vlm.is_encoder_name(encoder.name):
            raise AssertionError(f"the name {encoder.name!r} leads out of its folder")

    # --------------------------------------------------------------------------------------- embedding folders and runs

    def read_embedding_file(self, draw):
        """A folder of plain .pt files, one of them mutated or of an odd tensor."""
        folder = self.folder / "bare"
        folder.mkdir(exist_ok=True)
        shutil.copy(self.inputs / "embeddings" / "i1.pt", folder / "vit_s16.pt")
        tensors = [
            torch.zeros(260),
            torch.zeros(260, 384),
            torch.zeros(0, 384),
            torch.ones(260, 384, dtype=torch.int8),
            torch.ones(1, 1).expand(260, 384),
            torch.zeros(260, 384).to_sparse(),
            torch.zeros(260, 384, device="meta"),
        ]
        odd = saved(draw.choice(tensors))
        self.write("bare/minilm.pt", odd if draw.random() < 0.5 else self.mutated_archive(draw))
        Embeddings(folder).load("minilm")

    def read_manifest(self, draw):
        """A sealed folder with another manifest."""
        value = self.small_manifest()
        for _ in range(draw.choice((1, 1, 2))):
            value = mutate_value(value, draw)
        self.write("small/manifest.json", as_json(value))
        self.use(Embeddings(self.small))

    def read_sealed_rows(self, draw):
        """A folder that a stranger has sealed over odd rows: every digest is right."""
        rows = list(self.rows)
        for _ in range(draw.choice((1, 1, 3))):
            place = draw.randrange(len(rows))
            changed = mutate_value(rows[place], draw)
            rows[place] = changed if isinstance(changed, dict) else {"caption": changed}
        self.input = as_json(rows)
        path = self.small / "rows.jsonl"
        path.write_bytes(json_lines(rows))
        keys = hash_keys(read_jsonl(path))
        manifest = self.small_manifest() | {"keys_sha256": keys}
        for record in manifest["encoders"].values():
            record["keys_sha256"] = keys
        write_json(self.small / "manifest.json", manifest)
        try:
            self.use(Embeddings(self.small))
        finally:
            write_jsonl(path, self.rows)

    def small_manifest(self):
        """The right manifest of the small folder."""
        own = {"rows": len(self.rows), "keys_sha256": hash_keys(self.rows)}
        encoders = {}
        for name, record in self.manifest["encoders"].items():
            encoders[name] = record | own | {"file_sha256": sha256_file(self.small / f"{name}.pt")}
        return self.manifest | own | {"encoders": encoders}

    def use(self, data):
        """What trainers and evaluate.py do with a folder."""
        from hyma.metrics import Retrieval
        from hyma.tasks import open_tasks

        choose_pairs(data, ["all"])
        train, validation = split_rows(data, 0)
        Retrieval(data, validation, torch.device("cpu"))
        data.load(data.names("image")[0])
        open_tasks(None, data.folder, argparse.Namespace(templates="1", device=torch.device("cpu")))

    def read_run_folder(self, draw):
        """A run folder with one file changed."""
        from hyma.runs import read_run

        folder = self.folder / "run"
        if not folder.exists():
            shutil.copytree(self.run, folder)
        name = draw.choice(["config.json", "ledger.json", "ranking.csv"])
        original = (self.run / name).read_bytes()
        if name == "ranking.csv" or draw.random() < 0.3:
            data = mutate_bytes(original, draw)
        else:
            data = as_json(mutate_value(json.loads(original), draw))
        try:
            self.write(f"run/{name}", data)
            read_run(folder)
        finally:
            shutil.copy(self.run / name, folder / name)

    # ---------------------------------------------------------------------------------------------- tables and pictures

    def read_table(self, draw):
        """A table of captions: its columns, captions, labels, splits, choices."""
        from hyma.datasets import read_corpus

        suffix = draw.choice((".csv", ".tsv", ".jsonl", ".json", ".parquet"))
        names = ["image", "file_name", "caption", "captions", "label", "split", "question", "answer", "choices"]
        columns = draw.sample(names, 4)
        columns += ["conversations"] * (draw.random() < 0.2) + [odd_text(draw)] * (draw.random() < 0.2)
        rows = [{name: odd_value(draw, 2) for name in columns} for _ in range(draw.randrange(5))]
        for row in rows:
            row["image"] = draw.choice(["0.png", "./0.png", odd_text(draw)])
        if suffix in (".csv", ".tsv"):
            text = delimited_text(["image", *columns], rows, "," if suffix == ".csv" else "\t")
            data = text.encode(errors="surrogateescape" if draw.random() < 0.5 else "replace")
        elif suffix == ".jsonl":
            data = json_lines(rows)
        else:
            data = as_json(mutate_value(rows, draw) if draw.random() < 0.5 else rows)
        path = self.write(f"table{suffix}", mutate_bytes(data, draw) if draw.random() < 0.3 else data)
        self.scan(read_corpus(path))

    def scan(self, corpus):
        """What embed.py does with the rows of a corpus before it embeds."""
        from hyma.pictures import read_picture
        from hyma.scan import row_fault, sort_rows

        json.dumps(corpus.rows, default=str)
        images = {row["image"] for row in corpus.rows if not row_fault(row)}
        pictures = {image: read_picture(corpus.root, image)[0] for image in images}
        usable, quarantine, _ = sort_rows(corpus, pictures)
        write_jsonl(self.folder / "q.jsonl", quarantine)
        write_jsonl(self.folder / "u.jsonl", usable)
        hash_keys(usable)

    def read_picture(self, draw):
        """A mutated picture of any format. The pass catches whatever Pillow raises, so only time and memory count."""
        path = self.write("picture", mutate_bytes(draw.choice(self.pictures), draw))
        with contextlib.suppress(Exception):
            vlm.open_image(path)

    def read_templates(self, draw):
        from hyma.prompts import read_templates

        lines = [draw.choice(["a photo of {}", odd_flag(draw)]) for _ in range(3)]
        path = self.write("templates.txt", "\n".join(lines).encode(errors="surrogatepass"))
        read_templates(draw.choice([str(path), odd_flag(draw) or "1"]))

    # ------------------------------------------------------------------------------------------------------------ flags

    def read_pairs(self, draw):
        text = self.keep(odd_flag(draw))
        choose_pairs(self.data, [draw.choice([text, f"i1:{text}", f"{text}:t1"])])

    def read_shard_flag(self, draw):
        text = self.keep(odd_flag(draw))
        flags = argparse.Namespace(
            data=Path("x"),
            batch_size=1,
            shard_rows=1,
            rows=None,
            templates=[],
            workers=1,
            encoder=["control"],
            weights=[],
            shard=text,
            device="cpu",
            allow_bad=0.05,
        )
        self.embed["resolve_flags"](flags)

    def read_named_flags(self, draw):
        text = self.keep(odd_flag(draw))
        if draw.random() < 0.5:
            self.embed["match_weights"]([text, f"vit_l16={text}"], [vlm.ENCODERS["vit_l16"]])
        else:
            self.evaluate["named_paths"]("--task", [text], "FOLDER")

    def read_device(self, draw):
        vlm.pick_device(self.keep(odd_flag(draw) or "cpu"))

    def read_data_flag(self, draw):
        from hyma.datasets import read_corpus
        from hyma.standard_sets import parse_standard_set

        text = self.keep(odd_flag(draw))
        parse_standard_set(Path(text))
        if "\0" not in text and len(text) > 1 and not Path(text).is_absolute():
            read_corpus(self.folder / "none" / text)


def as_json(value):
    return json.dumps(value).encode()


def json_lines(values):
    return b"".join(as_json(value) + b"\n" for value in values)


def delimited_text(columns, rows, comma):
    """A table without quotation marks. A row has its image last, whatever the header promises."""
    lines = [comma.join(columns)]
    for row in rows:
        lines.append(comma.join(map(str, row.values())))
    return "\n".join(lines)


def saved(value):
    """The bytes of a torch file."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def odd_tensors():
    """What a connector's file could hold instead of its weights."""
    return [
        torch.zeros(2),
        torch.zeros(3, 2),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(0),
        torch.tensor(1.0),
        torch.zeros(3, 2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(1).expand(10**12),
        None,
        1,
        "x",
        torch.full((3, 2), float("nan")),
        torch.zeros(3, 2, dtype=torch.complex64),
        [torch.zeros(2)],
    ]


def make_picture_files():
    """One picture in every format and mode that Pillow can write."""
    from PIL import Image

    picture = Image.frombytes("RGB", (40, 32), random.Random(1).randbytes(3 * 40 * 32))
    files = []
    for mode in MODES:
        for kind in FORMATS:
            file = io.BytesIO()
            with contextlib.suppress(Exception):
                source = picture.convert("L") if mode == "I;16" else picture  # no other mode becomes I;16
                source.convert(mode).save(file, kind)
                files.append(file.getvalue())
    return files
