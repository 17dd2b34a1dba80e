"""Random text, JSON values, bytes and flags that a stranger could have written."""

ODD_TEXTS = ["", " ", "\n", "\x00", "..", "/", "../../x", "/etc/passwd", "~", "a", "vit_l16", "mpnet", "=", ":", "*"]
ODD_TEXTS += ["[", "]", "timm:", "random:", "hf-hub:", "local-dir:", "\udc80", "é", "\u202e", "%s", "{}", "{", "0/1"]
ODD_TEXTS += ["1/0", "-1", "_mlp1_", ".pt", "nan", "1e999", "9" * 30, "train", "TEST", "?", "\\", '"', "'", ",", "\t"]
ODD_TEXTS += ["\ufeff", "😀"]
NAMES = ["image", "caption", "key", "label", "split", "question", "choices", "rows", "dim", "encoders", "flags", "x"]


def odd_text(draw):
    return "".join(draw.choice(ODD_TEXTS) for _ in range(draw.choice((0, 1, 1, 2, 3, 8))))


def odd_flag(draw):
    """Text that somebody could type as a flag: there is no NUL in it, and it is UTF-8 or was."""
    return odd_text(draw).replace("\x00", "")


def odd_value(draw, depth=3):
    """Any JSON value."""
    kind = draw.randrange(10 if depth else 7)
    if kind == 0:
        return draw.choice([None, True, False])
    if kind == 1:
        return draw.choice([0, -1, 1, 2**31, 2**63, 2**70, -(2**70), 10**400])
    if kind == 2:
        return draw.choice([0.5, -0.0, float("nan"), float("inf"), float("-inf"), 1e308])
    if kind < 7:
        return odd_text(draw)
    if kind == 7:
        return [odd_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {draw.choice(NAMES): odd_value(draw, depth - 1) for _ in range(draw.randrange(4))}


def mutate_value(value, draw):
    """A copy of a JSON value with one part replaced, removed or added."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return odd_value(draw)
    if isinstance(value, list):
        place = draw.randrange(len(value))
        return [*value[:place], mutate_value(value[place], draw), *value[place + 1 :]]
    key = draw.choice(list(value))
    if draw.random() < 0.2:
        return {name: part for name, part in value.items() if name != key}
    if draw.random() < 0.1:
        return value | {odd_text(draw): odd_value(draw)}
    return value | {key: mutate_value(value[key], draw)}


def mutate_bytes(data, draw):
    """A copy of bytes, cut, flipped, repeated or with other bytes put in."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        place = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0:
                data = data[:place]
            case 1 if place < len(data):
                data[place] ^= 1 << draw.randrange(8)
            case 2 if place < len(data):
                data[place] = draw.choice((0, 255, 127, 128, 10, 34))
            case 3:
                data[place:place] = draw.randbytes(draw.randrange(1, 9))
            case 4:
                data[place:place] = data[place : place + draw.randrange(1, 64)]
            case 5:
                del data[place : place + draw.randrange(1, 64)]
    return bytes(data)
