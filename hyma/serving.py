"""`search.py --serve`: a page of this machine alone. Type, and see the pictures of two pairs; drop a picture, see captions.

Gradio makes the page. No file of the corpus is served: pictures are small copies inside the page, of the folder that
`hyma/gallery.py` allows. The page loads nothing from elsewhere and sends nothing out.
"""

import html
import os
import socket

from hyma.pair_names import pair_name
from hyma.results_page import Section, make_section, render_part
from vlm import BadInput

HOST = "127.0.0.1"
PICTURE_HEIGHT = 240  # pixels, of the picture that is dropped


def serve(search, chosen, top, port, open_browser):
    """Serves the page until Ctrl-C. Raises BadInput if gradio is missing or the port is taken."""
    gradio = import_gradio()
    check_port(port)
    page = make_page(gradio, search, chosen, top)
    print(f"http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        inbrowser=open_browser,
        allowed_paths=[],
        max_file_size="50mb",
        footer_links=[],
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


def import_gradio():
    """gradio, which is optional."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise BadInput("--serve: needs gradio, which is not installed: pip install gradio") from None
    return gradio


def check_port(port):
    """Raises BadInput for a port that another program listens on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise BadInput(f"--port {port}: is in use by another program; name another: --port {port + 1}") from None


def make_page(gradio, search, chosen, top):
    """The page: two pairs side by side, a tab for words and one for a picture."""
    names = [pair_name(pair) for pair in search.run.ranks]
    first = pair_name(chosen)
    second = next((name for name in names if name != first), first)

    def by_words(text, *pairs):
        """The HTML of each pair's pictures."""
        return [answer(search, name, lambda pair: pictures_section(search, pair, text, top)) for name in pairs]

    def by_picture(path, classes, *pairs):
        """The HTML of each pair's captions or, if there are classes, of their scores."""
        return [answer(search, name, lambda pair: picture_section(search, pair, path, classes, top)) for name in pairs]

    day = 24 * 3600  # after it, and when the page ends, pictures that were dropped are deleted
    options = {"title": f"Search {search.data.dataset}", "analytics_enabled": False, "delete_cache": (day, day)}
    with gradio.Blocks(**options) as page:
        gradio.HTML(f"<h2>Search {len(search.picture_rows):,} pictures of {html.escape(search.data.dataset)}</h2>")
        with gradio.Row():
            pairs = [
                gradio.Dropdown(names, value=first, label="the chosen pair"),
                gradio.Dropdown(names, value=second, label="beside it"),
            ]
        with gradio.Tab("Find pictures"):
            words = gradio.Textbox(label="What is in the picture? Press Enter.", elem_id="words", autofocus=True)
            with gradio.Row():
                found = [gradio.HTML(), gradio.HTML()]
        with gradio.Tab("Describe a picture"):
            with gradio.Row():
                sources = ["upload", "clipboard"]
                picture = gradio.Image(type="filepath", sources=sources, label="a picture", height=PICTURE_HEIGHT)
                classes = gradio.Textbox(label="Classes, with commas between them (none: the nearest captions)")
            with gradio.Row():
                described = [gradio.HTML(), gradio.HTML()]
        words.submit(by_words, [words, *pairs], found)
        picture.change(by_picture, [picture, classes, *pairs], described)
        classes.submit(by_picture, [picture, classes, *pairs], described)
        for pair in pairs:
            pair.change(by_words, [words, *pairs], found)
            pair.change(by_picture, [picture, classes, *pairs], described)
    return page


def answer(search, name, make):
    """The HTML of a pair's Section; of a question that cannot be answered, why not."""
    try:
        section = make(search.choose_pair(name))
    except BadInput as error:
        section = Section(name, problem=str(error))
    return render_part([section]) if section else ""


def pictures_section(search, pair, text, top):
    """The Section of the pictures nearest to a text; None for no text."""
    if not (text or "").strip():
        return None
    return make_section(search, pair_name(pair), "", search.find_pictures(pair, text, top))


def picture_section(search, pair, path, classes, top):
    """The Section of the captions nearest to a picture or, if there are any, of its classes; None for no picture."""
    if not path:
        return None
    names = list(dict.fromkeys(filter(None, map(str.strip, (classes or "").split(",")))))
    hits = search.classify(pair, path, names) if names else search.find_captions(pair, path, top)
    return make_section(search, pair_name(pair), "", hits)
