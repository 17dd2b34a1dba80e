"""The answer in words: the sentences and tables that evaluate.py prints, and numbers as page and tables show them."""

from hyma.brackets import brackets
from hyma.costs import cost_ratio
from hyma.evaluation import ALIKE, BETTER, CHOSEN, compared_with_random, ranking_rows
from hyma.metrics import best_pairs
from hyma.tasks import KINDS

# ---------------------------------------------------------------------------------------------------------- the tables

PAIRS_SHOWN = 20  # of a long ranking; ranking.csv has the rest


def print_tables(result):
    """The pairs by their true scores, and the ways of choosing by their regret, as the trainers print their rankings."""
    print_pairs(result)
    print_methods(result)


def print_pairs(result):
    """One line per pair, truly best first, its score first. The chosen pair and those like it have a bracket."""
    task, oracle = result.headline, result.oracle
    rows = rows_of_headline(result)
    shown = rows[:PAIRS_SHOWN]
    wide = max(len(row["image"]) for row in rows)
    print(f"\n{task.name}, {task.counted}; truth: {oracle.name}, seeds: {len(oracle.runs)}")
    print(f"  {'score, % (95 %)':20}  {'minus chosen (95 %)':22}  pair")
    marks = brackets([row["verdict"] in (CHOSEN, ALIKE) for row in shown])
    for mark, row in zip(marks, shown):
        score = f"{row['true_score']:5.1f} ({row['low']:.1f} to {row['high']:.1f})"
        behind = f"{row['minus_chosen']:+5.1f} ({row['minus_chosen_low']:+.1f} to {row['minus_chosen_high']:+.1f})"
        if row["verdict"] == CHOSEN:
            behind = "chosen"
        print(f"{mark} {score:20}  {behind:22}  {row['image']:{wide}}  {row['text']}")
    if len(rows) > len(shown):
        print(f"  and {len(rows) - len(shown)} pairs more, in ranking.csv")


def print_methods(result):
    """One line per method, the least regret first."""
    base = result.costs[result.oracle.name]
    wide = max(len(method.name) for method in result.methods)
    print(f"\n  {'regret, points (95 %)':21}  Spearman    TFLOP        s  x oracle  {'chosen by':{wide}}  pair")
    for each in sorted(result.method_results[0], key=lambda each: each.fidelity["regret"].value):
        cost, regret = result.costs[each.method], each.fidelity["regret"]
        interval = f"{regret.value:5.2f} ({regret.low:.2f} to {regret.high:.2f})"
        ratio = format_number(cost_ratio(cost, base, "flops_equal_batch"), 3)
        spent = f"{teraflop(cost.flops):>9}{format_number(cost.seconds, 1):>9}{ratio:>10}"
        choice = describe_choice(list(map(result.pair_name, each.chosen)), each.seeds)
        spearman = each.fidelity["spearman"].value
        print(f"  {interval:21}  {spearman:8.2f}{spent}  {each.method:{wide}}  {choice}")


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


# ------------------------------------------------------------------------------------------------------- the sentences


def answer(result):
    """[sentences]: the pair to stitch, how it compares with the others, its regret, bad news, its score, the cost."""
    rows = rows_of_headline(result)
    sentences = [describe_choice_of_pair(result)]
    sentences.append(describe_comparison(rows, result.headline.counted))
    if result.primary.trained:  # else the truth itself has chosen
        sentences.append(describe_regret(result))
        sentences += describe_failures(result)
    sentences.append(describe_score(result))
    if result.primary.trained:
        sentences.append(describe_cost(result))
    return sentences


def rows_of_headline(result):
    """The rows of ranking.csv on the first task."""
    return [row for row in ranking_rows(result) if row["task"] == result.headline.name]


def describe_choice_of_pair(result):
    """The pair, and which method chose it."""
    primary = result.primary
    image, text = result.pairs[result.chosen]
    pair = f"Stitch {image} with {text} (mlp{primary.runs[0].hidden_layers})"
    if not primary.trained:
        return f"{pair}, the best of {primary.name}."
    ties = len(best_pairs(primary.preferences.mean(0))) - 1
    tied = f" (tied with {ties} more)" if ties else ""
    return f"{pair}, the choice of {primary.name}{tied}."


