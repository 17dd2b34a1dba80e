"""Search your own pictures with the stitched pair of a run: the run's embedding folder is the index.

    python search.py runs/my "a red car"                      # the pictures nearest to the words
    python search.py runs/my --image dog.jpg                  # the captions nearest to a picture
    python search.py runs/my --image dog.jpg --classes cat dog bird      # zero-shot: the class of a picture
    python search.py runs/my --classes classes.txt            # the class of every picture; a line of the file is a class
    python search.py runs/my "a red car" --out results.html   # one self-contained page
    python search.py runs/my --serve                          # a page of this machine alone, http://127.0.0.1:7860

The pair is the first of the run's ranking, or --pair. No picture of the corpus is encoded again. Words need the text
encoder alone, a picture the image encoder. Scores are cosines. Where there is a display, the results open in a browser.
"""

if __name__ == "__main__":
    from hyma import before_main  # noqa: F401  what a signal does while torch is imported

import argparse
import os
import sys
import tempfile
import webbrowser
from pathlib import Path

import vlm
from hyma.files import run_script, write_text
from hyma.gallery import embedded_bytes
from hyma.pair_names import pair_name
from hyma.results_page import how_to_show, make_section, render_page
from hyma.runs import read_run
from hyma.searching import Search, read_classes
from hyma.weights import check_names, named_paths
from vlm import BadInput

TOP_OF_CLASS = 5  # pictures of each class that are shown, unless --top says

# ------------------------------------------------------------------------------------------------------------ flags


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, or a folder of connectors alone")
    add("query", nargs="*", metavar="WORDS", help="what the pictures to find are of")
    add("--image", type=Path, metavar="FILE", help="a picture, to find captions or its class")
    add("--classes", nargs="+", default=[], metavar="CLASS", help="two or more classes, or a file with one a line")
    add("--pair", metavar="IMAGE:TEXT", help="the pair to search with (default: the first of the ranking)")
    add("--top", type=int, metavar="N", help="how many results (default: 10; of each class 5)")
    add("--out", type=Path, metavar="FILE", help="write the results as one self-contained page, results.html")
    add("--serve", action="store_true", help="serve a page to this machine alone; needs gradio")
    add("--port", type=int, default=7860, help="of --serve (default: %(default)s)")
    about = "an encoder's local file or folder, instead of the hub's files"
    add("--weights", nargs="+", default=[], metavar="NAME=PATH", help=about)
    about = "the embedding folder, where it has moved; or another to search; repeatable, for several of equal rows"
    add("--data", action="append", type=Path, metavar="FOLDER", help=about)
    about = "where the pictures lie (default: where the embedding folder's manifest says)"
    add("--pictures", type=Path, metavar="FOLDER", help=about)
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: the GPU if there is one)")
    add("--no-open", action="store_true", help="open no browser")
    flags = parser.parse_intermixed_args()  # words may stand after flags
    flags.query = " ".join(flags.query) if flags.query else None
    check_flags(flags)
    flags.weights = named_paths("--weights", flags.weights, "PATH")
    flags.classes = read_classes(flags.classes) if flags.classes else []
    flags.device = vlm.pick_device(flags.device)
    return flags


def check_flags(flags):
    """Raises BadInput for flags that ask for nothing, or for two things at once."""
    if flags.query is not None and not flags.query.strip():
        raise BadInput('the words to search for are empty; give some: python search.py RUN "a red car"')
    if flags.query and (flags.image or flags.classes):
        raise BadInput("give words, or --image and --classes, not both")
    if flags.serve and (flags.query or flags.image or flags.classes or flags.out):
        raise BadInput("--serve: the page takes words, pictures and classes; give none here, and no --out")
    if not (flags.query or flags.image or flags.classes or flags.serve):
        raise BadInput('what is to be found? Give words ("a red car"), --image FILE, --classes or --serve')
    if flags.top is not None and flags.top < 1:
        raise BadInput(f"--top {flags.top}: must be at least 1")
    if not 1 <= flags.port <= 65535:
        raise BadInput(f"--port {flags.port}: must be 1 to 65535")
    if flags.out and flags.out.is_dir():
        raise BadInput(f"--out {flags.out}: is a folder; name a file, such as {flags.out / 'results.html'}")
    if flags.out and not os.access(flags.out.parent, os.W_OK):
        raise BadInput(
            f"--out {flags.out}: there is no folder {flags.out.parent} that can be written to; make it, or name another"
        )


