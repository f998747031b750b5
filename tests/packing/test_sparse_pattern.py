import dataclasses

import pytest

from tcompress.packing import Pattern


@pytest.mark.parametrize(
    ("text", "kind", "size"),
    [
        ("unstructured", "unstructured", (1, 1)),
        ("2:4", "n_m", (2, 4)),
        ("1:64", "n_m", (1, 64)),
        ("63:64", "n_m", (63, 64)),
        ("8x4", "blocks", (8, 4)),
        ("1x1", "blocks", (1, 1)),
        ("64x64", "blocks", (64, 64)),
    ],
)
def test_parse_and_write(text, kind, size):
    pattern = Pattern.parse(text)
    assert (pattern.kind, pattern.size) == (kind, size)
    assert str(pattern) == text
    assert pattern == Pattern(kind, size)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.kind = "blocks"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dense",
        "Unstructured",
        "4:4",
        "5:4",
        "0:4",
        "2:65",
        "0x4",
        "4x0",
        "65x4",
        "4x65",
        "8X4",
        "8x4x2",
        " 8x4",
        "8x4\n",
        "08x4",
        "-1x4",
        "1.0x4",
        "2:",
        "x4",
        "٢:٤",
    ],
)
def test_what_is_no_pattern(text):
    with pytest.raises(ValueError, match="Pattern: .*: got .*, expected .*unstructured.*N:M.*RxC"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", [None, 4, (8, 4)])
def test_not_a_string(text):
    with pytest.raises(TypeError, match="Pattern: pattern: got .*, expected a string"):
        Pattern.parse(text)


@pytest.mark.parametrize(("kind", "size"), [("block", (8, 4)), ("unstructured", (1, 4)), ("n_m", (4, 2))])
def test_construction_is_checked(kind, size):
    with pytest.raises(ValueError, match="Pattern: size: got"):
        Pattern(kind, size)
