"""Known faults of tables, captions, labels, splits and pictures. Each function gives a problem or None."""

import contextlib
import json
import re
import resource
import shutil
import struct
import zlib

import vlm
from fault_injection.inputs import PICTURES
from fault_injection.stages import SHORT
from hyma.files import read_jsonl
from hyma.pictures import read_picture
from vlm import BadInput


def refused(done, *words):
    """A problem, unless the command ended in one line with these words."""
    if done.code is None:
        return "hangs"
    if done.code == 0:
        return f"expected a refusal; it ended well: {done.out.strip().splitlines()[-1:]}"
    if "Traceback" in done.err:
        return f"traceback: {done.last[:200]}"
    if not re.match(r"\w+\.py: ", done.last):
        return f"exit status {done.code}, no line: {done.last[:200]}"
    missing = [word for word in words if word not in done.last]
    return f"the line lacks {missing}: {done.last[:200]}" if missing else None


def embed_table(bench, folder, text, name="captions.csv", pictures=PICTURES, texts=()):
    """Runs embed.py over a table beside the planted pictures. Returns (Done, rows or None, quarantine or None)."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for k in range(pictures):
        shutil.copy(bench.inputs / "pictures" / f"{k}.png", data)
    (data / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    done = bench.runner.run(embed_command(data / name, texts), folder)
    rows = folder / "e" / "rows.jsonl"
    if not rows.exists():
        return done, None, None
    return done, read_jsonl(rows), read_jsonl(folder / "e" / "quarantine.jsonl")


def embed_command(table, texts=()):
    return ["embed.py", "--encoder", "tiny=random:test_vit", *texts, "--data", table, "--out", "e", "--device", "cpu"]


def table_of(lines, header="image,caption"):
    return "\n".join([header, *lines]) + "\n"


def plain_lines():
    """A caption for each planted picture."""
    return [f"{k}.png,a red square {k}" for k in range(PICTURES)]


def json_table(value_of):
    """JSON lines: of each planted picture its number k, as value_of(k) describes it."""
    lines = []
    for k in range(PICTURES):
        lines.append(json.dumps({"image": f"{k}.png"} | value_of(k)))
    return "\n".join(lines)


def none_lost(rows, quarantine):
    """A problem unless every row is used or quarantined."""
    whole = len(rows) + len(quarantine) == PICTURES
    return None if whole else f"{PICTURES} rows became {len(rows)}, and the quarantine has {len(quarantine)}"


# -------------------------------------------------------------------------------------------------- tables and captions


def stray_quote(bench, folder):
    lines = plain_lines()
    lines[3] = '3.png,"a red square 3'
    done, rows, quarantine = embed_table(bench, folder, table_of(lines))
    if done.code != 0:
        return refused(done)
    accounted = len(rows) + len(quarantine)
    return None if accounted >= PICTURES else f"{PICTURES} rows became {len(rows)}, {len(quarantine)} quarantined"


def lists_of_captions(bench, folder):
    text = json_table(lambda k: {"caption": [f"a red {k}", f"a square {k}"]})
    done, rows, _ = embed_table(bench, folder, text, "captions.jsonl")
    if done.code != 0:
        return f"a list of captions is refused: {done.last[:160]}"
    return None if len(rows) == 2 * PICTURES else f"{PICTURES} pictures of two captions became {len(rows)} rows"


def odd_captions(bench, folder):
    """Empty, blank, 50,000 characters, no UTF-8, NUL, right to left: neighbours stay where they are."""
    hebrew = "\u05e9\u05dc\u05d5\u05dd".encode()
    odd = [b"", b"  ", b"x" * 50_000, b"caf\xe9", b"a\x00b", hebrew, b"http://x/y.jpg", b"0.png"]
    lines = [b"image,caption"]
    for k in range(PICTURES):
        is_odd = k % 2 and k < 2 * len(odd)
        lines.append(f"{k}.png,".encode() + (odd[k // 2] if is_odd else f"plain {k}".encode()))
    done, rows, quarantine = embed_table(bench, folder, b"\n".join(lines) + b"\n")
    if done.code != 0:
        return refused(done)
    for row in rows:
        plain, _, number = row["caption"].partition(" ")
        if plain == "plain" and f"{number}.png" != row["image"]:
            return f"a caption is beside another picture: {row}"
    return none_lost(rows, quarantine)


def repeated_captions(bench, folder):
    done, *_ = embed_table(bench, folder, table_of(f"{k}.png,red {k // 2}" for k in range(PICTURES)))
    return None if "12 captions repeat" in done.out else "repeated captions are not counted"


def no_rows(bench, folder):
    for name, text in (("header", "image,caption\n"), ("empty", ""), ("missing", table_of(["none.png,a"]))):
        (folder / name).mkdir()
        done, *_ = embed_table(bench, folder / name, text)
        if problem := refused(done):
            return f"{name}: {problem}"
    return None


# ---------------------------------------------------------------------------------------------------- labels and splits


def late_split(bench, folder):
    """JSON lines whose first record has no split."""
    text = json_table(lambda k: {"caption": f"a {k}"} | ({"split": "test"} if k else {}))
    done, rows, _ = embed_table(bench, folder, text, "captions.jsonl")
    if done.code != 0:
        return refused(done)
    splits = [row.get("split") for row in rows]
    return None if splits.count("test") == PICTURES - 1 else "the split of the later rows is lost"


def unknown_split(bench, folder):
    lines = []
    for k, line in enumerate(plain_lines()):
        lines.append(f"{line},{('train', 'restval', 'Validate')[k % 3]}")
    words = [f"words={bench.inputs / 'words'}"]
    done, rows, _ = embed_table(bench, folder, table_of(lines, "image,caption,split"), texts=words)
    if done.code != 0:
        return refused(done, "split")
    done = bench.runner.run(["train_hyma.py", "--data", "e", *SHORT, "--batch-size", 4, "--out", "r"], folder)
    if "16 training and 8 validation" in done.out:
        return None
    return f"{PICTURES} rows: {done.out.splitlines()[:1]} {done.last[:160]}"


def labels_of_several_types(bench, folder):
    """The number 1 in each spelling is the class of that number, and NaN is none."""
    labels = [1, 1.0, float("nan"), "1"]
    text = json_table(lambda k: {"caption": f"a {k}", "label": labels[k % 4]})
    (folder / "data").mkdir()
    (folder / "data" / "classes.txt").write_text("cat\ndog\n")
    done, rows, _ = embed_table(bench, folder, text, "captions.jsonl")
    if done.code != 0:
        return refused(done)
    found = {row.get("label") for row in rows}
    return None if found == {"dog", None} else f"classes: {sorted(map(str, found))}"


def odd_labels(bench, folder):
    """A label and a split with a byte that is not UTF-8: the row is read or quarantined."""
    odd = {3: b"caf\xe9,train", 4: b"a,tr\xe9n"}
    lines = [b"image,caption,label,split"]
    for k in range(PICTURES):
        lines.append(f"{k}.png,a {k},".encode() + odd.get(k, b"a,train"))
    done, rows, quarantine = embed_table(bench, folder, b"\n".join(lines) + b"\n")
    return refused(done) if done.code != 0 else none_lost(rows, quarantine)


# ------------------------------------------------------------------------------------------------------------- pictures


def spellings_of_a_picture(bench, folder):
    names = ["0.png", "./0.png", "../data/0.png"] + [f"{k}.png" for k in range(1, PICTURES)]
    lines = [f"{name},red {k}" for k, name in enumerate(names)]
    done, rows, _ = embed_table(bench, folder, table_of(lines))
    if done.code != 0:
        return refused(done)
    different = len({row["image"] for row in rows})
    return None if different == PICTURES else f"{PICTURES} pictures count as {different}"


def many_missing(bench, folder):
    done, *_ = embed_table(bench, folder, table_of(plain_lines()), pictures=16)
    return refused(done)


def repaired_pictures(bench, folder):
    embed_table(bench, folder, table_of(plain_lines()), pictures=16)  # so many are missing that it stops
    for k in range(16, PICTURES):
        shutil.copy(bench.inputs / "pictures" / f"{k}.png", folder / "data")
    bench.runner.run(embed_command(folder / "data" / "captions.csv"), folder)
    count = len(read_jsonl(folder / "e" / "rows.jsonl"))
    return None if count == PICTURES else f"a repaired picture is not read again: {count} rows of {PICTURES}"


def open_file_limit(bench, folder):
    """Pictures that cannot be opened because the process may open no more files are no bad pictures."""
    shutil.copy(bench.inputs / "pictures" / "0.png", folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        picture, _ = read_picture(folder, "0.png")
    except BadInput:
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return f"counts as a bad picture: {picture.reason}"


def bombs(bench, folder):
    """Headers of 100 and of 182 megapixels are refused before anything is decoded, and thin pictures are."""
    for width, height in ((10_000, 10_000), (14_000, 13_000), (1, 60_000)):
        path = folder / "bomb.png"
        path.write_bytes(png_without_pixels(width, height))
        try:
            vlm.open_image(path)
            return f"{width} x {height} is opened"
        except MemoryError:
            return f"{width} x {height} fills the memory"
        except Exception as error:
            if "truncated" in str(error):
                return f"{width} x {height} is decoded"
    return None


def png_without_pixels(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def other_formats(bench, folder):
    from PIL import Image

    for kind in ("ICO", "JPEG2000", "PPM", "TGA", "PCX", "SGI"):
        path = folder / f"picture.{kind.lower()}"
        Image.new("RGB", (16, 16)).save(path, kind)
        with contextlib.suppress(Exception):
            vlm.open_image(path)
            return f"{kind} is opened"
    return None
