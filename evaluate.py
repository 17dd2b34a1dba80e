"""Which encoder pair to stitch, how certain that is, what the search cost: runs and selectors against the true scores.

    python evaluate.py                                             # the newest run, on its data's test rows
    python evaluate.py runs/hyma runs/halving runs/grid-s0 runs/grid-s1        # the full grid's runs are the oracle
    python evaluate.py runs/hyma --oracle runs/grid-s* --task coco=embeddings/coco --task in1k=embeddings/in1k
    python evaluate.py --demo                                      # makes runs of every kind on the sample first

It needs connectors and embeddings only: RUN may be a folder of connectors alone, as published, with --task. The true
score of a pair on a task is the score of the oracle's connector, the mean over the oracle's seeds. Every way of choosing
a pair (a run's ranking.csv, which no test row has seen, or a selector that trains nothing) is measured by its regret: the
true score of the best pair minus that of the pair chosen, in points. Retrieval leads the report, as connectors are trained
for it; other tasks follow. Writes report/: report.html with every figure inside, results.json, ranking.csv, selectors.csv,
and each figure as PNG and CSV.

Pictures and captions of a task come from an embedding folder: `embed.py` makes one of your own data or of a standard
set. Prompts come from its prompts/, or the text encoder adds them there once.
"""

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import vlm
from hyma.answer import answer, print_table
from hyma.costs import NO_COST, Cost, cost_of_runs, cost_of_selector, trained_by_batches
from hyma.embeddings import Embeddings, choose_pairs, split_rows, unique
from hyma.evaluation import EvaluationResult, evaluate_methods
from hyma.files import provenance, run_script
from hyma.gallery import make_gallery
from hyma.methods import SelectionMethod, choose_oracle, group_runs
from hyma.metrics import (
    INTERVAL,
    TaskScores,
    best_pairs,
    bootstrap_scores,
    draw_seed_weights,
    pair_name,
    resample,
    true_scores,
)
from hyma.report import save_report
from hyma.runs import newest_finished_run, read_run
from hyma.selectors import run_selectors, selector_rows
from hyma.tasks import KINDS, WeightsMissing, image_inputs, open_tasks, prepare_inputs, score, text_inputs
from vlm import BadInput

# ------------------------------------------------------------------------------------------------------------ flags


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: the newest in runs/)")
    about = "runs whose connectors have the true scores, one per seed (default: full grids among RUN)"
    add("--oracle", nargs="+", type=Path, default=[], metavar="RUN", help=about)
    about = "an embedding folder to score on; repeatable (default: the runs' own data, its test rows)"
    add("--task", action="append", default=[], metavar="NAME=FOLDER", help=about)
    add("--data", type=Path, metavar="FOLDER", help="the runs' embedding folder, where it has moved")
    about = "where the gallery's pictures lie (default: where the embedding folder's manifest says)"
    add("--pictures", type=Path, metavar="FOLDER", help=about)
    add("--out", type=Path, default=Path("report"), help="folder of the report (default: %(default)s)")
    add("--templates", default="1", help="prompts per class: 1, 80 or a file of lines with {} (default: %(default)s)")
    add(
        "--weights",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="a text encoder's folder, instead of the hub's files",
    )
    add("--bootstrap", type=int, default=1000, help="resamples behind every interval (default: %(default)s)")
    about = "training rows that selectors use; 0: no selectors (default: %(default)s)"
    add("--selector-rows", type=int, default=2000, help=about)
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: the GPU if there is one)")
    add("--demo", action="store_true", help="make runs/demo-* on the sample, those not there yet, and report on them")
    flags = parser.parse_args()
    if flags.bootstrap < 1:
        raise BadInput(f"--bootstrap {flags.bootstrap}: must be at least 1; 1000 gives steady intervals")
    if flags.selector_rows and flags.selector_rows < 50:
        raise BadInput(f"--selector-rows {flags.selector_rows}: must be at least 50, or 0 for no selectors")
    flags.task = named_paths("--task", flags.task, "FOLDER")
    flags.weights = named_paths("--weights", flags.weights, "PATH")
    if flags.demo and (flags.runs or flags.oracle or flags.task or flags.data):
        raise BadInput(
            "--demo: makes its own runs on the sample; RUN, --oracle, --task and --data cannot be used with it"
        )
    flags.device = vlm.pick_device(flags.device)
    return flags


def named_paths(flag, items, value):
    """{name: path} of a flag's NAME=PATH items. value: the word for the path in the flag's help."""
    paths = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise BadInput(f"{flag} {name}: expected NAME={value}")
        if name in paths:
            raise BadInput(f"{flag}: a name is given twice")
        paths[name] = path
    return paths


# ------------------------------------------------------------------------------------------------------------- runs

