"""Which encoder pair to stitch, how sure that is, what it cost: runs and selectors judged by their own connectors.

    python evaluate.py                                             # the newest run, on its data's test rows
    python evaluate.py runs/hyma runs/halving runs/grid-s0 runs/grid-s1        # the full grid's runs are the oracle
    python evaluate.py runs/hyma --oracle runs/grid-s* --task coco=embeddings/coco --task in1k=embeddings/in1k
    python evaluate.py --demo                                      # makes runs of every kind on the sample first

It knows connectors and embeddings only: RUN may be a folder of connectors alone, as published, with --task. The true
score of a pair on a task is what the oracle's connector scores there, the mean over the oracle's seeds. Every way of
choosing a pair (a run's ranking.csv, which no test row has seen, or a selector that trains nothing) is judged by what its
choice loses against the best: regret, in points. Retrieval leads the report, as connectors are trained for it; other
tasks follow. Writes report/: report.html with every figure inside, results.json, ranking.csv, selectors.csv, and each
figure as PNG and CSV.

Pictures and captions of a task come from an embedding folder: `embed.py` makes one of your own data or of a standard
set. Prompts come from its prompts/, or the text encoder adds them there once.
"""

import argparse
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import vlm
from hyma.costs import FREE, Cost, cost_of_runs, cost_of_selector, times, trained_by_batches
from hyma.embeddings import Embeddings, choose_pairs, split_rows, unique
from hyma.files import provenance, run_script
from hyma.metrics import (
    METRICS,
    TaskScores,
    best_pairs,
    bootstrap_scores,
    draw_seed_weights,
    fidelity,
    resample,
    true_scores,
)
from hyma.report import Findings, choice, compose, method_rows, number, ranking_rows, teraflop, write_report
from hyma.runs import newest_finished_run, read_run
from hyma.selectors import Method, run_selectors, selector_rows
from hyma.tasks import CLIP_BENCHMARK_TASKS, HEADLINES, image_inputs, open_tasks, score, text_inputs
from vlm import BadInput


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: the newest in runs/)")
    about = "runs whose connectors are the truth, a seed each (default: full grids among RUN)"
    add("--oracle", nargs="+", type=Path, default=[], metavar="RUN", help=about)
    about = "an embedding folder to score on; repeatable (default: the runs' own data, its test rows)"
    add("--task", action="append", default=[], metavar="NAME=FOLDER", help=about)
    add("--data", type=Path, metavar="FOLDER", help="the runs' embedding folder, where it has moved")
    add("--out", type=Path, default=Path("report"), help="folder of the report (default: %(default)s)")
    add("--templates", default="1", help="prompts of a class: 1, 80 or a file of lines with {} (default: %(default)s)")
    add("--weights", nargs="+", default=[], metavar="NAME=PATH", help="a text encoder's folder, instead of the hub")
    add("--bootstrap", type=int, default=1000, help="resamples behind every interval (default: %(default)s)")
    about = "training rows that selectors see; 0: no selectors (default: %(default)s)"
    add("--selector-rows", type=int, default=2000, help=about)
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: the GPU if there is one)")
    add("--demo", action="store_true", help="make runs/demo-* on the sample, those not there yet, and report on them")
    flags = parser.parse_args()
    if flags.bootstrap < 1:
        raise BadInput(f"--bootstrap {flags.bootstrap}: one resample is the least; 1000 gives steady intervals")
    if flags.selector_rows and flags.selector_rows < 50:
        raise BadInput(f"--selector-rows {flags.selector_rows}: 50 rows are the least; 0 leaves the selectors out")
    for name in ("task", "weights"):
        items = [item.partition("=") for item in getattr(flags, name)]
        for key, equals, value in items:
            if not (key and equals and value):
                raise BadInput(f"--{name} {key}: expected NAME={'FOLDER' if name == 'task' else 'PATH'}")
        if len({key for key, _, _ in items}) < len(items):
            raise BadInput(f"--{name}: a name is given twice")
        setattr(flags, name, {key: value for key, _, value in items})
    if flags.demo and (flags.runs or flags.oracle or flags.task or flags.data):
        raise BadInput("--demo: makes its own runs on the sample; RUN, --oracle, --task and --data do not go with it")
    flags.device = vlm.pick_device(flags.device)
    return flags


# ----------------------------------------------------------------------------------------------------------- runs


