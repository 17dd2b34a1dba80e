"""Wrong choices for multiple-choice questions."""

import hashlib


def draw_distractors(key, pool, right, count):
    """Wrong choices: `count` items of the list `pool` that are not in the set `right`, or all of them, if fewer.

    The items of `pool` must all differ. The draw depends on `key` alone: every version of every library draws the same.
    """
    most = min(count, len(pool) - len(right.intersection(pool)))
    drawn = {}  # a dict and not a set: in the order drawn
    turn = 0
    while len(drawn) < most:
        digest = hashlib.sha256(f"{key}:{turn}".encode()).digest()
        item = pool[int.from_bytes(digest[:8]) % len(pool)]
        if item not in right:
            drawn[item] = None
        turn += 1
    return list(drawn)
