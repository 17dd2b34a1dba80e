"""Every run's connectors scored on every task, and which task leads: what ways of choosing are compared by.

S seeds of a method, P pairs, U units of a task: its pictures or its questions.
"""

import numpy as np
from tqdm import tqdm

import vlm
from hyma.embeddings import unique
from hyma.files import sha256_file
from hyma.metrics import TaskScores, resample
from hyma.task_inputs import image_inputs, text_inputs
from hyma.tasks import KINDS, score
from vlm import BadInput


def score_runs(tasks, methods, pairs, data, flags):
    """([TaskScores] of the tasks, a record with CLIP_benchmark's keys for each connector on each task).

    methods: [SelectionMethod] that have runs. data: the embedding folder of the runs. flags: `weights`, {encoder: folder},
    `device`, and `bootstrap`, how many resamples.
    """
    task_scores = []
    records = []
    total = len(tasks) * len(runs_of(methods)) * len(pairs)
    with tqdm(total=total, desc="score", unit="connector") as progress:
        for task in tasks:
            units = {}  # method -> [S, P, U], whose mean over U is a score
            for method in methods:
                of_seeds = []
                for run in method.runs:
                    of_pairs = []
                    for pair in pairs:
                        result = score_connector(task, run, *pair, data, flags)
                        of_pairs.append(result.units.double().numpy())  # [U]
                        records.append(benchmark_record(task, method, run, pair, result))
                        progress.update()
                    of_seeds.append(of_pairs)
                units[method.name] = np.array(of_seeds)
            task_scores.append(summarise(task, units, flags.bootstrap))
    return task_scores, records


def runs_of(methods):
    """The runs of all methods, one after the other."""
    runs = []
    for method in methods:
        runs += method.runs
    return runs


def score_connector(task, run, image, text, data, flags):
    """The Score of a run's connector of a pair. Raises BadInput that names the connector if its outputs are unusable."""
    texts = text_inputs(task, text, flags.weights, flags.device, data)
    images = image_inputs(task, image, data)
    connector = load_connector(run, image, text, data).to(flags.device)
    try:
        return score(task, texts, images, connector)
    except BadInput as error:
        raise BadInput(f"{run.connector(image, text)}: {error}") from None


def load_connector(run, image, text, data):
    """A run's connector of a pair, [B, D_t] -> [B, D_i], on the CPU. data: the embedding folder, whose widths it must have.

    Raises BadInput, as `vlm.read_connector` does.
    """
    return vlm.load_connector(run.connector(image, text), data.encoders[image].dim, data.encoders[text].dim)


def benchmark_record(task, method, run, pair, result):
    """A connector's scores on a task, with CLIP_benchmark's keys and some of ours. result: a Score."""
    image, text = pair
    path = run.connector(image, text)
    return {
        "dataset": task.name,
        "model": path.stem,
        "pretrained": str(run.folder),
        "task": KINDS[task.kind].benchmark_name,
        "metrics": result.metrics,
        "image": image,
        "text": text,
        "method": method.name,
        "seed": run.seed,
        "connector_sha256": sha256_file(path),  # by which `save_pretrained` finds the scores of what it shares
        "protocol": task.protocol,
    }


def summarise(task, units, resamples):
    """The TaskScores of a task. units: {method: [S, P, U]}, whose mean over U is a score, 0 to 1."""
    scores = {}
    count = 0  # U, the same for all methods
    for method, values in units.items():
        scores[method] = values.mean(-1).round(9)  # [S, P]
        count = values.shape[-1]
    return TaskScores(
        name=f"{task.name} {task.kind}",
        kind=task.kind,
        protocol=task.protocol,
        counted=f"{count} {KINDS[task.kind].units}",
        chance=task.chance,
        scores=scores,
        resampled=resample(units, resamples, task.name),
    )


# ------------------------------------------------------------------------------------------------ which task leads


def headline_first(task_scores):
    """The TaskScores, those of the headline's kind first: retrieval, which connectors are trained for, or else zeroshot,
    or vqa. Several of that kind are led by their mean; other kinds have no weight in it, so that labels, which make two
    tasks, never count twice."""
    by_kind = {kind: [] for kind in KINDS}  # in the order of KINDS
    for task in task_scores:
        by_kind[task.kind].append(task)
    leading = next(filter(None, by_kind.values()))
    others = [task for task in task_scores if task.kind != leading[0].kind]
    means = [mean_of_tasks(leading)] if len(leading) > 1 else []
    return means + leading + others


def mean_of_tasks(tasks):
    """The TaskScores of the mean of several tasks of a kind, which all weigh the same."""
    names = []
    counted = []
    chances = []
    scores = {}  # method -> [S, P] of each task
    resampled = {}  # method -> [S, R, P] of each task
    for task in tasks:
        names.append(task.name)
        counted.append(task.counted)
        chances.append(task.chance)
        for method in task.scores:
            scores.setdefault(method, []).append(task.scores[method])
            resampled.setdefault(method, []).append(task.resampled[method])
    return TaskScores(
        name=f"the mean of {' and '.join(unique(names))}",
        kind=tasks[0].kind,
        protocol="each task's own, below",
        counted=" and ".join(unique(counted)),
        chance=sum(chances) / len(tasks),
        scores=mean_by_method(scores),
        resampled=mean_by_method(resampled),
    )


def mean_by_method(arrays):
    """{method: mean of its arrays}. arrays: {method: an array of each task}."""
    means = {}
    for method, of_tasks in arrays.items():
        means[method] = np.mean(of_tasks, axis=0).round(9)
    return means