def open_embeddings(runs, flags) -> Embeddings:
    """The embeddings that all the runs were trained on. Raises BadInput if they differ or have changed since."""
    homes, digests = [run.data for run in runs if run.ledger], {}
    if not (flags.data or homes or flags.task):
        raise BadInput(f"{runs[0].folder}: holds connectors alone; say what to score them on: --task NAME=FOLDER")
    if homes and not flags.data and not Path(homes[0]).is_dir():
        raise BadInput(f"{homes[0]}: no such folder from here; say where the runs' embeddings are: --data FOLDER")
    data = Embeddings(flags.data or [*homes, *flags.task.values()][0])
    for run in runs:
        for name in unique(name for pair in run.ranks for name in pair):
            digest = run.embeddings.get(name)  # None of connectors alone
            if digest and digests.setdefault(name, digest) != digest:
                said = f"was trained on another {name}.pt than the runs before it; compare runs of one"
                raise BadInput(f"{run.folder}: {said}")
            if name not in data.encoders:
                raise BadInput(f"{data.folder}: has no {name}, which {run.folder} is for; name the folder: --data")
            if digest and data.fingerprint([name])[name] != digest:
                said = f"is not what {run.folder} was trained on (sha256); train again"
                raise BadInput(f"{data.folder}/{name}.pt: {said}")
    return data


def group_runs(runs, pairs, oracles=()):
    """Methods of the runs: those that differ only in their seed are one, but for a seed of --oracle and one beside it.
    Those of one label are told apart by their folders."""

    def kind(run):
        return run.recipe, str(run.folder) in oracles

    groups = []
    for run in runs:
        for group in groups:
            if kind(group[0]) == kind(run) and run.seed not in {other.seed for other in group}:
                group.append(run)
                break
        else:
            groups.append([run])
    methods, labels = [], Counter(group[0].method for group in groups)
    for group in groups:
        name = group[0].method
        name += f" ({group[0].folder})" if labels[name] > 1 else ""
        orders = np.array([[-run.ranks[pair] for pair in pairs] for run in group], dtype=float)
        methods.append(Method(name, orders, group, {}))
    return methods


# ---------------------------------------------------------------------------------------------------------- tasks


# ------------------------------------------------------------------------------------------- a task's embeddings


# --------------------------------------------------------------------------------------------------------- scores


# ------------------------------------------------------------------------------------- selectors that train nothing


# Each takes features, {encoder: [n, D], centred}, and pairs, and gives {pair: score}.


# ------------------------------------------------------------------------------------------- truth and its bootstrap


def score_runs(tasks, methods, pairs, data, flags, results):
    """[TaskScores] of every task. Appends a record with CLIP_benchmark's keys to `results` for each connector."""
    judged, jobs = [], [(method, run, pair) for method in methods for run in method.runs for pair in pairs]
    with tqdm(total=len(tasks) * len(jobs), desc="score", unit="connector") as progress:
        for task in tasks:
            units = {method.name: [] for method in methods}
            for method, run, (image, text) in jobs:
                scored = score_connector(task, run, image, text, data, flags)
                units[method.name].append(scored.units.double().numpy())
                record = {"dataset": task.name, "model": run.connector(image, text).stem}
                record |= {"pretrained": str(run.folder), "task": CLIP_BENCHMARK_TASKS[task.kind]}
                record |= {"metrics": scored.metrics, "image": image, "text": text, "method": method.name}
                results.append(record | {"seed": run.seed, "protocol": task.protocol})
                progress.update()
            count = len(scored.units)
            units = {name: np.stack(each).reshape(-1, len(pairs), count) for name, each in units.items()}  # [S, P, U]
            scores = {name: values.mean(-1).round(9) for name, values in units.items()}
            counted = f"{count} {'questions' if task.kind == 'vqa' else 'pictures'}"
            drawn = resample(units, flags.bootstrap, task.name)
            about = f"{task.name} {task.kind}", task.kind, task.protocol, counted, task.chance
            judged.append(TaskScores(*about, scores, drawn))
    return judged


def score_connector(task, run, image, text, data, flags):
    texts, images = text_inputs(task, text, flags.weights, flags.device, data), image_inputs(task, image, data)
    dims = data.encoders[image].dim, data.encoders[text].dim
    connector = vlm.load_connector(run.connector(image, text), *dims).to(flags.device)
    try:
        return score(task, texts, images, connector)
    except BadInput as error:
        raise BadInput(f"{run.connector(image, text)}: {error}") from None


