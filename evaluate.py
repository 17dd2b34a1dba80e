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

if __name__ == "__main__":
    from hyma import before_main  # noqa: F401  what a signal does while torch is imported

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import vlm
from hyma.answer import answer, print_tables
from hyma.costs import NO_COST, Cost, cost_of_runs, cost_of_selector, count_different, trained_by_batches
from hyma.embeddings import Embeddings, check_trained_on, unique
from hyma.evaluation import EvaluationResult, evaluate_methods
from hyma.files import run_script
from hyma.gallery import make_gallery
from hyma.machine import provenance
from hyma.merging import as_folders, open_embeddings
from hyma.methods import SelectionMethod, choose_oracle, group_runs
from hyma.metrics import INTERVAL, best_pairs, bootstrap_scores, draw_seed_weights, true_scores
from hyma.pair_names import choose_pairs, pair_name
from hyma.records import check_report_folder
from hyma.report import save_report
from hyma.runs import check_same_split, is_finished, is_run, newest_finished_run, read_run, with_seed
from hyma.scoring import headline_first, load_connector, runs_of, score_runs
from hyma.selectors import LEAST_ROWS, run_selectors, selector_rows
from hyma.splits import split_rows
from hyma.task_inputs import prepare_inputs
from hyma.tasks import open_tasks
from hyma.weights import OtherWeights, check_names, named_paths
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
    about = "the runs' embedding folder, where it has moved; repeatable, for several of equal rows"
    add("--data", action="append", type=Path, metavar="FOLDER", help=about)
    about = "where the gallery's pictures lie (default: where the embedding folder's manifest says)"
    add("--pictures", type=Path, metavar="FOLDER", help=about)
    add("--out", type=Path, default=Path("report"), help="folder of the report (default: %(default)s)")
    add("--templates", default="1", help="prompts per class: 1, 80 or a file of lines with {} (default: %(default)s)")
    about = "retrieval counts equal captions apart, as CLIP_benchmark does (default: they are one caption)"
    add("--clip-benchmark-protocol", action="store_true", help=about)
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
    if flags.selector_rows and flags.selector_rows < LEAST_ROWS:
        raise BadInput(f"--selector-rows {flags.selector_rows}: must be at least {LEAST_ROWS}, or 0 for no selectors")
    check_report_folder(flags.out)
    flags.task = named_paths("--task", flags.task, "FOLDER")
    flags.weights = named_paths("--weights", flags.weights, "PATH")
    if flags.demo and (flags.runs or flags.oracle or flags.task or flags.data):
        raise BadInput(
            "--demo: makes its own runs on the sample; RUN, --oracle, --task and --data cannot be used with it"
        )
    flags.device = vlm.pick_device(flags.device)
    return flags


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
        outputs = [with_seed(out, 0), with_seed(out, 1)] if "--seeds" in arguments else [out]
        folders += outputs
        begun = list(filter(is_run, outputs))
        if all(map(is_finished, outputs)):
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
    return list(map(read_run, unique(map(os.path.normpath, folders))))


def trained_runs(runs):
    """The runs that were trained here: connectors alone have no ledger, no data and no seed."""
    return [run for run in runs if run.ledger]


def encoders_of(pairs):
    """The different encoders of pairs, in order of appearance."""
    names = []
    for pair in pairs:
        names += pair
    return unique(names)


def open_data(runs, flags) -> Embeddings:
    """The embeddings that all the runs were trained on. Raises BadInput if they differ or have changed since."""
    trained_on = [run.data for run in trained_runs(runs)]
    if not (flags.data or trained_on or flags.task):
        raise BadInput(
            f"{runs[0].folder}: holds connectors alone; name embeddings to score them on: --task NAME=FOLDER"
        )
    for folder in as_folders(trained_on[0]) if trained_on and not flags.data else []:
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder from here; name the folder of the runs' embeddings: --data FOLDER")
    candidates = [*trained_on, *flags.task.values()]
    data = open_embeddings(flags.data or candidates[0])
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
        check_same_split(str(run.folder), run.config, data)
    return data


def pairs_to_compare(data, runs, oracle_folders):
    """The pairs of the first run that is no oracle. Raises BadInput if another run lacks one."""
    others = [run for run in runs if str(run.folder) not in oracle_folders]
    first = (others or runs)[0]
    all_pairs = choose_pairs(data, ["all"])  # whose order the report has
    pairs = pairs_of_run(all_pairs, first)
    for run in runs:
        own = pairs_of_run(pairs, run)
        if own != pairs:
            missing = next(pair for pair in pairs if pair not in own)
            count = len(pairs) - len(own)
            message = f"{run.folder}: has no {pair_name(missing)} ({count} pairs missing of {len(pairs)})"
            raise BadInput(f"{message}; compare runs of the same pairs")
    return pairs


