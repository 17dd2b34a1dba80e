"""Which pair leads the validations, and since when."""

from hyma.metrics import mean_recalls


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
