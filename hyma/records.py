"""The records of a report: the result of an evaluation as tables and a JSON file, from which the report is drawn.

    report/results.json    the answer, every connector's scores, every method's, and all that the page shows besides tables
           ranking.csv     a row for each task and pair, truly best first
           selectors.csv   a row for each task and method
           <figure>.csv    the data of a figure
           gallery.csv, thumbnails/    captions and the pictures that two pairs retrieve for them

`hyma.report` draws figures and page from these files alone. A figure's data is one function here, called in
`list_figures`; its drawing is one function in `hyma.report`.
"""

import io
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata

import vlm
from hyma.costs import cost_ratio
from hyma.embeddings import unique
from hyma.files import atomic_file, read_jsonl, remove_leftovers, write_csv, write_json
from hyma.metrics import INTERVAL, METRICS, best_pairs, bootstrap_scores, fidelity, mean_recalls, pair_name, true_scores
from hyma.selectors import SelectionMethod
from hyma.tasks import KINDS, image_inputs, text_inputs


class Estimate(NamedTuple):
    """One metric of a method's preference: its mean over the seeds, and what to compare that with."""

    value: float
    low: float  # 95 % bootstrap interval, over rows and seeds
    high: float
    random: float  # what a random order has


class OwnConnectors(NamedTuple):
    """How good a run's own connectors are compared with the oracle's, in points, the mean over its seeds. None of a selector."""

    own_score: float | None = None  # of the pair that it chose
    gap_all: float | None = None  # own score minus the oracle's, mean of all pairs
    gap_top_third: float | None = None  # mean of the truly best third


class MethodResult(NamedTuple):
    """How well a method chooses on a task."""

    task: str
    method: str
    kind: str  # "run" or "selector"
    seeds: int  # 0 of a selector
    chosen: list  # indices of the pairs that it ranks first, of every seed
    fidelity: dict  # metric, a key of METRICS -> Estimate
    own: OwnConnectors


class EvaluationResult(NamedTuple):
    """All that a report is made from. P pairs."""

    pairs: list  # [P] (image, text)
    methods: list  # of SelectionMethod
    oracle: SelectionMethod  # whose connectors have the true scores
    primary: SelectionMethod  # whose choice is the answer
    chosen: int  # the index of that pair
    tasks: list  # of TaskScores, the headline's first
    resamples: int  # R
    seed_weights: dict  # method -> [R, S] weights of its seeds in each resample
    method_results: list  # for each of `tasks`, [MethodResult] of the methods
    costs: dict  # method -> Cost
    spectra: dict  # (image, text) -> canonical correlations, largest first; empty without selectors
    warnings: list  # lines

    @property
    def headline(self):
        """The TaskScores that the answer is about."""
        return self.tasks[0]

    def pair_name(self, k):
        return pair_name(self.pairs[k])

    def true_scores(self, task):
        """[P], 0 to 1."""
        return true_scores(task, self.oracle)

    def bootstrap_scores(self, task):
        """[R, P], 0 to 1."""
        return bootstrap_scores(task, self.oracle, self.seed_weights)


class FigureData(NamedTuple):
    """What a figure shows."""

    name: str  # of its files: <name>.csv, <name>.png
    kind: str  # how it is drawn: a key of `hyma.report.DRAW`
    task: str | None  # that it belongs to, None for a figure of the runs
    rows: list  # of its CSV: dicts
    details: dict = {}  # what else its drawing needs
    further_tables: dict = {}  # {file name: rows}


def write_records(folder, result, gallery, results):
    """Writes all records. What an earlier report left under a name of its own is deleted.

    gallery: the Gallery. results: what results.json holds besides the page's own part.
    """
    figures = list_figures(result)
    tables = {"ranking.csv": ranking_rows(result), "selectors.csv": method_rows(result), "gallery.csv": gallery.rows}
    for figure in figures:
        tables |= {f"{figure.name}.csv": figure.rows} | figure.further_tables
    tables = {name: rows for name, rows in tables.items() if rows}
    images = [f"{figure.name}.png" for figure in figures]
    files = ["report.html", "results.json", *images, *tables, *gallery.thumbnails]

    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    delete_stale(folder, files)
    for name, rows in tables.items():
        write_csv(folder / name, rows)
    if gallery.thumbnails:
        (folder / "thumbnails").mkdir(exist_ok=True)
    for name, jpeg in gallery.thumbnails.items():
        with atomic_file(folder / name) as file:
            file.write(jpeg)
    page = page_facts(result, figures, gallery)
    write_json(folder / "results.json", {"files": files} | results | {"page": page})