def pairs_of_run(pairs, run):
    """Those of the pairs that a run has connectors for."""
    return [pair for pair in pairs if pair in run.ranks]


# ------------------------------------------------------------------------------------------------------------ tasks


def open_all_tasks(flags, runs, data):
    """([Task], warnings). Of the folder that the runs were trained on, only rows that no run was trained on."""
    seeds = sorted({run.seed for run in trained_runs(runs)})
    splits = {row.get("split") for row in data.rows or []}
    tasks, warnings = [], []
    for name, folder in (flags.task or {None: data.folders}).items():
        is_own = seeds and set(map(os.path.realpath, as_folders(folder))) == set(map(os.path.realpath, data.folders))
        if is_own and "test" not in splits:
            if len(seeds) > 1 and not any(splits):
                message = f"has no split column, so that seeds {' and '.join(map(str, seeds))} set other rows aside"
                raise BadInput(f"{data.folder}: {message}; name another --task, or give runs of one seed")
            warnings.append(
                f"{data.folder} has no test split: the validation rows that chose the connectors also score them; "
                "name another --task"
            )
        of_folder = open_tasks(name, folder, flags, seeds[0] if is_own else None)
        if not is_own and were_trained_on(runs, of_folder[0].data):
            of_folder, warning = open_seen_tasks(name, folder, flags, of_folder)
            warnings += warning
        tasks += of_folder
        if not is_own:
            warnings += warn_of_seen_pictures(of_folder[0], data, trained_runs(runs))
    return tasks, warnings


def were_trained_on(runs, data):
    """Whether connectors alone, which name no folder, were trained on the embeddings of this one, by their cards."""
    for run in runs:
        for pair in run.ranks if not run.ledger else []:
            digests = vlm.read_card(run.connector(*pair)).get("embeddings_sha256")
            known = digests.items() if isinstance(digests, dict) else ()
            if any(name in data.encoders and data.fingerprint([name])[name] == digest for name, digest in known):
                return True
    return False


def open_seen_tasks(name, folder, flags, of_all):
    """([Task], warnings) of a folder that connectors alone were trained on: its test rows, or all, and a line that says
    so. of_all: the tasks of all rows."""
    data = of_all[0].data
    if "test" in {row.get("split") for row in data.rows or []}:
        return open_tasks(name, folder, flags, run_seed=0), []  # of no run: with test rows the seed decides nothing
    warning = f"{data.folder}: the connectors were trained on rows of it, and it has no test split, so that their scores are too high"
    return of_all, [warning]


def warn_of_seen_pictures(task, data, runs):
    """A warning if another folder's pictures are among those that the runs were trained on, and one if they are among those that
    chose their connectors, by the pictures' digests.

    data: what the runs were trained on. runs: that were trained.
    """
    shown = digests_of(task.data, task.rows)
    seen = {"the runs were trained on": set(), "chose the runs' connectors": set()}
    for run in runs if data.rows and shown else []:
        rows_of_run = split_rows(data, run.seed, run.config["flags"].get("rows"))
        for use, rows in zip(seen, rows_of_run):
            seen[use] |= digests_of(data, rows)
    warnings = []
    for use, pictures in seen.items():
        if count := len(shown & pictures):
            message = f"{count:,} of its {len(shown):,} pictures are among those that {use}"
            warnings.append(f"{task.data.folder}: {message}, so that its scores are higher than those of new pictures")
    return warnings


def digests_of(data, rows):
    """The digests of the pictures of these rows, as far as they are recorded."""
    digests = set()
    for row in rows.tolist() if data.rows else []:
        if data.rows[row].get("image_sha256"):
            digests.add(data.rows[row]["image_sha256"])
    return digests


def check_before_scoring(tasks, methods, pairs, data, flags):
    """(the tasks that can be scored, warnings), after reading everything that scoring takes: a fault ends the report now, not
    after minutes of it.

    A task whose prompts need a text encoder without weights is left out. Raises BadInput if no task is left.
    """
    for method in methods:
        for run in method.runs:
            for pair in pairs:
                load_connector(run, *pair, data)
                if not run.ledger:  # a run's own embeddings are compared with a task's
                    check_card(run.connector(*pair), pair, tasks)
    possible = []
    left_out = {}  # reason -> [names of tasks]
    for task in tasks:
        try:
            prepare_inputs(task, pairs, flags.weights, flags.device, data)
            possible.append(task)
        except (vlm.MissingWeights, OtherWeights) as error:
            left_out.setdefault(str(error), []).append(f"{task.name} {task.kind}")
    if not possible:
        raise BadInput("; ".join(left_out))
    warnings = []
    for reason, names in left_out.items():
        warnings.append(f"left out: {' and '.join(names)}: {reason}")
    return possible, warnings