DEMO = {
    "demo-hyma": ["train_hyma.py", "--pairs", "all"],
    "demo-halving": ["train_grid.py", "--halving"],
    "demo-ridge": ["train_grid.py", "--closed-form", "ridge"],
    "demo-grid": ["train_grid.py", "--seeds", "0", "1"],
}


def run_demo(device):
    """The demo's run folders on the sample; finished ones are used as they are, others are made or resumed."""
    folders = []
    for name, (script, *arguments) in DEMO.items():
        out = Path("runs") / name
        outputs = [Path(f"{out}-s0"), Path(f"{out}-s1")] if "--seeds" in arguments else [out]
        folders += outputs
        begun = sum((folder / "config.json").is_file() for folder in outputs)
        finished = sum((folder / "ledger.json").is_file() for folder in outputs)
        if finished == len(outputs):
            continue
        command = [sys.executable, str(Path(__file__).parent / script), "--out", str(out)]
        command += ["--resume"] if begun else [*arguments, "--device", str(device)]
        print(f"demo: {script} {' '.join(command[2:])}", flush=True)
        code = subprocess.run(command).returncode
        if code:
            raise BadInput(f"--demo: {script} ended with status {code}; its message is above")
    return folders


def read_runs(folders):
    """The Runs of the folders, each once however it is spelt."""
    return [read_run(folder) for folder in unique(map(os.path.normpath, folders))]


def encoders_of(pairs):
    """The different encoders of pairs, in order of appearance."""
    return unique(itertools.chain.from_iterable(pairs))


def open_embeddings(runs, flags) -> Embeddings:
    """The embeddings that all the runs were trained on. Raises BadInput if they differ or have changed since."""
    trained_on = [run.data for run in runs if run.ledger]
    if not (flags.data or trained_on or flags.task):
        raise BadInput(
            f"{runs[0].folder}: holds connectors alone; name embeddings to score them on: --task NAME=FOLDER"
        )
    if trained_on and not flags.data and not Path(trained_on[0]).is_dir():
        raise BadInput(
            f"{trained_on[0]}: no such folder from here; name the folder of the runs' embeddings: --data FOLDER"
        )
    candidates = [*trained_on, *flags.task.values()]
    data = Embeddings(flags.data or candidates[0])
    digests = {}  # encoder -> sha256 of its file, by the first run that has it
    for run in runs:
        for name in encoders_of(run.ranks):
            digest = run.embeddings.get(name)  # None of connectors alone
            if digest and digests.setdefault(name, digest) != digest:
                message = f"was trained on another {name}.pt than the runs before it; compare runs of one"
                raise BadInput(f"{run.folder}: {message}")
            if name not in data.encoders:
                raise BadInput(f"{data.folder}: has no {name}, which {run.folder} is for; name the folder: --data")
            if digest and data.fingerprint([name])[name] != digest:
                message = f"is not what {run.folder} was trained on (sha256); train again"
                raise BadInput(f"{data.folder}/{name}.pt: {message}")
    return data


def pairs_to_compare(data, runs, oracle_folders):
    """The pairs of the first run that is no oracle. Raises BadInput if another run lacks one."""
    first = next((run for run in runs if str(run.folder) not in oracle_folders), runs[0])
    pairs = [pair for pair in choose_pairs(data, ["all"]) if pair in first.ranks]
    for run in runs:
        missing = [pair for pair in pairs if pair not in run.ranks]
        if missing:
            message = f"{run.folder}: has no {pair_name(missing[0])} ({len(missing)} pairs missing of {len(pairs)})"
            raise BadInput(f"{message}; compare runs of the same pairs")
    return pairs


# ------------------------------------------------------------------------------------------------------------ tasks


def open_all_tasks(flags, runs, data):
    """([Task], warnings). Of the folder that the runs were trained on, only rows that no run was trained on."""
    seeds = sorted({run.seed for run in runs if run.ledger})
    splits = [row.get("split") for row in data.rows or []]
    tasks, warnings = [], []
    for name, folder in (flags.task or {None: data.folder}).items():
        is_own = seeds and os.path.realpath(folder) == os.path.realpath(data.folder)
        if is_own and "test" not in splits:
            if len(seeds) > 1 and not any(splits):
                message = f"has no split column, so that seeds {' and '.join(map(str, seeds))} set other rows aside"
                raise BadInput(f"{data.folder}: {message}; name another --task, or give runs of one seed")
            warnings.append(
                f"{data.folder} has no test split: the validation rows that chose the connectors also score them; "
                "name another --task"
            )
        tasks += open_tasks(name, folder, flags, seeds[0] if is_own else None)
    return tasks, warnings


