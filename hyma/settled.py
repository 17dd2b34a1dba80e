"""When a ranking has settled: what ends a run of train_hyma.py --stop-when-stable before its last step."""

from scipy.stats import spearmanr

from hyma.metrics import mean_recalls

ALIKE = 3  # validations that must agree
LEAST_SPEARMAN = 0.98  # between each of them and the next


def leader(recalls):
    """(the pair with the best mean R@10, that score) of a validation. recalls: {"image:text": six}."""
    scores = {pair: mean_recalls(six)[2] for pair, six in recalls.items()}
    best = max(scores, key=scores.get)
    return best, scores[best]


def leads_since(metrics):
    """The step of the first of the last validations that the same pair leads. metrics: lines of metrics.jsonl."""
    pair, _ = leader(metrics[-1]["recalls"])
    since = metrics[-1]["step"]
    for line in reversed(metrics):
        if leader(line["recalls"])[0] != pair:
            break
        since = line["step"]
    return since


def is_settled(metrics, trained):
    """Whether the same pair leads the last validations, and the trained pairs are in nearly the same order in each.
    trained: their names; others, of a run that an encoder is added to, keep their scores and so their order."""
    last = metrics[-ALIKE:]
    if len(last) < ALIKE or leads_since(metrics) > last[0]["step"]:
        return False
    recalls = [{name: line["recalls"][name] for name in trained} for line in last]
    return all(map(are_alike, recalls, recalls[1:]))


def are_alike(recalls, next_recalls):
    """Whether all pairs are in nearly the same order in two validations. One pair always is; equal scores have no order."""
    if len(recalls) == 1:
        return True
    scores = []
    for of_pairs in (recalls, next_recalls):
        scores.append([mean_recalls(six)[2] for six in of_pairs.values()])
        if len(set(scores[-1])) == 1:
            return False
    return spearmanr(*scores).statistic >= LEAST_SPEARMAN
