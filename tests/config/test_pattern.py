"""Layer patterns, against the published models' layer lists."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megakda.config.pattern import layer_kinds
from megakda.errors import ConfigError

REFERENCE = json.loads(
    (Path(__file__).parents[1] / "reference" / "kimi_linear_paper.json").read_text()
)


def full_layers(*arguments, **options):
    kinds = layer_kinds(*arguments, **options)
    return [index for index, kind in enumerate(kinds, start=1) if kind == "full"]


def test_published_patterns():
    model = REFERENCE["model_48b"]
    assert full_layers("3:1", 27) == model["full_attention_layers_1_based"]
    assert full_layers("3:1", 27) == [4, 8, 12, 16, 20, 24, 27]
    assert full_layers("3:1", 18) == [4, 8, 12, 16, 18]
    for row in REFERENCE["scaling_ladder"]["rows"]:
        assert len(full_layers("3:1", row["layers"])) == row["mla_layers"]


@pytest.mark.parametrize(
    ("pattern", "layers", "last", "expected"),
    [
        ("0:1", 3, True, [1, 2, 3]),
        ("1:0", 3, True, []),
        ("1:1", 4, True, [2, 4]),
        ("3:1", 6, False, [4]),
        ("3:1", 6, True, [4, 6]),
        ("3:1", 8, True, [4, 8]),
        ("15:1", 4, True, [4]),
        ("2:2", 5, False, [3, 4]),
        (" 3 : 1 ", 4, True, [4]),
        ("3:1", 1, True, [1]),
        ("3:1", 1, False, []),
    ],
)
def test_ratios(pattern, layers, last, expected):
    assert full_layers(pattern, layers, last) == expected
    assert len(layer_kinds(pattern, layers, last)) == layers


@pytest.mark.parametrize("make", [list, tuple, OmegaConf.create])
def test_lists_are_taken_as_written(make):
    pattern = make(["kda", "mla", "gdn", "full", "linear"])
    assert layer_kinds(pattern, 5) == ("linear", "full", "linear", "full", "linear")


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("3", "a:b"),
        ("3:1:1", "a:b"),
        ("-3:1", "a:b"),
        ("3:one", "a:b"),
        ("", "a:b"),
        ("0:0", "positive"),
        (181, 'pattern: "3:1"'),
        (901, 'pattern: "15:1"'),
        (3, "text or a list"),
        (True, "text or a list"),
        (None, "text or a list"),
        (3.1, "text or a list"),
        ({"linear": 3}, "text or a list"),
        (["linear"] * 3, "one name per layer: 4"),
        ([], "one name per layer: 4"),
        (["linear", "full", "linear", "attention"], "layer 4 is 'attention'"),
        (["linear", "full", "linear", 1], "layer 4 is 1"),
    ],
)
def test_malformed_patterns_name_key_value_and_remedy(pattern, says):
    with pytest.raises(ConfigError) as caught:
        layer_kinds(pattern, 4)
    assert f"model.pattern={pattern!r}" in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("layers", [0, -1, 2.0, True, None])
def test_number_of_layers_is_checked(layers):
    with pytest.raises(ConfigError, match="model.num_layers"):
        layer_kinds("3:1", layers)