def check_card(path, pair, tasks):
    """Raises BadInput if a connector was trained on other encoders than the tasks' embeddings are by."""
    for task in tasks:
        for name in pair:
            if name in task.data.encoders:
                check_trained_on(path, name, task.data)


# ------------------------------------------------------------------------------------------- selectors, costs, warnings


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
    ledgers = [run.ledger for run in trained_runs(runs_of([oracle, *methods]))]
    # A closed form has no batch size, so it is the reference only if there is nothing else.
    ledgers.sort(key=trained_by_batches, reverse=True)
    reference = ledgers[0] if ledgers else None
    names = encoders_of(pairs)
    costs = {}
    for method in methods:
        if not method.runs:
            costs[method.name] = cost_of_selector(method.cost, data, names, len(pairs))
        elif method.trained:
            run = method.runs[0]
            rows = torch.cat(split_rows(data, run.seed, run.config["flags"].get("rows")))
            costs[method.name] = cost_of_runs(method.runs, data, names, reference, count_different(data, rows))
        else:
            costs[method.name] = Cost()
    return costs


def warn_of_hidden_costs(methods):
    """A warning for each method whose connectors another run has begun."""
    warnings = []
    for method in methods:
        if method.runs[0].starts_from:
            warnings.append(f"{method.name}: starts from another run's connectors, whose cost is not in its own")
    return warnings


def warn_of_other_pairs(methods, pairs):
    """A warning for each method whose cost is of more pairs than are compared."""
    warnings = []
    for method in methods:
        count = len(method.runs[0].ranks)
        if method.trained and count > len(pairs):
            warnings.append(f"{method.name}: has {count} pairs, of which {len(pairs)} are compared; its cost is that of all {count}")
    return warnings


def draw_selector_rows(data, runs, flags):
    """(training rows of the first run that has any, for the selectors; warnings). None where there are no selectors: connectors
    alone have no training rows, and a run may have too few."""
    trained = trained_runs(runs)
    if not (flags.selector_rows and trained):
        return None, []
    training_rows, _ = split_rows(data, trained[0].seed, trained[0].config["flags"].get("rows"))
    rows = selector_rows(data, training_rows, flags.selector_rows)
    if len(rows) < LEAST_ROWS:
        return None, [f"no selectors: they need {LEAST_ROWS} training pictures, and {trained[0].folder} has {len(rows)}"]
    return rows, []


def choose_pair(primary, oracle, task):
    """The index of the pair to stitch: the first choice of `primary` or, of connectors alone, the truly best on the task."""
    preference = primary.preferences.mean(0) if primary.trained else true_scores(task, oracle)  # [P]
    return best_pairs(preference)[0]


# ------------------------------------------------------------------------------------------------------------- main


def main():
    flags = parse_flags()

    # Runs: every one has the same pairs of the same embeddings.
    folders = run_demo(flags.device) if flags.demo else flags.runs or [newest_finished_run()]
    runs = read_runs([*folders, *flags.oracle])
    oracle_folders = set(map(os.path.normpath, flags.oracle))
    data = open_data(runs, flags)
    pairs = pairs_to_compare(data, runs, oracle_folders)
    methods = group_runs(runs, pairs, oracle_folders)
    oracle, primary, warnings = choose_oracle(methods, oracle_folders)

    of_selectors, of_few = draw_selector_rows(data, runs_of([oracle, *methods]), flags)

    # Tasks: every connector is scored on every one.
    tasks, of_rows = open_all_tasks(flags, runs, data)
    check_names(flags.weights, unique(name for each in (data, *(task.data for task in tasks)) for name in each.encoders))
    tasks, of_weights = check_before_scoring(tasks, methods, pairs, data, flags)
    warnings += of_few + of_rows + of_weights + warn_of_hidden_costs(methods) + warn_of_other_pairs(methods, pairs)
    task_scores, records = score_runs(tasks, methods, pairs, data, flags)
    task_scores = headline_first(task_scores)

    # Selectors, which train nothing.
    selectors, spectra, duplicates = [], {}, []
    if of_selectors is not None:
        selectors, spectra, duplicates = run_selectors(data, pairs, of_selectors, flags.device)
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

    # Records, and the report that is drawn from them.
    gallery = make_gallery(result, tasks, flags.pictures)
    warnings += gallery.warnings
    sentences = answer(result)
    results = {
        "answer": " ".join(sentences),
        "sentences": sentences,
        "warnings": warnings,
        "oracle": oracle.name,
        "results": records,
        "runs": {str(run.folder): run.config for run in runs},
        "made": provenance(flags.device),
    }
    save_report(flags.out, result, gallery, results)

    print_tables(result)
    for line in warnings:
        print(f"warning: {line}")
    if gallery.note:
        print(gallery.note)
    print(f"\n{' '.join(sentences)}")
    print(f"connector: {primary.runs[0].connector(*pairs[result.chosen])}\nreport: {flags.out / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
