"""Benchmark: choosing encoders on a random part of a corpus, against the scores that training on all of it gives.

    python benchmarks/ladder.py --rungs 19800                         # once: the corpus, its embeddings, its runs
    python benchmarks/choose_early.py --data embeddings/ladder/rung-19800 --runs embeddings/ladder/runs-19800/mlp1-hyma-s?

A part of 500, 1,000, 2,000 and 4,000 rows is drawn as `embed.py --rows --seed` draws it, three times each, and what
`train_hyma.py` would print of it is compared with the truth: test scores of the runs' own connectors, the mean over the
runs, and beside them grid search's of ladder.json.
Writes benchmarks/choose_early.json, an entry for each corpus; README.md in this folder explains its keys. CPU only.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hyma.costs import count_different, count_in_proportion, embedding_flops
from hyma.embeddings import Embeddings, RowStore
from hyma.files import run_script, write_json
from hyma.metrics import INTERVAL, Retrieval, mean_recalls
from hyma.pair_names import choose_pairs, pair_name
from hyma.prediction import LearningCurves, extrapolate, learning_curves, logit
from hyma.runs import read_run
from hyma.shortlist import encoder_costs, shortlist
from hyma.splits import split_rows
from hyma.subset import turn_of
from vlm import BadInput, load_connector, map_text, read_json

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def main():
    flags = parse_flags()
    data = Embeddings(flags.data)
    pairs = choose_pairs(data, ["all"])
    test_rows = torch.tensor([i for i, row in enumerate(data.rows) if row["split"] == "test"])
    training_rows = len(split_rows(data)[0])
    of_runs = [test_scores(run, data, pairs, test_rows) for run in flags.runs]
    truth = np.mean([[scores[pair_name(pair)][1] for pair in pairs] for scores in of_runs], axis=0)  # [P]
    ladder = read_json(ROOT / "benchmarks" / "ladder.json")
    if flags.grid not in ladder:
        raise BadInput(f"--grid {flags.grid}: is not in ladder.json, which has {', '.join(ladder)}")
    grid_scores = ladder[flags.grid]["true scores"]
    grid_truth = np.array([grid_scores[pair_name(pair)][1] for pair in pairs])  # [P]
    kept_pairs = {"all encoders": range(len(pairs))}
    kept_pairs["without control"] = [p for p, pair in enumerate(pairs) if pair[0] != "control"]

    results = {"training rows": training_rows, "rows": data.row_count, "pairs": len(pairs), "draws": []}
    for count in flags.rows:
        for seed in flags.seeds:
            rows = draw_rows(data, count, seed)
            curves = curves_of(flags, data, pairs, rows, count, seed)
            result = {"rows": count, "seed": seed}
            for name, indices in kept_pairs.items():
                chosen = np.array(indices)
                some = curves._replace(hits=curves.hits[:, chosen])
                prediction = extrapolate(some, [pairs[p] for p in chosen], training_rows, flags.candidates)
                result[name] = compare(data, prediction, truth[chosen], grid_truth[chosen], count)
            results["draws"].append(result)
            print(f"{count} rows, seed {seed}: {result['without control']}", flush=True)
    results["summary"] = summary(results["draws"], list(kept_pairs))
    write_json(flags.json, (read_json(flags.json) if flags.json.exists() else {}) | {flags.data.name: results})
    print(f"{flags.json}: written")


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="embedding folder of the whole corpus")
    add("--runs", type=Path, nargs="+", required=True, help="runs of train_hyma.py on it: the truth")
    add("--grid", default="19800 mlp1", help="rung and depth of ladder.json: the other truth (default: %(default)s)")
    add("--rows", type=int, nargs="+", default=[500, 1000, 2000, 4000], help="of the parts")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a draw of each part for each")
    add("--candidates", type=int, default=2000, help="that R@10 is predicted among (default: %(default)s)")
    add("--work", type=Path, default=Path("embeddings/choose"), help="learning curves, kept (default: %(default)s)")
    add("--json", type=Path, default=ROOT / "benchmarks" / "choose_early.json", help="results (default: %(default)s)")
    return parser.parse_args()


@functools.cache
def open_store(data):
    """The vectors of all encoders, read and checked when they are first needed."""
    return RowStore(data, list(data.encoders), CPU)


# ------------------------------------------------------------------------------------------------------- the truth


def test_scores(folder, data, pairs, rows):
    """{"image:text": (R@1, R@10) of a run's connectors on the test rows, in per cent}, kept in the run folder."""
    path = folder / "test_scores.json"
    if path.exists():
        return read_json(path)
    run = read_run(folder)
    store = open_store(data)
    retrieval = Retrieval(data, rows, CPU)
    scores = {}
    for image, text in pairs:
        connector = load_connector(run.connector(image, text), store.dims[image], store.dims[text])
        mapped = map_text(connector, store.take(text, rows))
        recall1, _, recall10 = mean_recalls(retrieval.recalls(mapped, store.take(image, rows)))
        scores[pair_name((image, text))] = (100 * recall1, 100 * recall10)
    write_json(path, scores)
    return scores


# ------------------------------------------------------------------------------------------------------- predictions


def draw_rows(data, count, seed):
    """The rows of a part that train or choose, as `embed.py --rows` draws it of pictures that have a caption each."""
    order = sorted(range(data.row_count), key=lambda i: turn_of(data.rows[i]["image"], seed))
    return torch.tensor(sorted(i for i in order[:count] if data.rows[i]["split"] != "test"))


def curves_of(flags, data, pairs, rows, count, seed):
    """The LearningCurves of a part, kept in the work folder."""
    path = flags.work / flags.data.name / f"{count}-{seed}.npz"
    if not path.exists():
        curves = learning_curves(open_store(data), data, pairs, rows, seed, flags.candidates)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **curves._asdict())
    return LearningCurves(**np.load(path))


