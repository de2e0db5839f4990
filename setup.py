"""Packages `megakda`, with the recipe tree inside it as data; metadata is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

RECIPES = Path("recipes")

setup(
    packages=[*find_packages(include=["megakda", "megakda.*"]), "megakda.recipes"],
    package_dir={"megakda.recipes": "recipes"},
    package_data={
        "megakda": ["**/*.md", "kernels/launch_tables/*.json"],
        "megakda.recipes": [
            str(path.relative_to(RECIPES))
            for pattern in ("**/*.yaml", "**/*.md")
            for path in RECIPES.glob(pattern)
        ],
    },
)
