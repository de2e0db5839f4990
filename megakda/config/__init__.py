"""Recipes: the typed schema, composition by Hydra, and validation with remedies."""

from megakda.config.compose import compose, recipes_dir, to_yaml
from megakda.config.schema import Config
from megakda.config.validate import Derived, derive, validate

__all__ = ["Config", "Derived", "compose", "derive", "recipes_dir", "to_yaml", "validate"]
