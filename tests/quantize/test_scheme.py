import pytest
from pydantic import ValidationError

from tcompress import QuantArgs, Scheme
from tcompress.quantize import SCHEMES, PerChannel, PerGroup, PerTensor, PerToken

WEIGHTS = QuantArgs(bits=8)
#: By name: bits of the weights, bits and symmetry of the activations.
TABLE = {
    "W8A8": (8, 8, True),
    "W8A7": (8, 7, False),
    "W7A7": (7, 7, False),
    "W6A7": (6, 7, False),
    "W8A16": (8, None, None),
}
STATIC = ["W8A8-static", "W8A7-static", "W7A7-static", "W6A7-static"]
INT4 = [f"W4{a}{g}{z}" for a in ("A8", "A7", "A16") for g in ("", "-g32", "-g64", "-g128") for z in ("", "-asym")]


def activations(**changes):
    return QuantArgs(**{"bits": 8, "symmetric": True, "granularity": PerToken(), "dynamic": True, **changes})


@pytest.mark.parametrize("name", TABLE)
def test_named(name):
    scheme = Scheme.named(name)
    weight_bits, act_bits, act_symmetric = TABLE[name]
    assert scheme.name == name
    assert scheme.weights == QuantArgs(bits=weight_bits, symmetric=True, granularity=PerChannel(), dynamic=False)
    if act_bits is None:
        assert scheme.activations is None
    else:
        assert scheme.activations == activations(bits=act_bits, symmetric=act_symmetric)


def test_the_table_is_complete():
    assert set(SCHEMES) == {*TABLE, *STATIC, *INT4}


@pytest.mark.parametrize("name", STATIC)
def test_static(name):
    scheme, dynamic = Scheme.named(name), Scheme.named(name.removesuffix("-static"))
    assert scheme.name == name
    assert scheme.static
    assert not dynamic.static
    assert scheme.weights == dynamic.weights
    assert scheme.with_dynamic_activations() == dynamic == dynamic.with_dynamic_activations()
    of = {"bits": dynamic.activations.bits, "symmetric": dynamic.activations.symmetric}
    assert scheme.activations == QuantArgs(**of, granularity=PerTensor(), dynamic=False)


def test_static_eight_bits_of_this_machine():
    assert Scheme.named("int8-static").with_dynamic_activations() == Scheme.named("int8")


def test_static_schemes_that_nothing_computes():
    fixed = activations(dynamic=False, granularity=PerTensor())
    with pytest.raises(ValueError, match="Scheme: activations: got static, expected dynamic, per token; no kernel"):
        Scheme(weights=QuantArgs(bits=4), activations=fixed)
    with pytest.raises(ValueError, match="Scheme: weights: got .*, expected static, per channel"):
        Scheme(weights=QuantArgs(granularity=PerTensor()), activations=fixed)


@pytest.mark.parametrize("name", INT4)
def test_named_int4(name):
    scheme = Scheme.named(name)
    _, _, tail = name.partition("-")
    size = int(tail.removesuffix("-asym").removesuffix("asym").removeprefix("g") or 0)
    granularity = PerGroup(size=size) if size else PerChannel()
    scale_dtype = "float16" if size else "float32"
    symmetric = not name.endswith("asym")
    assert scheme.name == name
    assert scheme.weights == QuantArgs(bits=4, symmetric=symmetric, granularity=granularity, scale_dtype=scale_dtype)
    expected = {"8": activations(), "7": activations(bits=7, symmetric=False), "1": None}[name[3]]
    assert scheme.activations == expected


@pytest.mark.parametrize("name", ["W4A4", "w8a8", "", "W8A8 "])
def test_unknown_name(name):
    with pytest.raises(
        ValueError, match=r"Scheme: name: got .*, expected one of \['W4A16', .*'W7A7', .*'W8A8-static'\]"
    ):
        Scheme.named(name)


def test_name_of_a_scheme_that_has_none_in_the_table():
    assert Scheme(weights=QuantArgs(bits=5), activations=activations(bits=3)).name == "W5A3"


@pytest.mark.parametrize(
    "weights",
    [
        {"symmetric": False},
        {"granularity": PerGroup(size=32)},
        {"scale_dtype": "float16"},
        {"dynamic": True},
        {"granularity": PerToken()},
        {"bits": 4, "dynamic": True},
        {"bits": 4, "granularity": PerToken()},
    ],
)
def test_weights_that_nothing_computes(weights):
    with pytest.raises(ValueError, match=r"Scheme: weights: got .*, expected (static|symmetric), per channel"):
        Scheme(weights=QuantArgs(**weights))


@pytest.mark.parametrize("changes", [{"dynamic": False}, {"granularity": PerChannel()}, {"granularity": PerTensor()}])
def test_activations_that_nothing_computes(changes):
    with pytest.raises(ValueError, match=r"Scheme: activations: got .*, expected dynamic, per token"):
        Scheme(weights=WEIGHTS, activations=activations(**changes))


def test_asymmetric_activations_have_seven_bits_at_most():
    assert Scheme(weights=WEIGHTS, activations=activations(bits=7, symmetric=False)).name == "W8A7"
    with pytest.raises(ValueError, match=r"Scheme: activations\.bits: got 8, expected at most 7"):
        Scheme(weights=WEIGHTS, activations=activations(bits=8, symmetric=False))


@pytest.mark.parametrize("bits", [2, 8])
def test_bits_in_range(bits):
    assert QuantArgs(bits=bits).bits == bits


@pytest.mark.parametrize("bits", [1, 9, 0, -8, 7.5, "eight"])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="bits"):
        QuantArgs(bits=bits)


@pytest.mark.parametrize(
    "make", [QuantArgs, PerToken, PerChannel, PerGroup, lambda **kw: Scheme(weights=WEIGHTS, **kw)]
)
def test_unknown_fields(make):
    with pytest.raises(ValueError, match="colour"):
        make(colour="red")


def test_frozen_and_hashable():
    scheme = Scheme.named("W8A8")
    with pytest.raises(ValidationError):
        scheme.activations = None
    with pytest.raises(ValidationError):
        scheme.weights.bits = 4
    assert {scheme: 1}[Scheme(weights=QuantArgs(), activations=activations())] == 1


@pytest.mark.parametrize("name", [*TABLE, *STATIC, *INT4])
def test_json_round_trip(name):
    scheme = Scheme.named(name)
    assert Scheme.model_validate_json(scheme.model_dump_json()) == scheme


def test_granularity_by_kind():
    assert QuantArgs.model_validate({"granularity": {"kind": "per_token"}}).granularity == PerToken()
    with pytest.raises(ValueError, match="per_planet"):
        QuantArgs.model_validate({"granularity": {"kind": "per_planet"}})


@pytest.mark.parametrize("size", [0, 1, 16, 33, 1024])
def test_group_sizes_without_a_kernel(size):
    with pytest.raises(ValueError, match="32, 64, 128, 256 or 512"):
        PerGroup(size=size)
