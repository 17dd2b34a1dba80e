"""The readers of data sources: tables, folders of pictures, and which standard set a flag names."""

import json

import pytest
from conftest import write_csv

from hyma.datasets import read_corpus
from hyma.distractors import draw_distractors
from hyma.standard_sets import Question, multiple_choice, parse_standard_set
from vlm import BadInput


def as_table(folder, rows):
    write_csv(folder / "captions.csv", rows)
    return folder


def as_tsv(folder, rows):
    renamed = [{"file_name": row["image"], "title": row["caption"]} for row in rows]
    return write_csv(folder / "list.tsv", renamed, "\t")


def as_jsonl(folder, rows):
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "x.jsonl"


def as_parquet(folder, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")
    return folder / "x.parquet"


def llava(folder, name, records):
    (folder / "images").mkdir()
    for path in folder.glob("*.webp"):
        path.rename(folder / "images" / path.name)
    (folder / name).write_text(json.dumps(records))
    return folder


def as_llava_metadata(folder, rows):
    return llava(folder, "metadata.json", [{"id": r["image"], "url": "u", **r, "blip_caption": "b"} for r in rows])


def as_llava_chat(folder, rows):
    return llava(
        folder,
        "chat.json",
        [
            {
                "id": "1",
                "image": r["image"],
                "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": r["caption"]}],
            }
            for r in rows
        ],
    )


def as_llava_pretrain(folder, rows):
    folder = as_llava_chat(folder, rows)
    (folder / "chat.json").rename(folder / "blip_laion_cc_sbu_558k.json")
    return folder / "blip_laion_cc_sbu_558k.json"


def as_text_files(folder, rows):
    for row in rows:
        (folder / row["image"]).with_suffix(".txt").write_text(row["caption"])
    return folder


@pytest.mark.parametrize(
    "write",
    [as_table, as_tsv, as_jsonl, as_parquet, as_llava_metadata, as_llava_chat, as_llava_pretrain, as_text_files],
)
def test_every_kind_of_corpus(pictures, write):
    folder, rows = pictures
    corpus = read_corpus(write(folder, rows))
    found = [(row["image"], row["caption"]) for row in corpus.rows]
    assert sorted(found) == sorted((row["image"], row["caption"]) for row in rows)
    assert corpus.root == (folder / "images" if (folder / "images").exists() else folder)
    assert corpus.dataset == {as_tsv: "list", as_jsonl: "x", as_parquet: "x"}.get(write, "pictures")


def test_image_folder(pictures):
    folder, _ = pictures
    for k, path in enumerate(sorted(folder.glob("*.webp"))):
        place = folder / ("tabby_cat", "dog")[k % 2]
        place.mkdir(exist_ok=True)
        path.rename(place / path.name)
    rows = read_corpus(folder).rows
    assert len(rows) == 40 and "split" not in rows[0]
    assert {(row["label"], row["caption"]) for row in rows} == {("tabby_cat", "tabby cat"), ("dog", "dog")}


def test_image_folder_with_splits(pictures):
    folder, _ = pictures
    for k, path in enumerate(sorted(folder.glob("*.webp"))):
        place = folder / ("train", "val")[k % 2] / ("tabby_cat", "dog")[k % 3 % 2]
        place.mkdir(parents=True, exist_ok=True)
        path.rename(place / path.name)
    rows = read_corpus(folder).rows
    assert {(row["label"], row["caption"]) for row in rows} == {("tabby_cat", "tabby cat"), ("dog", "dog")}
    assert {row["split"] for row in rows} == {"train", "val"} and len(rows) == 40


def test_columns(tmp_path):
    """The first known name counts, unless a flag names another; label and split are read where they exist."""
    record = {"text": "a", "alt": "b", "img": "i.png", "filepath": "f.png", "class": "c", "split": "val", "id": "7"}
    table = write_csv(tmp_path / "t.csv", [record])
    assert read_corpus(table).rows == [{"image": "f.png", "caption": "a", "label": "c", "split": "val"}]
    named = read_corpus(table, image_column="img", caption_column="alt")
    assert [(row["image"], row["caption"]) for row in named.rows] == [("i.png", "b")]
    with pytest.raises(BadInput, match="--caption-column nope: .*has the columns text, alt"):
        read_corpus(table, caption_column="nope")


def test_a_table_that_is_found_in_a_folder(tmp_path):
    for name in ("other.csv", "another.tsv"):
        write_csv(tmp_path / name, [{"image": "a.png", "caption": "from another table"}])
    with pytest.raises(BadInput, match="several tables .another.tsv, other.csv."):
        read_corpus(tmp_path)
    write_csv(tmp_path / "metadata.csv", [{"image": "a.png", "caption": "from metadata"}])
    assert read_corpus(tmp_path).rows[0]["caption"] == "from metadata"
    write_csv(tmp_path / "captions.csv", [{"image": "a.png", "caption": "from captions"}])
    corpus = read_corpus(tmp_path)
    assert corpus.rows[0]["caption"] == "from captions" and corpus.dataset == tmp_path.name


def test_rows_with_a_fault(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text(
        'image,question,answer,choices\na.png,what?,x,"[""x"", ""y""]"\nb.png,what?,x,x|y\nc.png,a,b,"[]",d\n'
    )
    good, bad, long = read_corpus(table).rows
    assert good["caption"] == "what? x" and good["choices"] == ["x", "y"] and "fault" not in good
    assert bad["fault"] == "choices are not a JSON list" and long["fault"].startswith("more fields than columns")


def test_a_conversation_without_an_answer(tmp_path):
    turns = [None, [], [{"from": "human", "value": "?"}], [{"from": "gpt", "value": "a dog"}]]
    (tmp_path / "chat.json").write_text(json.dumps([{"image": "a.png", "conversations": turn} for turn in turns]))
    assert [row["caption"] for row in read_corpus(tmp_path).rows] == [None, None, None, "a dog"]


def test_a_flag_that_names_a_standard_set(tmp_path):
    assert parse_standard_set(f"coco:{tmp_path}") == ("coco", tmp_path)
    assert parse_standard_set("coco") is None and parse_standard_set("other:folder") is None
    with pytest.raises(BadInput, match="--data coco:none: no such folder"):
        parse_standard_set("coco:none")


def test_choices_do_not_depend_on_anything_else():
    """Drawn by the question's number alone, from answers that nobody gave to this question."""
    assert draw_distractors(7, ["a", "b", "c", "d"], {"a"}, 2) == draw_distractors(7, ["a", "b", "c", "d"], {"a"}, 2)
    assert sorted(draw_distractors(7, ["a", "b", "c"], {"a"}, 5)) == ["b", "c"]
    questions = [Question(k, f"{k}.png", f"What is {k}?", ["rare", f"x{k}", f"x{k}"]) for k in range(8)]
    questions.append(Question("w", "w.png", "Where is it?", ["there"]))  # too few others begin with this word
    rows = multiple_choice(questions)
    for question, row in zip(questions, rows):
        assert row["answer"] in row["choices"] and len(set(row["choices"])) == 4
        assert set(row["choices"]) & set(question.answers) == {row["answer"]}
    assert multiple_choice(questions[:4])[0] | {"choices": []} == rows[0] | {"choices": []}
