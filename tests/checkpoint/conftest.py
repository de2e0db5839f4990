"""A Hugging Face folder of random numbers, for tests that read, break or convert one."""

import shutil
from pathlib import Path

import pytest

from tests.checkpoint.hf_jobs import random_folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "folder"
    random_folder(folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "folder"))
