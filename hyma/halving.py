"""Successive halving of the pairs by their validation scores (Jamieson and Talwalkar, arXiv 1502.07943)."""

import math

from hyma.grid_state import selection_key
from hyma.pair_names import pair_name
from vlm import BadInput


def halving_rungs(pair_count, steps):
    """{step: how many pairs are trained from there on}: half of them each time, at 1/2^r, ..., 1/4, 1/2 of the schedule,
    until one is left, so that every rung costs about as much as training one pair for half the schedule."""
    doublings = math.ceil(math.log2(pair_count))
    if 2**doublings > steps:
        raise BadInput(f"--halving: {steps} steps are too few to halve {pair_count} pairs; give more --epochs")
    rungs = {}
    for k in range(doublings):
        pair_count = math.ceil(pair_count / 2)
        rungs[steps >> (doublings - k)] = pair_count
    return rungs


def surviving_pairs(pairs, state, rungs):
    """The pairs that are trained on after the state's steps, in their old order.

    A pair that was dropped has fewer updates than steps have passed. Where a rung ends here, the pairs with the best scores
    so far survive; of equals, the first. rungs: of `halving_rungs`; {}: no pair is ever dropped.
    """
    trained = []
    for pair in pairs:
        if state["updates"][pair_name(pair)] == state["step"]:
            trained.append(pair)
    if state["step"] not in rungs:
        return trained

    def score(pair):
        return selection_key(state["best"][pair_name(pair)]["recalls"])

    survivors = sorted(trained, key=score, reverse=True)[: rungs[state["step"]]]
    return [pair for pair in trained if pair in survivors]