# ---------------------------------------------------------------------------------------------------------- answers


def answer(search, pair, flags):
    """[(title, note, [Hit])]: what was asked for, one entry a question."""
    top = flags.top or 10
    if flags.query:
        return [(flags.query, "", search.find_pictures(pair, flags.query, top))]
    if flags.image and not flags.classes:
        return [(str(flags.image), "the nearest captions", search.find_captions(pair, flags.image, top))]
    if flags.image:
        return [(str(flags.image), "its classes", search.classify(pair, flags.image, flags.classes))]
    found = search.classify_corpus(pair, flags.classes, flags.top or TOP_OF_CLASS)
    answers = []
    for name, (count, hits) in found.items():
        note = f"{count} of {len(search.picture_rows)} pictures are nearest to it"
        answers.append((name, note, hits))
    return answers


def print_answers(search, answers):
    """The results as tables, and a line about pictures that are no longer there."""
    absent, count = 0, 0
    for title, note, hits in answers:
        print(f"\n{title}{': ' if note else ''}{note}")
        named = [hit for hit in hits if hit.picture]
        width = max((len(hit.picture) for hit in named), default=0)
        if hits:
            print(f"rank  score  {'picture':{width}}  caption" if named else "rank  score  class")
        for rank, hit in enumerate(hits, start=1):
            picture = f"{one_line(hit.picture, width):{width}}  " if hit.picture else ""
            print(f"{rank:4}  {hit.score:5.3f}  {picture}{one_line(hit.text)}")
            absent += not is_there(search, hit)
            count += hit.picture is not None
    problem = how_to_show(search, absent, count)
    if problem:
        print(f"\n{problem}", file=sys.stderr)


def one_line(text, most=100):
    """A text as one line of the terminal: no control characters, and not too long."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_there(search, hit):
    """Whether a result's picture, if it has one, can be shown."""
    path = search.find_picture(hit.picture) if hit.picture else None
    return hit.picture is None or (path is not None and embedded_bytes(path, hit.sha256) is not None)


def write_page(search, pair, answers, path):
    """Writes the results as one page."""
    about = f"{pair_name(pair)}, {len(search.picture_rows)} pictures of {search.data.folder}"
    sections = []
    for title, note, hits in answers:
        sections.append(make_section(search, title, f"{note}; {about}" if note else about, hits))
    write_text(path, render_page(sections[0].title, sections))


# ---------------------------------------------------------------------------------------------------------- browser


def has_display():
    """Whether a browser window can open here."""
    return sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def open_page(path):
    """Opens a page in the browser. Where there is none, a line says where the page is."""
    try:
        opened = webbrowser.open(path.absolute().as_uri())
    except (webbrowser.Error, OSError):
        opened = False
    if not opened:
        print(f"no browser could be opened; the results are in {path}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------- main


def main():
    flags = parse_flags()
    search = Search(read_run(flags.run), flags.data, flags.weights, flags.pictures, flags.device)
    pair = search.choose_pair(flags.pair)
    check_names(flags.weights, search.data.encoders)

    if flags.serve:
        from hyma.serving import serve

        serve(search, pair, flags.top or 10, flags.port, has_display() and not flags.no_open)
        return

    answers = answer(search, pair, flags)
    print(f"{pair_name(pair)}, {len(search.picture_rows)} pictures of {search.data.folder}")
    print_answers(search, answers)

    opens = has_display() and not flags.no_open
    if opens and not flags.out:
        flags.out = Path(tempfile.mkdtemp(prefix="hyma-")) / "results.html"
    if flags.out:
        write_page(search, pair, answers, flags.out)
        print(f"\nresults: {flags.out}")
    if opens:
        open_page(flags.out)


if __name__ == "__main__":
    run_script(main)
