"""The answer in words: the sentence and the table that evaluate.py prints, and numbers as page and table show them."""

import numpy as np

from hyma.costs import cost_ratio
from hyma.evaluation import best_first
from hyma.metrics import INTERVAL, best_pairs
from hyma.tasks import KINDS

# ----------------------------------------------------------------------------------------------------------- the table


def print_table(result):
    """One line per method, as the trainers print their rankings."""
    task, oracle = result.headline, result.oracle
    base = result.costs[oracle.name]
    wide = max(len(method.name) for method in result.methods)
    heads = "regret, points (95 %)  top-1  recall@3  NDCG@3  Spearman  tau-b    TFLOP        s  x oracle  chosen"
    print(f"\n{task.name}, {task.counted}; truth: {oracle.name}, seeds: {len(oracle.runs)}")
    print(f"{'':{wide}}  {heads}")
    for each in result.method_results[0]:
        cost, regret = result.costs[each.method], each.fidelity["regret"]
        interval = f"{regret.value:6.2f} ({regret.low:.2f} to {regret.high:.2f})"
        metrics = ""
        for metric, width in (("top1", 7), ("recall3", 10), ("ndcg3", 8), ("spearman", 10), ("tau", 7)):
            metrics += f"{each.fidelity[metric].value:{width}.2f}"
        ratio = format_number(cost_ratio(cost, base, "flops_equal_batch"), 3)
        spent = f"{teraflop(cost.flops):>9}{format_number(cost.seconds, 1):>9}{ratio:>10}"
        choice = describe_choice(list(map(result.pair_name, each.chosen)), each.seeds)
        print(f"{each.method:{wide}}  {interval:21}{metrics}{spent}  {choice}")


def format_number(value, digits=2):
    """A number as it is shown, – for None."""
    if value is None:
        return "–"
    return f"{round(float(value), digits) + 0.0:,.{digits}f}".replace("-", "−")  # + 0.0: no minus before a zero


def teraflop(flops):
    """FLOPs in units of 10^12, three figures; – for None."""
    if flops is None:
        return "–"
    return f"{flops / 1e12:.3g}" if flops < 1e15 else f"{flops / 1e12:,.0f}"


def describe_choice(chosen, seeds):
    """The pair that a method chose, or that pairs are tied, or that its seeds disagree. chosen: pairs' names."""
    if len(chosen) == 1:
        return chosen[0]
    if seeds < 2:
        return f"a tie of {len(chosen)}"
    return f"{chosen[0]} or {chosen[1]}, by seed" if len(chosen) == 2 else f"{len(chosen)} pairs, by seed"


# -------------------------------------------------------------------------------------------------------- the sentence


def answer(result):
    """One sentence: the pair to stitch, how certain that is, what the search cost."""
    clauses = [describe_pair(result), describe_certainty(result), *describe_others(result)]
    if result.primary.trained:
        clauses.append(describe_cost(result))
    return "; ".join(clauses) + "."


def describe_pair(result):
    """The pair, which method chose it, and what its connector scores."""
    task, primary = result.headline, result.primary
    image, text = result.pairs[result.chosen]
    pair = f"Stitch {image} with {text} (mlp{primary.runs[0].hidden_layers})"
    own = task.scores[primary.name][0, result.chosen]
    scores = f"its connector scores {100 * own:.1f} % on {task.name} ({KINDS[task.kind].headline})"
    if not primary.trained:
        return f"{pair}, the best of {primary.name}: {scores}"
    ties = len(best_pairs(primary.preferences.mean(0))) - 1
    tied = f" (tied with {ties} more)" if ties else ""
    return f"{pair}, the choice of {primary.name}{tied}: {scores}"


def describe_certainty(result):
    """In how many resamples the pair is truly the best, and how far behind the best it is otherwise."""
    task, oracle, chosen = result.headline, result.oracle, result.chosen
    truth = result.true_scores(task)  # [P]
    resampled = result.bootstrap_scores(task)  # [R, P]
    is_best = resampled == resampled.max(1, keepdims=True)
    percent = 100 * (is_best[:, chosen] / is_best.sum(1)).mean()  # pairs that tie share a resample
    by = "its own connectors"
    if oracle is not result.primary:
        seeds = f", {len(oracle.runs)} seeds" if len(oracle.runs) > 1 else ""
        by = f"the connectors of {oracle.name}{seeds}"
    clause = f"by {by}, the pair is the best of {len(truth)} in {percent:.0f} % of resamples of {task.counted}"
    best = int(truth.argmax())
    if truth[chosen] == truth[best]:
        return clause
    return f"{clause}, {100 * (truth[best] - truth[chosen]):.1f} points below {result.pair_name(best)}"


def describe_others(result):
    """The pairs that are clearly better, and those that noise does not separate from the chosen one: one clause each."""
    chosen = result.chosen
    resampled = result.bootstrap_scores(result.headline)  # [R, P]
    low, high = np.percentile(resampled - resampled[:, [chosen]], INTERVAL, axis=0)  # [P] the others minus the chosen
    better, alike = [], []
    for k in best_first(result.true_scores(result.headline)):
        if k == chosen:
            continue
        if low[k] > 0:
            better.append(result.pair_name(k))
        elif high[k] >= 0:
            alike.append(result.pair_name(k))
    clauses = []
    for words, pairs in (("clearly better", better), ("within noise", alike)):
        more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
        if pairs:
            clauses.append(f"{words}: {', '.join(pairs[:3])}{more}")
    return clauses


def describe_cost(result):
    """What the search cost, and its ratio to the oracle's cost."""
    primary, oracle = result.primary, result.oracle
    cost = result.costs[primary.name]
    ratio = cost_ratio(cost, result.costs[oracle.name], "flops_equal_batch")
    clause = f"{teraflop(cost.flops)} TFLOP in {cost.seconds:.0f} s"
    if not ratio or oracle is primary:
        return clause
    return f"{clause}, {ratio:.2g}x of {oracle.name} at equal batch size"
