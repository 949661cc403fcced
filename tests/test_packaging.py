"""The package as users get it: metadata, wheel, start-up, doctests."""

from __future__ import annotations

import configparser
import doctest
import importlib
import importlib.util
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

import compand

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "codecs": "compand",
    "train": "compand.train",
    "eval": "compand.eval",
    "checkpoints": "compand.checkpoints",
}

# Generous, for machines under load: the guard is against importing torch (seconds), not a few percent.
START_UP_SECONDS = 1.5


def packages_found() -> set[str]:
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(ROOT / folder).parts)))
    return found


def modules_found(with_text: str = "") -> list[str]:
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] != "__main__" and with_text in path.read_text("utf-8"):
                found.append(".".join((package, *parts)).removesuffix(".__init__"))
    return found


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def test_every_package_is_listed():
    assert set(setup_cfg()["options"]["packages"].split()) == packages_found()


def test_every_module_is_in_a_package():
    packages = packages_found()
    homes = {name if name in packages else name.rpartition(".")[0] for name in modules_found()}
    assert homes <= packages


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.Path:
    # Built from a copy: setuptools leaves a build folder, whose old files would slip into the next wheel.
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (path,) = source.glob("compand-*.whl")
    return path


def test_wheel_holds_all_code_and_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    excluded = [
        f"compand/checkpoints/{pattern.strip()}"
        for pattern in setup_cfg()["options.exclude_package_data"]["compand.checkpoints"].split(",")
    ]
    expected = set()
    for folder, package in FOLDERS.items():
        for pattern in (
            "*.py",
            "py.typed",
            "configs/*.yaml",
            "templates/*",
            "*/*.safetensors",
            "*/config.json",
            "*/CARD.md",
        ):
            expected |= {
                f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
                for path in (ROOT / folder).rglob(pattern)
                if folder == "checkpoints" or path.suffix not in (".safetensors", ".json", ".md")
            }
    superseded = {name for name in expected if any(fnmatch(name, pattern) for pattern in excluded)}
    assert superseded
    content = {name for name in names if ".dist-info/" not in name}
    assert expected - superseded <= content and not superseded & content
    assert {name.partition("/")[0] for name in content} == {"compand"}
    assert not [name for name in content if "test" in name or name.endswith((".pyc", ".ckpt", ".pt"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 100e6  # the largest file that PyPI takes


def test_extra_dev_holds_the_extras_that_tests_import():
    extras = setup_cfg()["options.extras_require"]
    assert "compand[train,eval]" in extras["dev"]
    assert "numpy<2" in extras["train"].split()


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "code",
    [
        "import compand",
        "import compand.cli",
        "import compand.coding.container",
        "import compand.registry",
        "import compand.checkpoint",
        "import compand; compand.available()",
    ],
)
def test_light_imports_stay_light(code):
    heavy = ("torch", "numpy", "PIL", "rich", "matplotlib", "lightning", "compressai", "scipy", "numba")
    loaded = run_python(f"import sys\n{code}\nprint([name for name in {heavy} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_library_imports_no_training_code():
    code = (
        "import sys, compand, compand.cli, compand.codec, compand.pictures, compand.hyperprior\n"
        "names = ('lightning', 'compressai', 'jsonargparse', 'compand.train', 'compand.eval')\n"
        "print([name for name in names if name in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("command", ["--help", "codecs"])
def test_quick_start(command):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "compand.cli", command], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < START_UP_SECONDS


@pytest.mark.parametrize("module", modules_found(with_text=">>> "))
def test_doctests(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_refuses_to_be_imported_as_the_standard_library_module():
    spec = importlib.util.spec_from_file_location("codecs", compand.__file__)
    with pytest.raises(ImportError, match="pip install"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
