"""How many cases of a part were tried, how many held, and which failed."""

import re
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

SHOWN = 3  # failures of a kind that the JSON shows; it counts them all


class Counts:
    """The counts of one part."""

    def __init__(self, asked):
        self.asked = asked
        self.tried = 0
        self.held = 0
        self.failed = []
        self.events = Counter()  # what happened in the cases: kills, exit statuses
        self.more = {}  # whatever else the JSON should say of the part

    def add(self, case, problem, count=1):
        """Adds a case, or several alike. It held if there is no problem."""
        self.tried += count
        if problem:
            self.failed.append({"case": case, "problem": problem})
        else:
            self.held += count

    def kinds(self):
        """{kind of failure: how often}, the most frequent first."""
        return dict(Counter(kind_of(failure) for failure in self.failed).most_common())

    def record(self):
        """As faults.json holds it."""
        shown = []
        seen = Counter()
        for failure in self.failed:
            seen[kind_of(failure)] += 1
            if seen[kind_of(failure)] <= SHOWN:
                shown.append(failure)
        counts = {"asked": self.asked, "tried": self.tried, "held": self.held, "not_held": len(self.failed)}
        return counts | self.more | {"kinds_of_failure": self.kinds(), "failures": shown}


def kind_of(failure):
    """The problem without its numbers."""
    return re.sub(r"\d+", "#", failure["problem"][:160])


def try_cases(cases, check, counts, workers):
    """Checks cases several at a time. check(case, events): a problem or None; it may append to the events.

    cases: {name: case}.
    """

    def try_case(case):
        events = []
        return problem_of(check, case, events), events

    with ThreadPoolExecutor(workers) as pool:
        for name, (problem, events) in zip(cases, pool.map(try_case, cases.values())):
            counts.add(name, problem)
            counts.events.update(events)


def problem_of(check, *arguments):
    """What a check finds. Its own failure is a problem, too."""
    try:
        return check(*arguments)
    except Exception:
        return f"the harness failed: {traceback.format_exc().splitlines()[-1]}"