def headline_first(judged):
    """The tasks, those of the headline before the others: retrieval, which connectors are trained for, or else zeroshot,
    or vqa. Several of that kind are led by their mean; labels that also make questions never weigh twice."""
    kind = next(kind for kind in HEADLINES if any(each.kind == kind for each in judged))
    judged = sorted(judged, key=lambda each: each.kind != kind)
    leading = [each for each in judged if each.kind == kind]
    if len(leading) == 1:
        return judged
    names, counted = (" and ".join(unique(words)) for words in zip(*((one.name, one.counted) for one in leading)))
    means = [
        {name: np.mean([values[name] for values in each], axis=0).round(9) for name in each[0]}
        for each in ([one.scores for one in leading], [one.resampled for one in leading])
    ]
    chance = sum(each.chance for each in leading) / len(leading)
    return [TaskScores(f"the mean of {names}", kind, "each task's own, below", counted, chance, *means), *judged]


def at_chance(judged, oracle, drawn):
    """A line if the pairs together score no better than guessing."""
    low, high = np.percentile(bootstrap_scores(judged, oracle, drawn).mean(1), [2.5, 97.5])
    if low > judged.chance:
        return []
    said = (
        f"{judged.name}: the pairs score {low:.1%} to {high:.1%} on average, where guessing scores {judged.chance:.1%}"
    )
    return [f"{said}; do captions and pictures belong together?"]


def judge(judged, methods, oracle, drawn):
    """A row a method: every metric with its 95 % bootstrap interval over rows and seeds and its expectation under a
    random order, and, of a run, how its own connectors compare with the oracle's."""
    truth, truths = true_scores(judged, oracle), bootstrap_scores(judged, oracle, drawn)
    chance = fidelity(truth[None], np.zeros(len(truth)))
    top = np.argsort(-truth, kind="stable")[: math.ceil(len(truth) / 3)]
    rows = []
    for method in methods:
        point = [fidelity(truth[None], order) for order in method.orders]
        again = [fidelity(truths, order) for order in method.orders]
        row = {"task": judged.name, "method": method.name, "kind": "run" if method.runs else "selector"}
        row |= {"seeds": len(method.runs), "chosen": unique(k for order in method.orders for k in best_pairs(order))}
        for name in METRICS:
            values = (drawn[method.name] * np.stack([each[name] for each in again], axis=1)).sum(1)  # [R]
            low, high = np.percentile(values, [2.5, 97.5])
            row |= {name: np.mean([each[name][0] for each in point]), f"{name}_low": low, f"{name}_high": high}
            row[f"{name}_random"] = chance[name][0]
        row |= dict.fromkeys(("own_score", "gap_all", "gap_top_third"))
        if method.runs:
            own = judged.scores[method.name]  # [S, P]
            gap = 100 * (own.mean(0) - truth)
            first = method.orders == method.orders.max(1, keepdims=True)  # ties for the first place share it
            row["own_score"] = 100 * (own * first / first.sum(1, keepdims=True)).sum(1).mean()
            row |= {"gap_all": gap.mean(), "gap_top_third": gap[top].mean()}
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------- the ledger


# ------------------------------------------------------------------------------------------------------- the figures


# ------------------------------------------------------------------------------------------------------- the gallery


# -------------------------------------------------------------------------------------------------------- the report


def advise(found):
    """One sentence: the pair to stitch, how sure that is, what it cost."""
    judged, oracle, primary, pairs, chosen = found.judged[0], found.oracle, found.primary, found.pairs, found.chosen
    truth, truths = true_scores(judged, oracle), bootstrap_scores(judged, oracle, found.drawn)  # [P], [R, P]
    best, top = truths == truths.max(1, keepdims=True), int(truth.argmax())
    low, high = np.percentile(truths - truths[:, [chosen]], [2.5, 97.5], axis=0)  # [P] the others to the chosen
    image, text = pairs[chosen]
    by = "the choice of" if primary.trained else "the best of"
    said = f"Stitch {image} with {text} (mlp{primary.runs[0].hidden_layers}), {by} {primary.name}"
    ties = len(best_pairs(primary.orders.mean(0))) - 1
    said += f" (tied with {ties} more)" if ties and primary.trained else ""
    own, seeds = judged.scores[primary.name][0, chosen], f", {len(oracle.runs)} seeds" if len(oracle.runs) > 1 else ""
    said += f": its connector scores {100 * own:.1f} % on {judged.name} ({HEADLINES[judged.kind]}); by "
    said += f"the connectors of {oracle.name}{seeds}, " if oracle is not primary else "its own connectors, "
    sure = 100 * (best[:, chosen] / best.sum(1)).mean()
    said += f"the pair is the best of {len(pairs)} in {sure:.0f} % of resamples of {judged.counted}"
    if truth[chosen] < truth[top]:
        said += f", {100 * (truth[top] - truth[chosen]):.1f} points below {':'.join(pairs[top])}"
    order = [k for k in np.argsort(-truth, kind="stable") if k != chosen]
    better, alike = [k for k in order if low[k] > 0], [k for k in order if low[k] <= 0 <= high[k]]
    for words, some in (("clearly better", better), ("within noise", alike)):
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        said += f"; {words}: {', '.join(':'.join(pairs[k]) for k in some[:3])}{more}" if some else ""
    cost = found.costs[primary.name]
    if primary.trained:
        said += f"; {teraflop(cost.flops)} TFLOP in {cost.seconds:.0f} s"
    ratio = times(cost, found.costs[oracle.name], "flops_equal_batch")
    return said + (f", {ratio:.2g}x of {oracle.name} at equal batch size." if ratio and oracle is not primary else ".")


