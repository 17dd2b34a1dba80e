"""`train_hyma.py --add-encoder`: the finished run that an encoder is added to, and what is kept of it."""

import itertools
from pathlib import Path

from hyma.hypernetworks import HYPERNETWORKS
from hyma.pair_names import pair_of_name
from hyma.pairs import Pairs, images_of, texts_of
from hyma.runs import Checkpoints, check_same_split, is_finished, is_run
from vlm import BadInput, read_json

SAME_AS_BASE = ("generator", "connector", "width", "rank", "rows", "seed")  # flags of a run that an encoder is added to


def flags_of_base(run):
    """The flags of the run in --from that hold for the encoder that is added to it, which is in pairs with all of the others."""
    if not is_run(Path(run)):
        raise BadInput(f"--from {run}: holds no run (no config.json)")
    config = read_json(Path(run) / "config.json")
    able = [name for name, kind in HYPERNETWORKS.items() if kind.takes_encoders]
    kept = config.get("flags")
    is_of_train_hyma = config.get("script") == "train_hyma.py" and isinstance(kept, dict) and "data" in kept
    if not is_of_train_hyma or kept.get("generator") not in able:
        raise BadInput(f"--from {run}: no run of train_hyma.py with --generator {' or '.join(able)}")
    for name in ("out", "pairs", "predict", "add_encoder", "from", "pairs_per_step"):
        kept.pop(name, None)
    return kept


def check_same_as_base(flags, kept):
    """Raises BadInput for a flag by which the added encoder would have other parts than the run in --from, or be trained on rows
    that choose there. kept: of `flags_of_base`."""
    if flags.pairs != ["all"] or flags.predict:
        flag, value = ("--predict", flags.predict) if flags.predict else ("--pairs", flags.pairs)
        raise BadInput(
            f"{flag} {' '.join(value)}: contradicts --add-encoder, whose pairs are those with all of the run's encoders"
        )
    for name in SAME_AS_BASE:
        now, base = getattr(flags, name), kept.get(name)
        if now != base:
            has = "none" if base is None else base
            raise BadInput(f"--{name} {now}: contradicts --from {flags.from_run}, which has {has}; leave it out")


def arrange_added_encoder(name, run, data):
    """The Pairs of an encoder that is added to a finished run, whose own pairs stay as they are."""
    if not is_finished(run):
        raise BadInput(f"--from {run}: is not finished; rerun to resume: python train_hyma.py --resume --out {run}")
    saved = Checkpoints(run).load("state")
    if saved is None:
        raise BadInput(f"--from {run}: has no checkpoint.pt any more, which has its parts; make the run again")
    base_state = saved["state"]
    if not {"refined", "fold_recalls"} <= base_state.keys():
        raise BadInput(f"--from {run}: was made by an earlier version of train_hyma.py; make the run again")
    base_state.setdefault("fold_pairs", len(base_state["fold_recalls"]))  # of an earlier version
    if "refinement" in saved:
        refined = saved["refinement"]["state"]
        base_state["refined"] |= refined["best"]
        for chosen in refined["best"]:
            base_state["updates"][chosen] += refined["step"]
    base_pairs = list(map(pair_of_name, base_state["best"]["recalls"]))
    image_names, text_names = images_of(base_pairs), texts_of(base_pairs)
    if name not in data.encoders:
        raise BadInput(f"--add-encoder {name}: not in {data.folder}; embed it with: python embed.py --encoder {name}")
    if name in image_names + text_names:
        raise BadInput(f"--add-encoder {name}: is in {run} already")
    config = read_json(run / "config.json")
    base_state["base_flags"] = config["flags"]
    check_same_split(f"--from {run}", config, data)
    trained_on = config["embeddings"]
    for encoder, digest in data.fingerprint(image_names + text_names).items():
        if digest != trained_on[encoder]:
            raise BadInput(f"--from {run}: its embeddings in {data.folder} have changed since")
    if data.encoders[name].kind == "image":
        added = list(itertools.product([name], text_names))
        image_names = [*image_names, name]
    else:
        added = list(itertools.product(image_names, [name]))
        text_names = [*text_names, name]
    return Pairs(added, base_pairs, added, image_names, text_names, base_state)


def load_base_parts(generator, base_state):
    """Loads the parts of the run that --add-encoder adds to, and freezes them: only the new encoder's part is trained."""
    missing = generator.load_state_dict(base_state["best"]["weights"], strict=False).missing_keys
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in missing)


def cards_of_base(base_state):
    """{"image:text": what its card says of the training} of the connectors of the run that an encoder is added to."""
    epoch, logit_scale = base_state["best"]["epoch"], base_state["base_flags"]["logit_scale"]
    cards = {}
    for name in base_state["best"]["recalls"]:
        of_training = {"logit_scale": logit_scale, "epoch": epoch, "updates": base_state["updates"][name]}
        cards[name] = of_training | base_state.get("of_base", {}).get(name, {})  # which it had from a run before
    return cards
