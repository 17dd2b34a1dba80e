"""Brackets beside the lines of a printed ranking: they hold together what cannot be told apart."""


def brackets(members):
    """A mark for each line of a table; a line that belongs to nothing, or to nothing but itself, has a space.

    members: for each line, whether it belongs to those that cannot be told apart.
    """
    places = [k for k, member in enumerate(members) if member]
    marks = [" "] * len(members)
    if len(places) > 1:
        for k in places:
            marks[k] = "│"
        marks[places[0]] = "┌"
        marks[places[-1]] = "└"
    return marks