def compare(data, prediction, truth, grid_truth, count):
    """What was predicted from `count` rows against the truths [P], in points of R@10."""
    costs = encoder_costs(data, prediction.pairs)
    kept, probability = shortlist(prediction, costs)
    chosen = np.array([set(pair) <= set(kept) for pair in prediction.pairs])
    first = prediction.expected.argmax()
    everything = embedding_flops(data, costs, count_different(data))
    part = embedding_flops(data, costs, count_in_proportion(data, count))
    chosen_rest = embedding_flops(data, kept, count_in_proportion(data, data.row_count - count))  # the part's vectors are taken over
    true_logits = logit(truth / 100)
    levels = np.percentile(prediction.draws, INTERVAL, axis=0)  # [2, P]
    centred = prediction.draws - prediction.draws.mean(1, keepdims=True)
    differences = np.percentile(centred, INTERVAL, axis=0)  # [2, P]
    return {
        "kept": kept,
        "probability": round(probability, 3),
        "cost": round((part + chosen_rest) / everything, 3),
        "regret": round(float(truth.max() - truth[chosen].max()), 3),
        "regret, grid": round(float(grid_truth.max() - grid_truth[chosen].max()), 3),
        "regret of the first": round(float(truth.max() - truth[first]), 3),
        "spearman": round(spearman(prediction.expected, truth), 3),
        "levels in the interval": round(coverage(levels, true_logits), 3),
        "differences in the interval": round(coverage(differences, true_logits - true_logits.mean()), 3),
        "mean error": round(float((100 * prediction.expected - truth).mean()), 2),
    }


def coverage(interval, values):
    """The share of the values [P] inside their intervals [2, P]."""
    return float(((interval[0] <= values) & (values <= interval[1])).mean())


def spearman(left, right):
    """The rank correlation of values without ties."""
    return float(np.corrcoef(left.argsort().argsort(), right.argsort().argsort())[0, 1])


def summary(draws, groups):
    """{group: {rows: {number: its mean over the draws}}}."""
    found = {}
    for group in groups:
        found[group] = {}
        for count in sorted({draw["rows"] for draw in draws}):
            of_count = [draw[group] for draw in draws if draw["rows"] == count]
            means = {"encoders kept": round(float(np.mean([len(draw["kept"]) for draw in of_count])), 2)}
            for key, value in of_count[0].items():
                if isinstance(value, float):
                    means[key] = round(float(np.mean([draw[key] for draw in of_count])), 3)
            found[group][count] = means
    return found


if __name__ == "__main__":
    run_script(main)
