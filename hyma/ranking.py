"""The ranking that a trainer writes: the pairs by their validation scores, or by the score that is expected of them."""

import torch

from hyma.metrics import mean_recalls
from hyma.pair_names import name_of_row, pair_of_name


def rank_pairs(recalls, before=None):
    """{"image:text": six recalls} to the rows of ranking.csv, best first by R@10, R@5, R@1; equals share a rank.

    before: {"image:text": number}, what comes before the recalls: the more the better.
    """
    before = before or {}
    table, values = [], {}
    for name, six in recalls.items():
        image, text = pair_of_name(name)
        columns = recall_columns(six)
        recall1, recall5, recall10 = columns.values()
        values[name] = (before.get(name, 0), recall10, recall5, recall1)
        table.append({"image": image, "text": text} | columns)
    table.sort(key=lambda row: values[name_of_row(row)], reverse=True)
    for row in table:
        own = values[name_of_row(row)]
        row["rank"] = 1 + sum(other > own for other in values.values())
    return table


def recall_columns(six):
    """Six recalls as ranking.csv and a connector's card have them: the means of both directions."""
    recall1, recall5, recall10 = [round(mean, 6) for mean in mean_recalls(six)]
    return {"val_recall1": recall1, "val_recall5": recall5, "val_recall10": recall10}


def expected_recall(recalls, cv_recalls, rows_ratio):
    """{"image:text": mean of R@1, R@5, R@10} that ranks the pairs: validation, drawn towards what a closed form scores on
    training rows that it has not seen, as far as their difference can be chance (Fay and Herriot, JASA 1979; Ybarra and
    Lohr, Biometrika 2008).

    The mean of the three is less noisy than R@10, and whoever takes a connector wants its first answer right, too. A few
    hundred validation rows cannot tell good pairs apart; training rows are more, but say nothing of what training
    adds. With v_p a pair's validation score, x_p its mean over the K folds minus the mean of all pairs, and
    fit_p = mean(v) + x_p <x, v> / <x, x>, the regression of v on x over the P pairs:

        expected_p = fit_p + kept * (v_p - fit_p)
        kept       = 1 - rho s^2 / max(t^2, s^2 (rho + 1 / K))
        s^2        the variance of one fold, from how much the folds disagree on a pair
        t^2        the variance of the residuals v - fit
        rho        rows of a fold per validation row: s^2 rho is the variance of a validation score

    recalls: {"image:text": six}. cv_recalls: {"image:text": the score on each fold}. rows_ratio: rho. Empty with fewer than four
    pairs, or if the folds lack one.
    """
    if len(recalls) < 4 or not recalls.keys() <= cv_recalls.keys():
        return {}
    validation = torch.tensor([sum(six) / len(six) for six in recalls.values()], dtype=torch.float64)  # [P]
    folds = torch.tensor([cv_recalls[name] for name in recalls], dtype=torch.float64)  # [P, K]
    pair_count, fold_count = folds.shape
    score = folds.mean(1) - folds.mean()  # [P]
    disagreement = folds - folds.mean(0) - score[:, None]  # [P, K]
    noise = disagreement.square().sum() / ((pair_count - 1) * (fold_count - 1))
    fit = validation.mean() + score * (score @ validation) / score.square().sum().clamp(min=1e-12)  # [P]
    spread = (validation - fit).square().sum() / (pair_count - 2)
    least_spread = noise * (rows_ratio + 1 / fold_count)
    kept = 1 - noise * rows_ratio / torch.maximum(spread, least_spread).clamp(min=1e-12)
    expected = (fit + kept * (validation - fit)).clamp(0, 1).tolist()
    return {name: round(value, 6) for name, value in zip(recalls, expected)}  # so that rounding errors rank no pair
