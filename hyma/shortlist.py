"""Which encoders are worth embedding all rows of a corpus with, by a run on a random part of it, and the command for that.

A pair needs both of its encoders, so images and texts are kept together: the encoders that can be left out are those without
which the rest still holds a pair at most CLOSE below the best in CERTAIN of the draws of `hyma.prediction`.
"""

import shlex

import torch

from hyma.costs import count_different, count_in_proportion, embedding_flops, flop_counter
from hyma.embeddings import unique
from hyma.files import write_csv
from hyma.pairs import images_of, texts_of
from hyma.prediction import odds_to_share, predict
from vlm import ENCODERS

CERTAIN = 0.97
CLOSE = 0.01  # R@10 below the best pair's that makes no difference: what another seed of the training can change
LEAST_ROWS = 100  # to train on: fewer predict nothing
REASONABLE_ROWS = 1000  # of a part (benchmarks/README.md, choosing on a part)


def whole_corpus(data):
    """What the manifest of a part records of the corpus that it was drawn from (`hyma.subset`). None for a whole corpus."""
    subset = (data.manifest or {}).get("subset")
    if not subset or subset["whole"]["rows"] <= max(data.row_count, subset["rows"]):  # rows that cannot be used make no part of it
        return None
    return subset


def advise(out, data, store, pairs, train_rows, val_rows, seed):
    """Predicts the pairs' scores on the whole corpus, writes them to prediction.csv and prints which encoders to embed it
    with. Does nothing where the folder is a whole corpus. out: the run folder. pairs: of the run. rows: of its split."""
    subset = whole_corpus(data)
    if subset is None or len(pairs) < 2:
        return
    if len(train_rows) < LEAST_ROWS:
        print(
            f"{len(train_rows)} training rows are too few to predict from; embed a larger part: --rows {REASONABLE_ROWS}"
        )
        return
    pairs = sorted(pairs, key=lambda pair: images_of(pairs).index(pair[0]))
    splits = subset["whole"]["splits"]
    with flop_counter() as counter:
        rows = torch.cat([train_rows, val_rows]).sort().values
        prediction = predict(store, data, pairs, rows, splits["train"], splits.get("val", 0), seed)
    kept, probability = shortlist(prediction, encoder_costs(data, pairs))
    write_csv(out / "prediction.csv", prediction_rows(prediction, kept))
    print_prediction(prediction, kept, counter.get_total_flops())
    print_advice(data, subset, pairs, kept, probability)
    print(f"all predictions: {out / 'prediction.csv'}")


# ---------------------------------------------------------------------------------------------- which encoders are kept


def encoder_costs(data, pairs):
    """{encoder: FLOPs of embedding the folder's rows}, 1 for each where the manifest lacks any."""
    names = images_of(pairs) + texts_of(pairs)
    costs = {}
    for name in names:
        costs[name] = embedding_flops(data, [name], count_different(data))
    return costs if all(costs.values()) else dict.fromkeys(names, 1)


def shortlist(prediction, costs):
    """(encoders, probability): as few as hold, with CERTAIN probability, a pair that is at most CLOSE below the best.

    Of the encoders that can go, the one goes next that loses the least probability for what it saves.
    costs: {encoder: FLOPs}.
    """
    scores = odds_to_share(prediction.draws)  # [draws, P]
    enough = scores.max(1, keepdims=True) - CLOSE  # [draws, 1]
    is_close = scores >= enough  # [draws, P]

    def probability(names):
        places = [p for p, pair in enumerate(prediction.pairs) if names.issuperset(pair)]
        return float(is_close[:, places].any(1).mean())

    kept = set(costs)
    before = 1.0
    while True:
        after = {name: probability(kept - {name}) for name in sorted(kept)}
        can_go = [name for name in after if after[name] >= CERTAIN]
        if not can_go:
            break
        leaves = min(can_go, key=lambda name: (before - after[name] + 1e-9) / costs[name])
        kept.remove(leaves)
        before = after[leaves]
    return [name for name in costs if name in kept], before


