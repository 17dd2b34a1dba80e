"""What embed.py does with embeddings that are there already: fetched, adopted, verified, exported."""

from pathlib import Path

import vlm

EXPORTS = ("npy", "parquet", "safetensors")  # of `hyma/exporting.py`


def add_folder_flags(parser):
    """The flags for embeddings that are there already; at most one of them is given."""
    jobs = parser.add_mutually_exclusive_group()
    jobs.add_argument(
        "--adopt",
        type=Path,
        metavar="FOLDER",
        help="check and seal .pt, .npy or .safetensors files of vectors, also in clip-retrieval's layout; with --data some "
        "rows are embedded again",
    )
    jobs.add_argument(
        "--verify",
        type=Path,
        metavar="FOLDER",
        help="check every byte of an embedding folder, and embed some rows again",
    )
    jobs.add_argument("--export", choices=EXPORTS, help="write the embedding folder --data for other programs, into --out")
    jobs.add_argument("--fetch", metavar="NAME", help="download the authors' embeddings: cc3m558k")


def run_folder_job(flags, data):
    """Does what one of these flags asks for. Returns whether there was one.

    data: the value of --data, None where it was not given. What the jobs need is imported here: embed.py alone needs none
    of it.
    """
    names = flags.encoder or []
    if flags.fetch:
        from hyma.fetching import fetch_published

        fetch_published(flags.fetch, flags.out or Path("embeddings"), names)
    elif flags.export:
        from hyma.embeddings import SAMPLE
        from hyma.exporting import export_folder

        folder = data or SAMPLE
        export_folder(folder, flags.out or Path("exported") / folder.resolve().name, flags.export, names)
    elif flags.verify:
        from hyma.verifying import verify_folder
        from hyma.weights import named_paths

        weights = named_paths("--weights", flags.weights, "PATH")
        verify_folder(flags.verify, names, weights, vlm.pick_device(flags.device))
    elif flags.adopt:
        from hyma.adopting import adopt_folder
        from hyma.weights import named_paths

        adopt_folder(
            flags.adopt,
            flags.out,
            data,
            (flags.image_column, flags.caption_column),
            [vlm.find_encoder(name) for name in names],
            named_paths("--weights", flags.weights, "PATH"),
            vlm.pick_device(flags.device),
        )
    else:
        return False
    return True
