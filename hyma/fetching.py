"""The paper's authors' embeddings, brought from the Hugging Face hub: `embed.py --fetch cc3m558k`."""

import fnmatch
from pathlib import Path

import vlm
from hyma.vector_files import find_vectors
from vlm import BadInput, reason_of

# Data sets of the hub by the name that --fetch has for them: one .pt for each encoder, in four folders.
PUBLISHED = {
    "cc3m558k": (
        "jaisidhsingh/cc3m558k-img-embed-dim-384",
        "jaisidhsingh/cc3m558k-img-embed-dim-768",
        "jaisidhsingh/cc3m558k-img-embed-dim-1024",
        "jaisidhsingh/cc3m558k-txt-embed-all-dims",
    )
}


def fetch_published(name, out, names):
    """Downloads a published set into folders of `out`, one for each of its repositories, and prints how to go on.

    names: of the encoders, or wildcards, [] for all. What is there already is not brought again, and a file that was cut
    off is resumed: run the same command again.
    """
    if name not in PUBLISHED:
        raise BadInput(f"--fetch {name}: expected {' or '.join(PUBLISHED)}")
    from huggingface_hub import snapshot_download

    vlm.go_offline_without_hub()
    patterns = [f"*{pattern}.pt" for pattern in names] or ["*.pt"]
    folders = []
    for repository in PUBLISHED[name]:
        folder = out / repository.partition("/")[2]
        print(f"huggingface.co/datasets/{repository} -> {folder}", flush=True)
        try:
            snapshot_download(repository, repo_type="dataset", local_dir=folder, allow_patterns=patterns)
        except Exception as error:  # the hub's client raises a dozen unrelated types
            raise BadInput(
                f"--fetch {name}: {repository} cannot be fetched: {reason_of(error)}; "
                f"run the same command again to resume, or copy its .pt files to {folder}"
            ) from None
        if any(folder.glob("*.pt")):
            folders.append(folder)
    check_files(name, folders, names)
    quoted = " ".join(map(str, folders))
    print(f"Next: python train_hyma.py --data {quoted}")


def check_files(name, folders, names):
    """Prints what was brought. Raises BadInput if a file is not as published, or if an encoder that was asked for is
    not there."""
    found = {}
    for folder in folders:
        for encoder, vectors in find_vectors(Path(folder), vlm.ENCODERS).items():
            expected = vlm.registered_dim(encoder)
            if vectors.dim != expected:
                raise BadInput(
                    f"{vectors.paths[0]}: has vectors of width {vectors.dim}, and {encoder} gives {expected or 'is not known'}; "
                    "delete the file and run the same command again"
                )
            found[encoder] = vectors
            print(f"{vectors.paths[0]}: {vectors.rows:,} x {vectors.dim} {vectors.dtype}")
    for pattern in names:
        if not fnmatch.filter(found, pattern):
            raise BadInput(f"--encoder {pattern}: --fetch {name} has no such file; it has {', '.join(found) or 'none'}")