def check_before_scoring(tasks, methods, pairs, data, flags):
    """(the tasks that can be scored, warnings), after reading everything that scoring takes: a fault ends the report now, not
    after minutes of it.

    A task whose prompts need a text encoder without weights is left out. Raises BadInput if no task is left.
    """
    for method in methods:
        for run in method.runs:
            for pair in pairs:
                load_connector(run, *pair, data)
    possible, left_out = [], {}
    for task in tasks:
        try:
            prepare_inputs(task, pairs, flags.weights, flags.device, data)
            possible.append(task)
        except WeightsMissing as error:
            left_out.setdefault(str(error), []).append(f"{task.name} {task.kind}")
    if not possible:
        raise BadInput("; ".join(left_out))
    warnings = [f"left out: {' and '.join(names)}: {reason}" for reason, names in left_out.items()]
    return possible, warnings


def load_connector(run, image, text, data):
    """A run's connector of a pair, on the CPU."""
    return vlm.load_connector(run.connector(image, text), data.encoders[image].dim, data.encoders[text].dim)


# ----------------------------------------------------------------------------------------------------------- scores


def score_runs(tasks, methods, pairs, data, flags):
    """([TaskScores] of the tasks, a record with CLIP_benchmark's keys for each connector on each task)."""
    runs = [(method, run) for method in methods for run in method.runs]
    task_scores, records = [], []
    with tqdm(total=len(tasks) * len(runs) * len(pairs), desc="score", unit="connector") as progress:
        for task in tasks:
            kind = KINDS[task.kind]
            units = {method.name: [] for method in methods}  # method -> [[P, U]] of its seeds
            for method, run in runs:
                units_of_run = []
                for image, text in pairs:
                    result = score_connector(task, run, image, text, data, flags)
                    units_of_run.append(result.units.double().numpy())
                    record = {
                        "dataset": task.name,
                        "model": run.connector(image, text).stem,
                        "pretrained": str(run.folder),
                        "task": kind.benchmark_name,
                        "metrics": result.metrics,
                        "image": image,
                        "text": text,
                        "method": method.name,
                        "seed": run.seed,
                        "protocol": task.protocol,
                    }
                    records.append(record)
                    progress.update()
                units[method.name].append(units_of_run)
            task_scores.append(summarise(task, kind, units, flags.bootstrap))
    return task_scores, records


def score_connector(task, run, image, text, data, flags):
    """The Score of a run's connector of a pair. Raises BadInput that names the connector if its outputs are unusable."""
    texts = text_inputs(task, text, flags.weights, flags.device, data)
    images = image_inputs(task, image, data)
    connector = load_connector(run, image, text, data).to(flags.device)
    try:
        return score(task, texts, images, connector)
    except BadInput as error:
        raise BadInput(f"{run.connector(image, text)}: {error}") from None


def summarise(task, kind, units, resamples):
    """The TaskScores of a task. units: {method: [S, P, U]}, whose mean over U is a score."""
    scores = {}
    for method, values in units.items():
        units[method] = np.array(values)
        scores[method] = units[method].mean(-1).round(9)
    count = next(iter(units.values())).shape[-1]
    return TaskScores(
        name=f"{task.name} {task.kind}",
        kind=task.kind,
        protocol=task.protocol,
        counted=f"{count} {kind.units}",
        chance=task.chance,
        scores=scores,
        resampled=resample(units, resamples, task.name),
    )


def headline_first(task_scores):
    """The TaskScores, those of the headline's kind first: retrieval, which connectors are trained for, or else zeroshot,
    or vqa. Several of that kind are led by their mean; other kinds have no weight in it, so that labels, which make two
    tasks, never count twice."""
    kinds = [task.kind for task in task_scores]
    kind = next(kind for kind in KINDS if kind in kinds)
    leading = [task for task in task_scores if task.kind == kind]
    others = [task for task in task_scores if task.kind != kind]
    if len(leading) == 1:
        return leading + others
    mean = TaskScores(
        name=f"the mean of {' and '.join(unique(task.name for task in leading))}",
        kind=kind,
        protocol="each task's own, below",
        counted=" and ".join(unique(task.counted for task in leading)),
        chance=sum(task.chance for task in leading) / len(leading),
        scores=mean_by_method([task.scores for task in leading]),
        resampled=mean_by_method([task.resampled for task in leading]),
    )
    return [mean, *leading, *others]


def mean_by_method(arrays):
    """{method: mean of its arrays}. arrays: [{method: array}] of the tasks."""
    means = {}
    for method in arrays[0]:
        means[method] = np.mean([each[method] for each in arrays], axis=0).round(9)
    return means


def warn_at_chance(task, oracle, seed_weights):
    """[a warning] if the mean score of all pairs is no better than guessing, else []."""
    means = bootstrap_scores(task, oracle, seed_weights).mean(1)  # [R]
    low, high = np.percentile(means, INTERVAL)
    if low > task.chance:
        return []
    message = f"the pairs score {low:.1%} to {high:.1%} on average, where guessing scores {task.chance:.1%}"
    return [f"{task.name}: {message}; do captions and pictures belong together?"]


