"""What training the pairs by themselves changes besides the tensors: costs, updates, metrics, each pair's best state."""

from hyma import ranks
from hyma.metrics import mean_recalls
from hyma.pair_names import pair_name

COSTS = ("flops", "start_flops", "step_flops", "logit_flops", "seconds")  # summed over groups of pairs


def new_state(pairs):
    """The state before the first step, as a checkpoint stores it."""
    state = {
        "step": 0,
        "updates": {},  # of each pair, by its name
        "losses": [],  # of the steps since the last validation
        "metrics": [],  # lines of metrics.jsonl
        "best": {},  # of each pair, by its name: its best recalls, and the layers that reached them, see `keep_best`
        "peak_bytes": 0,
    }
    for pair in pairs:
        state["updates"][pair_name(pair)] = 0
    for key in COSTS:
        state[key] = 0
    return state


def selection_key(six):
    """Pairs and states are compared by this: R@10, then R@5, then R@1, each the mean of both directions."""
    recall1, recall5, recall10 = mean_recalls(six)
    return recall10, recall5, recall1


def keep_best(state, name, six, layers, card_info, key=selection_key):
    """Keeps these layers, [(weight, bias)], as the pair's if none before scored as high. six: recalls of these layers.
    card_info: for the connector's card. key: of six recalls, what is compared."""
    if name in state["best"] and key(six) <= key(state["best"][name]["recalls"]):
        return
    copies = []
    for weight, bias in layers:
        copies.append((weight.detach().cpu().clone(), bias.detach().cpu().clone()))
    state["best"][name] = {"recalls": six, "layers": copies, "about": card_info}


def gather_best_layers(state, own):
    """Brings the layers of every pair's best state to the first rank. own: the pairs whose layers this rank has."""
    best = state["best"]
    layers = {}
    for pair in own:
        if pair_name(pair) in best:
            layers[pair_name(pair)] = best[pair_name(pair)]["layers"]
    for of_rank in ranks.gather(layers):
        for name, found in of_rank.items():
            best[name]["layers"] = found


def merge_states(states, pairs):
    """One state of several that went through the same steps with different pairs: costs are added up."""
    whole = new_state(pairs)
    whole["step"] = states[0]["step"]
    updates, best = {}, {}
    for state in states:
        updates |= state["updates"]
        best |= state["best"]
        whole["peak_bytes"] = max(whole["peak_bytes"], state["peak_bytes"])
        for key in COSTS:
            whole[key] += state[key]
    for pair in pairs:  # the order of ties, whatever group a pair was in
        name = pair_name(pair)
        whole["updates"][name] = updates[name]
        whole["best"][name] = best[name]
    metrics_of_states = [state["metrics"] for state in states]
    for lines in zip(*metrics_of_states):
        whole["metrics"].append(merge_lines(lines))
    return whole


def merge_lines(lines):
    """One line of metrics.jsonl of several with different pairs: means over the pairs, seconds added up."""
    merged = lines[0] | {"recalls": {}, "seconds": 0}
    for line in lines:
        merged["recalls"] |= line["recalls"]
        merged["seconds"] += line["seconds"]
    for key in ("loss", "val_recall10"):
        if key in merged:  # a closed form has no loss
            merged[key] = 0
            for line in lines:
                merged[key] += line[key] * (len(line["recalls"]) / len(merged["recalls"]))
    return merged