def delete_stale(folder, files):
    """Deletes what an earlier report wrote and this one will not: only names that a report gives, so that its results.json
    cannot name anything else."""
    results = folder / "results.json"
    earlier = vlm.read_json(results).get("files", []) if results.is_file() else []
    for name in set(earlier) - set(files):
        if re.fullmatch(r"[\w-]+\.(png|csv)|thumbnails/\d+\.jpg", name):
            (folder / name).unlink(missing_ok=True)
    thumbnails = folder / "thumbnails"
    if thumbnails.is_dir() and not any(thumbnails.iterdir()):
        thumbnails.rmdir()


def page_facts(result, figures, gallery):
    """What the page shows and no table has: the "page" of results.json."""
    base = result.costs[result.oracle.name]
    ratios = {}
    for name, cost in result.costs.items():
        ratios[name] = {
            "flops_equal_batch": cost_ratio(cost, base, "flops_equal_batch"),
            "flops_with_embedding": cost_ratio(cost, base, "flops_with_embedding"),
        }
    tasks = []
    for task in result.tasks:
        facts = {
            "name": task.name,
            "kind": task.kind,
            "headline": KINDS[task.kind].headline,
            "counted": task.counted,
            "protocol": task.protocol,
            "chance": task.chance,
        }
        tasks.append(facts)
    chosen = result.pairs[result.chosen]
    return {
        "chosen": list(chosen),
        "connector": str(result.primary.runs[0].connector(*chosen)),
        "oracle_seeds": len(result.oracle.runs),
        "resamples": result.resamples,
        "metrics": METRICS,
        "tasks": tasks,
        "times_oracle": ratios,  # a method's FLOPs in those of the oracle
        "figures": [figure_facts(figure) for figure in figures],
        "gallery": gallery.facts,
    }


def figure_facts(figure):
    tables = [f"{figure.name}.csv", *figure.further_tables]
    return {"name": figure.name, "kind": figure.kind, "task": figure.task, "tables": tables} | figure.details


# ----------------------------------------------------------------------------------------------------------- tables


def ranking_rows(result):
    """ranking.csv: a row for each task and pair, truly best first: true score in points, its interval, every method's rank, and
    the score of every run's own connector."""
    rows = []
    ranks = {f"rank by {method.name}": rankdata(-method.preferences.mean(0)) for method in result.methods}
    for task in result.tasks:
        truth = 100 * result.true_scores(task)  # [P]
        resampled = 100 * result.bootstrap_scores(task)  # [R, P]
        low, high = np.percentile(resampled, INTERVAL, axis=0)
        scores = {f"score of {name}": 100 * values.mean(0) for name, values in task.scores.items()}
        values = {"true_rank": rankdata(-truth), "true_score": truth, "low": low, "high": high} | ranks | scores
        for k in best_first(truth):
            image, text = result.pairs[k]
            row = {"task": task.name, "image": image, "text": text}
            rows.append(row | {name: round(each[k], 3) for name, each in values.items()})
    return rows


def best_first(truth):
    """The indices of the pairs, truly best first. truth: [P]."""
    return np.argsort(-truth, kind="stable").tolist()


def method_rows(result):
    """selectors.csv: a row for each task and method, runs and selectors alike, with every metric and cost."""
    rows = []
    for method_results in result.method_results:
        for each in method_results:
            row = {
                "task": each.task,
                "method": each.method,
                "kind": each.kind,
                "seeds": each.seeds,
                "chosen": " ".join(map(result.pair_name, each.chosen)),
            }
            for metric, estimate in each.fidelity.items():
                row[metric] = estimate.value
                row[f"{metric}_low"] = estimate.low
                row[f"{metric}_high"] = estimate.high
                row[f"{metric}_random"] = estimate.random
            row |= each.own._asdict() | result.costs[each.method]._asdict()
            rows.append({key: rounded(value) for key, value in row.items()})
    return rows


def rounded(value):
    """A float, numpy's too, to six decimals; any other value as it is."""
    return round(float(value), 6) if isinstance(value, float) else value


# ---------------------------------------------------------------------------------------------------------- figures