def costs_of(methods, oracle, pairs, data):
    """{method: Cost}, at the batch size and updates of the oracle for comparison, or else of the first run that has them."""
    ledgers = [run.ledger for method in (oracle, *methods) for run in method.runs if run.ledger]
    # A closed form has no batch size, so it is the reference only if there is nothing else.
    by_batches = list(filter(trained_by_batches, ledgers))
    reference = next(iter(by_batches or ledgers), None)
    names = encoders_of(pairs)
    costs = {}
    for method in methods:
        if not method.runs:
            costs[method.name] = cost_of_selector(method.cost, data, names, len(pairs))
        elif method.trained:
            costs[method.name] = cost_of_runs(method.runs, data, names, reference)
        else:
            costs[method.name] = Cost()
    return costs


# ------------------------------------------------------------------------------------------------------------- main


def warn_of_hidden_costs(methods):
    """A warning for each method whose connectors another run has begun."""
    words = "starts from another run's connectors, whose cost is not in its own"
    return [f"{method.name}: {words}" for method in methods if method.runs[0].starts_from]


def open_selectors(data, pairs, runs, flags):
    """What `run_selectors` returns, on training rows of the first run that has any: connectors alone have none."""
    trained = [run for run in runs if run.ledger]
    if not (flags.selector_rows and trained):
        return [], {}, []
    training_rows, _ = split_rows(data, trained[0].seed)
    rows = selector_rows(data, training_rows, flags.selector_rows)
    return run_selectors(data, pairs, rows, flags.device)


def choose_pair(primary, oracle, task):
    """The index of the pair to stitch: the first choice of `primary` or, of connectors alone, the truly best on the task."""
    preference = primary.preferences.mean(0) if primary.trained else true_scores(task, oracle)  # [P]
    return best_pairs(preference)[0]


def main():
    flags = parse_flags()

    # Runs: every one has the same pairs of the same embeddings.
    folders = run_demo(flags.device) if flags.demo else flags.runs or [newest_finished_run()]
    runs = read_runs([*folders, *flags.oracle])
    oracle_folders = set(map(os.path.normpath, flags.oracle))
    data = open_embeddings(runs, flags)
    pairs = pairs_to_compare(data, runs, oracle_folders)
    methods = group_runs(runs, pairs, oracle_folders)
    oracle, primary, warnings = choose_oracle(methods, oracle_folders)

    # Tasks: every connector is scored on every one.
    tasks, of_rows = open_all_tasks(flags, runs, data)
    tasks, of_weights = check_before_scoring(tasks, methods, pairs, data, flags)
    warnings += of_rows + of_weights + warn_of_hidden_costs(methods)
    task_scores, records = score_runs(tasks, methods, pairs, data, flags)
    task_scores = headline_first(task_scores)

    # Selectors, which train nothing.
    runs_oracle_first = [run for method in (oracle, *methods) for run in method.runs]
    selectors, spectra, duplicates = open_selectors(data, pairs, runs_oracle_first, flags)
    random_order = SelectionMethod("random order", np.zeros((1, len(pairs))), [], NO_COST)
    methods += [*selectors, random_order]
    warnings += duplicates

    # Every method against the true scores.
    seed_weights = draw_seed_weights(methods, flags.bootstrap)
    for task in task_scores:
        warnings += warn_at_chance(task, oracle, seed_weights)
    result = EvaluationResult(
        pairs=pairs,
        methods=methods,
        oracle=oracle,
        primary=primary,
        chosen=choose_pair(primary, oracle, task_scores[0]),
        tasks=task_scores,
        resamples=flags.bootstrap,
        seed_weights=seed_weights,
        method_results=[evaluate_methods(task, methods, oracle, seed_weights) for task in task_scores],
        costs=costs_of(methods, oracle, pairs, data),
        spectra=spectra,
        warnings=warnings,
    )

    gallery = make_gallery(result, tasks, flags.pictures)
    warnings += gallery.warnings

    # Records, and the report that is drawn from them.
    sentence = answer(result)
    results = {
        "answer": sentence,
        "warnings": warnings,
        "oracle": oracle.name,
        "results": records,
        "runs": {str(run.folder): run.config for run in runs},
        "made": provenance(flags.device),
    }
    save_report(flags.out, result, gallery, results)

    print_table(result)
    for line in warnings:
        print(f"warning: {line}")
    if gallery.note:
        print(gallery.note)
    print(f"\n{sentence}")
    print(f"connector: {primary.runs[0].connector(*pairs[result.chosen])}\nreport: {flags.out / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
