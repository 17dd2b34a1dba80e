"""What both trainers print at the end: the ranking, what it cost, the best connector."""

import math

from hyma.brackets import brackets
from hyma.pair_names import name_of_row


def print_ranking(ranking, recalls, retrieval):
    """The rows of `rank_pairs` as a table: the score that ranks, then recalls in per cent, both directions.

    A bracket holds the first pair and those whose difference from it can be chance.
    """
    score, words, unit = "val_recall10", "mean", "R@10"
    if "expected_recall" in ranking[0]:
        score, words, unit = "expected_recall", "expected", "recall"
    chance = " / ".join(f"{100 * value:.1f}" for value in retrieval.chance)
    wide = max(5, *(len(row["image"]) for row in ranking))
    narrow = max(len(row["text"]) for row in ranking)
    rows = f"{retrieval.query_rows} validation rows among {len(retrieval.rows)} rows"
    print(f"\nranking on {rows}, recall in % (chance at 1 / 5 / 10: {chance})")
    print(f"  {'':6}{words:>8}{'':{wide + narrow + 13}}text -> image        image -> text       mean")
    columns = f"  rank  {unit:>8}  ±     {'image':{wide}}  {'text':{narrow}}" + "   R@1   R@5  R@10" * 2
    print(f"{columns}   R@10")

    queries = min(retrieval.queries.values())
    first = ranking[0]
    alike = [can_be_chance(first, row, score, queries) for row in ranking]
    for mark, row in zip(brackets(alike), ranking):
        half = 100 * half_interval(row[score], queries)
        line = f"{mark} {row['rank']:4}  {100 * row[score]:8.1f}  ±{half:4.1f}  {row['image']:{wide}}  {row['text']:{narrow}}"
        for value in recalls[name_of_row(row)]:
            line += f"{100 * value:6.1f}"
        print(f"{line}{100 * row['val_recall10']:7.1f}")
    if sum(alike) > 1:
        print(f"The {sum(alike)} pairs in the bracket cannot be told apart on {queries} validation pictures.")


def half_interval(recall, queries):
    """Half of the 95 % interval of a recall of that many queries, 0 to 1.

    That of both directions' mean is at most so wide, and `expected` has no more noise than validation. At 0 and 1 it is as wide
    as Wilson's interval: that few queries found nothing, or all, says no more.
    """
    edge = min(0.5, 1.96**2 / (queries + 1.96**2))
    recall = min(1 - edge, max(edge, recall))
    return 1.96 * math.sqrt(recall * (1 - recall) / queries)


def can_be_chance(first, row, score, queries):
    """Whether the difference of two rows' scores is within its 95 % interval, as if they had different pictures: the same
    pictures make it narrower, so that pairs outside are apart indeed."""
    widths = half_interval(first[score], queries), half_interval(row[score], queries)
    return first[score] - row[score] <= math.hypot(*widths)


def print_results(ranking, recalls, retrieval, description, state, best):
    """The ranking, what it cost, and the best connector, ready to load. description: how it was trained, in a few words."""
    print_ranking(ranking, recalls, retrieval)
    if sum(row["val_recall10"] for row in ranking) < 2 * len(ranking) * retrieval.chance[2]:
        print(
            "All pairs are at chance. A lower --lr or more --epochs may help; do captions and images belong together?"
        )
    updates = state["updates"].values()
    teraflop = state["flops"] / 1e12
    print(
        f"{description}: {teraflop:.2f} TFLOP in {state['seconds']:.0f} s, {min(updates)} to {max(updates)} updates per pair"
    )
    print(f"\nbest connector: {best}")
    print(f"load it: from vlm import get_vlm_from_checkpoint; vlm = get_vlm_from_checkpoint({str(best)!r})")