def list_figures(result):
    """The FigureData of every figure that has something to show, in the page's order."""
    runs = [method for method in result.methods if method.runs and method is not result.oracle]
    figures = []
    for place, (task, method_results) in enumerate(zip(result.tasks, result.method_results)):
        figures.append(cost_against_regret(result, method_results, f"cost-regret-{place}"))
        if place == 0:
            figures.append(rank_scatter(result, task, f"ranks-{place}"))
        compared = (runs or [result.oracle]) if place == 0 else [result.primary]
        for k, method in enumerate(compared):
            figures.append(heatmap(result, task, method, f"heatmap-{place}-{k}"))
    figures += [ranking_over_epochs(result), loss_curves(result), correlation_spectra(result)]
    return [figure for figure in figures if figure.rows]


def cost_against_regret(result, method_results, name):
    """Regret with its interval, and FLOPs. Of connectors alone these are not known; nothing shows where none has any."""
    rows = []
    for each in method_results:
        cost, regret = result.costs[each.method], each.fidelity["regret"]
        if cost.flops is None:
            continue
        row = {
            "task": each.task,
            "method": each.method,
            "kind": each.kind,
            "regret": regret.value,
            "regret_low": regret.low,
            "regret_high": regret.high,
            "regret_random": regret.random,
            "flops": cost.flops,
            "flops_with_embedding": cost.flops_with_embedding,
        }
        rows.append(row)
    if not any(row["flops"] for row in rows):
        rows = []
    return FigureData(name, "cost-regret", method_results[0].task, rows)


def rank_scatter(result, task, name):
    """The true rank of every pair, and its rank by every method that does not tie them all."""
    truth = rankdata(-result.true_scores(task))
    rows = []
    for method in result.methods:
        if not np.ptp(method.preferences):
            continue
        for (image, text), true, rank in zip(result.pairs, truth, rankdata(-method.preferences.mean(0))):
            rows.append({"method": method.name, "image": image, "text": text, "true_rank": true, "rank": rank})
    return FigureData(name, "ranks", task.name, rows)


def heatmap(result, task, method, name):
    """The scores of a run's own connectors and of the oracle's, in points."""
    truth = 100 * task.scores[result.oracle.name].mean(0)  # [P]
    own = 100 * task.scores[method.name].mean(0)  # [P]
    values = {"oracle": truth, "run": own, "difference": own - truth}
    rows = []
    for k, (image, text) in enumerate(result.pairs):
        row = {"image": image, "text": text}
        rows.append(row | {name: each[k].round(3).item() for name, each in values.items()})
    best = [list(result.pairs[k]) for k in best_pairs(truth.round(7))]
    chosen = [list(result.pairs[k]) for k in best_pairs(method.preferences.mean(0))]
    return FigureData(name, "heatmap", task.name, rows, {"method": method.name, "best": best, "chosen": chosen})


def ranking_over_epochs(result):
    """The rank of every pair at each validation of a run's first seed, and the regret of the pair that is first there, in
    points."""
    truth = result.true_scores(result.headline)[None]  # [1, P]
    ranking, regrets = [], []
    for method, validations in validations_of(result).items():
        for validation in validations:
            columns = {"method": method, "epoch": validation["epoch"]}
            recall10 = validation_recall10(result, validation)
            ranks = rankdata([-recall for recall in recall10.values()])
            ranking += [columns | {"pair": pair, "rank": rank} for pair, rank in zip(recall10, ranks)]
            # A pair that successive halving has dropped comes last.
            preference = np.array([recall10.get(pair_name(pair), -1.0) for pair in result.pairs])
            regrets.append(columns | {"regret": fidelity(truth, preference)["regret"][0]})
    name = "ranking-over-epochs"
    return FigureData(name, name, None, ranking, further_tables={"regret-over-epochs.csv": regrets})


def validations_of(result):
    """{method: the lines of metrics.jsonl of its first seed}, of methods that were validated more than once."""
    validations = {}
    for method in result.methods:
        if method.trained:
            lines = read_jsonl(method.runs[0].folder / "metrics.jsonl")
            if len(lines) > 1:  # a closed form has one
                validations[method.name] = lines
    return validations


def validation_recall10(result, validation):
    """{pair: R@10, the mean of both directions} of the pairs that were validated."""
    names = {pair_name(pair) for pair in result.pairs}
    return {pair: mean_recalls(six)[2] for pair, six in validation["recalls"].items() if pair in names}


def loss_curves(result):
    """Loss and validation recall of every run at each validation; a closed form has no loss."""
    rows = []
    for method in result.methods:
        for run in method.runs if method.trained else []:
            columns = {"method": method.name, "seed": run.seed, "run": str(run.folder)}
            for line in read_jsonl(run.folder / "metrics.jsonl"):
                rows.append(columns | {key: line.get(key) for key in ("epoch", "loss", "val_recall10", "seconds")})
    return FigureData("loss", "loss", None, rows)


