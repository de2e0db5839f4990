"""Sizes on command lines."""

import pytest

from megakda.config.sizes import parse_size
from megakda.errors import ConfigError

SIZES = {
    "500000": 500_000,
    "500KB": 500_000,
    "0.5MB": 500_000,
    " 2 MiB ": 2**21,
    "5GB": 5 * 10**9,
    "3kB": 3000,
    "1g": 10**9,
    "7B": 7,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes(text):
    assert parse_size(text, "--x") == SIZES[text]


@pytest.mark.parametrize("text", ["", "GB", "-1", "1.2.3MB", "0", "0GB", "0.1", "5iB", "1 parsec"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match=f"^--x={text} is no size"):
        parse_size(text, "--x")
