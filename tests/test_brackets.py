"""hyma/brackets.py: which printed lines are marked."""

from hyma.brackets import brackets


def test_a_bracket_opens_at_the_first_and_closes_at_the_last():
    assert brackets([True, True, False, True, False]) == ["┌", "│", " ", "└", " "]
    assert brackets([False, True, True]) == [" ", "┌", "└"]


def test_one_line_alone_and_none_have_no_bracket():
    assert brackets([True, False]) == [" ", " "] and brackets([]) == []