def describe_comparison(rows, counted):
    """Which pairs are better than the chosen one, and which cannot be told apart from it.

    rows: of ranking.csv on a task, whose verdicts the page's table shows too. counted: how many pictures or questions.
    """
    of_verdict = {CHOSEN: [], BETTER: [], ALIKE: []}
    for row in rows:
        if row["verdict"] in of_verdict:
            of_verdict[row["verdict"]].append((row["image"], row["text"]))
    (chosen,) = of_verdict[CHOSEN]
    better, alike = of_verdict[BETTER], of_verdict[ALIKE]
    own = " with ".join(chosen)
    if better:
        verb = "is" if len(better) == 1 else "are"
        sentence = f"{name_pairs(better, len(rows))} {verb} better on {counted} than {own}, which was chosen"
        if alike:
            sentence += f"; {name_pairs(alike, len(rows))} cannot be told apart from it"
        return f"{sentence}."
    if alike:
        group = sorted([chosen, *alike])
        one_text = len({text for _, text in group}) == 1
        short = chosen[0] if one_text else own
        return f"{name_pairs(group, len(rows))} cannot be told apart on {counted}; {short} was chosen."
    if len(rows) == 1:
        return f"{own} is the only pair."
    return f"{own} is better than every other pair on {counted}, and was chosen."


def name_pairs(pairs, count):
    """Pairs as "a, b and c with d"; so many that nobody reads them all as "12 of the 27 pairs". count: of all pairs."""
    images_of_text = {}
    for image, text in sorted(pairs):
        images_of_text.setdefault(text, []).append(image)
    texts_of_images = {}
    for text, images in images_of_text.items():
        texts_of_images.setdefault(tuple(images), []).append(text)
    names = sum(len(images) + len(texts) for images, texts in texts_of_images.items())
    if len(texts_of_images) > 2 or names > 12:
        return f"{len(pairs)} of the {count} pairs"
    return ", and ".join(
        f"{enumerate_names(images)} with {enumerate_names(texts, 'or')}" for images, texts in texts_of_images.items()
    )


def enumerate_names(names, joined_by="and"):
    """Names as "a", "a and b", or "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} {joined_by} {last}" if others else last


def describe_regret(result):
    """How far behind the truly best pair the choice is, as the tables have it, and what a random choice loses."""
    oracle = result.oracle
    by = "its own connectors"
    if oracle is not result.primary:
        seeds = f", {len(oracle.runs)} seeds" if len(oracle.runs) > 1 else ""
        by = f"the connectors of {oracle.name}{seeds}"
    regret = result_of_primary(result, 0).fidelity["regret"]
    its_regret = "its regret" if len(result.primary.runs) == 1 else "the mean regret of what its seeds choose"
    return f"By {by}, {its_regret} is {describe_interval(regret)}; that of a random choice is {regret.random:.2f}."


def describe_interval(regret):
    return f"{regret.value:.2f} points (95 %: {regret.low:.2f} to {regret.high:.2f})"


def result_of_primary(result, place):
    """The MethodResult of the method that made the choice, on the task in that place."""
    for each in result.method_results[place]:
        if each.method == result.primary.name:
            return each


def describe_failures(result):
    """A sentence for each task on which the choice is worse than a random one, or cannot be told from it."""
    choice, in_the_mean = ("the choice", "") if len(result.primary.runs) == 1 else ("what the seeds choose", " in the mean")
    verbs = {"not told from": f"cannot{in_the_mean} be told from", "worse than": f"is{in_the_mean} worse than"}
    sentences = []
    for place, task in enumerate(result.tasks):
        found = result_of_primary(result, place)
        regret = found.fidelity["regret"]
        if verb := verbs.get(compared_with_random(found)):
            sentences.append(
                f"On {task.name} {choice} {verb} a random one: its regret is {describe_interval(regret)}, that "
                f"of a random choice {regret.random:.2f}."
            )
    return sentences


def describe_score(result):
    """What the chosen pair's own connector scores."""
    task = result.headline
    own = task.scores[result.primary.name][0, result.chosen]
    return f"Its connector scores {100 * own:.1f} % on {task.name} ({KINDS[task.kind].headline})."


def describe_cost(result):
    """What the search cost, and its ratio to the oracle's cost."""
    primary, oracle = result.primary, result.oracle
    cost = result.costs[primary.name]
    ratio = cost_ratio(cost, result.costs[oracle.name], "flops_equal_batch")
    sentence = f"The search cost {teraflop(cost.flops)} TFLOP in {cost.seconds:.0f} s"
    if not ratio or oracle is primary or len(oracle.runs[0].ranks) > len(primary.runs[0].ranks):
        return f"{sentence}."
    return f"{sentence}, {ratio:.2g} times the FLOPs of {oracle.name} at equal batch size."