def print_table(found):
    """A line a method, as the trainers print their rankings."""
    wide, base = max(len(method.name) for method in found.methods), found.costs[found.oracle.name]
    heads = "regret, points (95 %)  top-1   R@3  NDCG@3  Spearman  tau-b    TFLOP        s  x oracle  chosen"
    print(
        f"\n{found.judged[0].name}, {found.judged[0].counted}; truth: {found.oracle.name}, seeds: {len(found.oracle.runs)}"
    )
    print(f"{'':{wide}}  {heads}")
    for row in found.fidelities[0]:
        cost = found.costs[row["method"]]
        regret = f"{row['regret']:6.2f} ({row['regret_low']:.2f} to {row['regret_high']:.2f})"
        five = f"{row['top1']:7.2f}{row['recall3']:6.2f}{row['ndcg3']:8.2f}{row['spearman']:10.2f}{row['tau']:7.2f}"
        spent = f"{teraflop(cost.flops):>9}{number(cost.seconds, 1):>9}"
        ratio = number(times(cost, base, "flops_equal_batch"), 3)
        print(f"{row['method']:{wide}}  {regret:21}{five}{spent}{ratio:>10}  {choice(row, found.pairs)}")


# -------------------------------------------------------------------------------------------------------------- main

DEMO = {
    "demo-hyma": ["train_hyma.py", "--pairs", "all"],
    "demo-halving": ["train_grid.py", "--halving"],
    "demo-ridge": ["train_grid.py", "--closed-form", "ridge"],
    "demo-grid": ["train_grid.py", "--seeds", "0", "1"],
}


def run_demo(device):
    """The demo's run folders on the sample; those that are finished already are taken as they are."""
    folders = []
    for name, (script, *arguments) in DEMO.items():
        out = Path("runs") / name
        made = [out.with_name(f"{name}-s{seed}") for seed in (0, 1)] if name == "demo-grid" else [out]
        if not all((folder / "ledger.json").is_file() for folder in made):
            started = any((folder / "config.json").is_file() for folder in made)
            command = [sys.executable, str(Path(__file__).parent / script), "--out", str(out)]
            command += ["--resume"] if started else [*arguments, "--device", str(device)]
            print(f"demo: {script} {' '.join(command[2:])}", flush=True)
            if code := subprocess.run(command).returncode:
                raise BadInput(f"--demo: {script} ended with status {code}; what it said is above")
        folders += made
    return folders


def choose_oracle(methods, named):
    """(the method whose connectors are the truth, the method that is advised by, lines of warning).

    named: the folders of --oracle. Without, the truth is a full grid, one with connectors as deep as the first run's if
    there is one, or else the first run's own.
    """
    full = [m for m in methods if all(str(r.folder) in named if named else r.full_grid for r in m.runs)]
    if len(full) > 1 and named:
        raise BadInput(f"--oracle {' '.join(sorted(named))}: must be seeds of one method, the same flags otherwise")
    primary = next((method for method in methods if method not in full), methods[0])
    if full:
        alike = [method for method in full if method.runs[0].hidden_layers == primary.runs[0].hidden_layers]
        return (alike or full)[0], primary, []
    if not primary.trained:
        return (
            primary,
            primary,
            [f"{primary.name}: nothing ranks them but the rows that judge them: their best leans upwards"],
        )
    said = f"no oracle: the truth is {primary.name}'s own connectors, which cannot show what it has missed; add the "
    return primary, primary, [said + "runs of train_grid.py with its whole budget, or name others with --oracle"]