# ------------------------------------------------------------------------------------------- what is written and printed


def prediction_rows(prediction, kept):
    """The rows of prediction.csv, best first."""
    rows = []
    for p in prediction.expected.argsort()[::-1].tolist():
        image, text = prediction.pairs[p]
        row = {"image": image, "text": text, "predicted_recall10": round(float(prediction.expected[p]), 6)}
        row["low"] = round(float(prediction.interval[0, p]), 6)
        row["high"] = round(float(prediction.interval[1, p]), 6)
        row["best_probability"] = round(float((prediction.best() == p).mean()), 4)
        row["kept"] = image in kept and text in kept
        for size, score in zip(prediction.sizes, prediction.curve[:, p]):
            row[f"recall10_of_{size:.0f}_rows"] = round(float(score), 6)
        rows.append(row)
    return rows


def print_prediction(prediction, kept, flops):
    """The pairs that are kept, with what is predicted of them."""
    sizes = ", ".join(f"{size:,.0f}" for size in prediction.sizes)
    print(
        f"\nprediction for {prediction.target_rows:,.0f} training rows, from closed forms of {sizes} rows ({flops / 1e12:.2f} "
        f"TFLOP): R@10 in % among {prediction.candidates:,} candidates"
    )
    rows = [row for row in prediction_rows(prediction, kept) if row["kept"]]
    wide = max(len(row["image"]) for row in rows)
    for row in rows:
        numbers = [100 * row[key] for key in ("predicted_recall10", "low", "high")]
        line = "  {:5.1f}  ({:.1f} to {:.1f})".format(*numbers)
        print(f"{line}  {row['image']:{wide}}  {row['text']}, the best with {row['best_probability']:.0%}")


def print_advice(data, subset, pairs, kept, probability):
    """What to do, and the command for it."""
    whole = subset["whole"]["rows"]
    images = [name for name in images_of(pairs) if name in kept]
    texts = [name for name in texts_of(pairs) if name in kept]
    names = images_of(pairs) + texts_of(pairs)
    if len(kept) == len(names):
        print(f"No encoder can be left out with {CERTAIN:.0%} certainty. More rows tell them apart, or embed all:")
    else:
        line = f"Embed all {whole:,} rows with {in_words(images, 'image')} and {in_words(texts, 'text')}."
        line += f" They hold a pair at most {100 * CLOSE:.0f} point below the best with {probability:.0%} probability"
        different = count_in_proportion(data, whole)
        cost, of_all = embedding_flops(data, kept, different), embedding_flops(data, names, different)
        if cost and of_all:
            line += f", and leaving out the others saves {1 - cost / of_all:.0%} of the embedding"
        print(f"{line}:")
    print(f"    {embed_command(data, subset, images + texts)}")


def in_words(names, kind):
    """The encoders of a kind, counted and named."""
    return f"{len(names)} {kind} encoder{'s' * (len(names) > 1)} ({', '.join(names)})"


def embed_command(data, subset, names):
    """embed.py for the whole corpus with these encoders, which takes over the vectors of the part."""
    words = ["python", "embed.py", "--encoder"]
    for name in names:
        encoder = data.encoders[name]
        known = name in ENCODERS and ENCODERS[name].spec == encoder.spec
        words.append(name if known else f"{name}={encoder.spec}")
    options = dict(subset.get("options", {}))
    weights = []
    for manifest in data.manifests():
        weights += manifest.get("subset", {}).get("options", {}).get("--weights", [])
    options["--weights"] = [value for value in unique(weights) if value.partition("=")[0] in names]  # embed.py refuses others
    for flag, values in options.items():
        if values or flag != "--weights":
            words += [flag, *values]
    words += ["--reuse", *map(str, data.folders), "--out", f"{data.folder}-chosen"]
    return shlex.join(words)
