"""The wheel holds everything: it works where there is no checkout."""

import os
import subprocess
import sys
import zipfile

from megakda.config import recipes_dir


def test_wheel_contains_the_recipes_and_composes_them(tmp_path):
    root = recipes_dir().parent
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(root)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("megakda-*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    recipes = {str(p.relative_to(recipes_dir())) for p in recipes_dir().rglob("*.yaml")}
    packed = installed / "megakda/recipes"
    assert {str(p.relative_to(packed)) for p in packed.rglob("*.yaml")} == recipes

    program = (
        "import megakda.config as c; print(c.recipes_dir());"
        "print(c.compose(['experiment=pretrain/kimi_linear_48b']).model.hidden_size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(packed), "2304"]