def open_all_tasks(flags, runs, data):
    """(the tasks, lines of warning). Of the folder that the runs were trained on, only rows that none was trained on."""
    tasks, warnings, seeds = [], [], sorted({run.seed for run in runs if run.ledger})
    for name, folder in (flags.task or {None: data.folder}).items():
        own = seeds and os.path.realpath(folder) == os.path.realpath(data.folder)
        if own and not any(row.get("split") == "test" for row in data.rows or []):
            if len(seeds) > 1 and not any(row.get("split") for row in data.rows or []):
                said = f"has no split column, so that seeds {' and '.join(map(str, seeds))} set other rows aside"
                raise BadInput(f"{data.folder}: {said}; name another --task, or give runs of one seed")
            said = (
                "has no test split: the validation rows that chose the connectors also judge them; name another --task"
            )
            warnings.append(f"{data.folder} {said}")
        tasks += open_tasks(name, folder, flags, seeds[0] if own else None)
    return tasks, warnings


def main():
    flags = parse_flags()
    folders = run_demo(flags.device) if flags.demo else flags.runs or [newest_finished_run()]
    runs = [read_run(folder) for folder in unique(os.path.normpath(folder) for folder in [*folders, *flags.oracle])]
    oracles = {os.path.normpath(folder) for folder in flags.oracle}
    data = open_embeddings(runs, flags)
    first = next((run for run in runs if str(run.folder) not in oracles), runs[0])
    pairs = [pair for pair in choose_pairs(data, ["all"]) if pair in first.ranks]
    for run in runs:
        if missing := [":".join(pair) for pair in pairs if pair not in run.ranks]:
            said = f"{run.folder}: has no {missing[0]} ({len(missing)} pairs missing of {len(pairs)})"
            raise BadInput(f"{said}; compare runs of the same pairs")
    methods = group_runs(runs, pairs, oracles)
    oracle, primary, warnings = choose_oracle(methods, oracles)
    tasks, said = open_all_tasks(flags, runs, data)
    warnings += said
    for name in (method.name for method in methods if method.runs[0].starts_from):
        warnings.append(f"{name}: starts from another run's connectors, whose cost is not in its own")

    results, spectra = [], {}
    judged = headline_first(score_runs(tasks, methods, pairs, data, flags, results))
    trained = [run for method in (oracle, *methods) for run in method.runs if run.ledger]
    if flags.selector_rows and trained:
        rows = selector_rows(data, split_rows(data, trained[0].seed)[0], flags.selector_rows)
        selectors, spectra, alike = run_selectors(data, pairs, rows, flags.device)
        methods, warnings = methods + selectors, warnings + alike
    methods.append(Method("random order", np.zeros((1, len(pairs))), [], FREE))
    drawn = draw_seed_weights(methods, flags.bootstrap)
    warnings += [line for each in judged for line in at_chance(each, oracle, drawn)]
    fidelities = [judge(each, methods, oracle, drawn) for each in judged]
    # A closed form's one step says nothing of a batch size; connectors alone have no ledger.
    reference = next((r.ledger for r in trained if trained_by_batches(r.ledger)), trained and trained[0].ledger)
    names = unique(name for pair in pairs for name in pair)
    costs = {}
    for method in methods:
        if not method.runs:
            costs[method.name] = cost_of_selector(method.cost, data, names, len(pairs))
        elif method.trained:
            costs[method.name] = cost_of_runs(method.runs, data, names, reference)
        else:
            costs[method.name] = Cost()
    chosen = best_pairs(primary.orders.mean(0) if primary.trained else true_scores(judged[0], oracle))[0]
    found = Findings(pairs, methods, oracle, primary, chosen, judged, drawn, fidelities, costs, spectra, warnings)

    sentence = advise(found)
    body, shown = compose(found, tasks, sentence, flags.bootstrap)
    lines = method_rows(found)
    about = {"answer": sentence, "warnings": warnings, "oracle": oracle.name, "results": results, "methods": lines}
    about |= {"runs": {str(run.folder): run.config for run in runs}, "made": provenance(flags.device)}
    tables = {"ranking.csv": ranking_rows(found), "selectors.csv": lines, "gallery.csv": shown}
    write_report(flags.out, f"Stitch {':'.join(pairs[chosen])}", body, tables, about)

    print_table(found)
    for line in warnings:
        print(f"warning: {line}")
    print(f"\n{sentence}")
    print(f"connector: {primary.runs[0].connector(*pairs[chosen])}\nreport: {flags.out / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
