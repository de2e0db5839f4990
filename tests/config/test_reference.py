"""recipes/README.md: complete, and in step with the schema and the recipe files."""

from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import OmegaConf

from megakda.config import Config, recipes_dir
from megakda.config.reference import MARK, render, sections
from megakda.errors import ConfigError

README = (recipes_dir() / "README.md").read_text()


def names(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_the_file_is_up_to_date():
    assert render(README, recipes_dir()) == README, "run python -m megakda.config.reference"


def test_every_setting_appears_once():
    tree = OmegaConf.to_container(OmegaConf.structured(Config))
    assert isinstance(tree, dict)
    listed = [setting.name for section in sections() for setting in section.settings]
    assert sorted(listed) == sorted(names(tree))
    for name in listed:
        assert README.count(f"| `{name}` |") == 1


def test_every_recipe_appears_once():
    for group in (path for path in recipes_dir().iterdir() if path.is_dir()):
        for recipe in group.rglob("*.yaml"):
            choice = recipe.relative_to(group).with_suffix("").as_posix()
            assert README.count(f"| `{group.name}={choice}` |") == 1


def test_rows_say_what_the_source_says():
    settings = {setting.name: setting for section in sections() for setting in section.settings}
    assert settings["precision"].choices == ("fp32", "bf16")
    assert settings["model.hidden_size"].default == ""
    assert settings["parallel.pipeline_layers"].default == "null"
    assert settings["train.guard.max_bad_steps"].default == "10"
    assert settings["model.linear.conv_kernel"].comment.endswith("0 switches it off")
    # A comment inside a value that is broken over several lines
    assert settings["runtime.peak_tflops"].comment.startswith("per device, for MFU")
    assert r"`float \| None`" in README
    assert {section.name: section.text for section in sections()}["optim"] == ""


def test_the_written_part_stays_and_the_mark_is_needed():
    assert render(f"Hello.\n\n{MARK}\nold", recipes_dir()).startswith(f"Hello.\n\n{MARK}\n\n## ")
    with pytest.raises(ConfigError, match="put it back"):
        render("Hello.", recipes_dir())