def correlation_spectra(result):
    """The canonical correlations of every pair, largest first."""
    rows = []
    for pair, correlations in result.spectra.items():
        for place, correlation in enumerate(correlations, 1):
            rows.append({"pair": pair_name(pair), "place": place, "correlation": correlation})
    return FigureData("canonical-correlations", "canonical-correlations", None, rows)


# ---------------------------------------------------------------------------------------------------------- gallery


class Gallery(NamedTuple):
    """Captions drawn at random and the pictures nearest to them, by the connectors of one run."""

    rows: list  # of gallery.csv
    thumbnails: dict  # file name in the report's folder -> JPEG bytes
    facts: dict | None  # what else the page shows; None if no task has captions and pictures


def make_gallery(result, tasks, queries=6, nearest=5):
    """The Gallery of the first retrieval task, by the chosen pair and by the truly worst.

    tasks: the Tasks. queries: how many captions. nearest: how many pictures for each.
    """
    task = next((t for t in tasks if t.kind == "retrieval" and t.data.manifest and t.data.rows), None)
    if task is None:
        return Gallery([], {}, None)
    run = result.primary.runs[0]
    rows = [task.data.rows[i] for i in task.rows.tolist()]
    pictures = first_places([row["image"] for row in rows])  # {picture: its first place in rows}
    chosen_rows = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:queries].tolist()
    pairs = gallery_pairs(result)
    retrieved = {}  # pair -> [queries, nearest] indices of pictures
    for pair in pairs:
        retrieved[pair] = nearest_pictures(task, run, pair, list(pictures.values()), chosen_rows, nearest)

    table, names = [], list(pictures)
    for query, place in enumerate(chosen_rows):
        caption = rows[place]["caption"]
        right = {row["image"] for row in rows if row["caption"] == caption}
        for pair in pairs:
            for nth, k in enumerate(retrieved[pair][query], 1):
                row = {"caption": caption, "pair": pair_name(pair), "place": nth}
                table.append(row | {"picture": names[k], "right": names[k] in right})

    root = task.data.folder / task.data.manifest.get("root", ".")
    shown = unique(row["picture"] for row in table)
    files, thumbnails = {}, {}
    for picture in shown:
        jpeg = small_jpeg(root / picture)
        if jpeg:
            files[picture] = f"thumbnails/{len(files)}.jpg"
            thumbnails[files[picture]] = jpeg
    facts = {
        "task": task.name,
        "pictures": len(pictures),
        "run": str(run.folder),
        "pairs": [{"pair": pair_name(pair), "role": role} for pair, role in pairs.items()],
        "thumbnails": files,  # picture -> its file
        "missing": len(shown) - len(files),
        "root": str(root),
    }
    return Gallery(table, thumbnails, facts)


def gallery_pairs(result):
    """{pair: its role}: the chosen pair and, if it is another, the truly worst."""
    worst = int(result.true_scores(result.headline).argmin())
    roles = {result.pairs[result.chosen]: "the pair to stitch"}
    roles.setdefault(result.pairs[worst], "the worst")
    return roles


def first_places(names):
    """{name: its first place}, in order of appearance."""
    first = {}
    for place, name in enumerate(names):
        first.setdefault(name, place)
    return first


@torch.no_grad()
def nearest_pictures(task, run, pair, places, chosen_rows, nearest):
    """The pictures nearest to each caption by a run's connector, [queries, nearest], indices into
    `places`.

    places: of the pictures in the task's rows. chosen_rows: places of the captions in the task's rows.
    """
    image, text = pair
    vectors = F.normalize(image_inputs(task, image)[places].float(), dim=1)  # [pictures, D_i]
    captions = F.normalize(text_inputs(task, text)[chosen_rows].float(), dim=1)  # [queries, D_t]
    mapped = vlm.map_text(vlm.load_connector(run.connector(image, text)), captions)  # [queries, D_i]
    return (mapped @ vectors.T).topk(min(nearest, len(places)), dim=1).indices.tolist()


def small_jpeg(path):
    """A thumbnail's bytes, or None for a picture that is missing or unreadable."""
    try:
        picture = vlm.open_image(path)
        picture.thumbnail((112, 112))
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=80)
    except Exception:  # Pillow raises errors of many types; none of them stops a report
        return None
    return jpeg.getvalue()
