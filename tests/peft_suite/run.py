"""Runs PEFT's own test suite on an outside tuner, offline. See README.md."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from selection import EDITS, FILES

EPILOG = "Further arguments go to pytest, such as -n 2 or -k merge."
HERE = Path(__file__).resolve().parent


def fetch_sdist(folder: Path) -> Path:
    """The source distribution of the installed PEFT, from the package index that pip is set up for."""
    version = importlib.metadata.version("peft")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=peft", f"peft=={version}"]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    return next(folder.glob("peft-*.tar.gz"))


def find_tests(sdist: Path, scratch: Path) -> Path:
    """PEFT's tests folder in a source distribution, packed or not."""
    if sdist.is_file():
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch / "sdist", filter="data")
        sdist = scratch / "sdist"
    for tests in (sdist, sdist / "tests", *sdist.glob("*/tests")):
        if (tests / "testing_common.py").exists():
            return tests
    raise SystemExit(f"no tests/testing_common.py under {sdist}")


def copy_tests(source: Path, target: Path, names: dict[str, str]) -> None:
    shutil.copytree(source, target)
    shutil.copy(HERE / "extra.py", target / "test_extra.py")
    (target / "__init__.py").touch()
    for file, edits in EDITS.items():
        text = (target / file).read_text(encoding="utf-8")
        for pattern, replacement in edits:
            text, count = re.subn(pattern, replacement.format_map(names), text, flags=re.MULTILINE)
            if not count:
                raise SystemExit(f"{file} has no {pattern!r}: selection.py does not fit this version of PEFT")
        (target / file).write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, epilog=EPILOG)
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution, file or folder (default: download)")
    parser.add_argument("--config", default="hawada_peft:HawAdaConfig", help="the tuner's config class, module:Class")
    parser.add_argument("--cache", type=Path, help="keep the tiny models here between runs (default: make them anew)")
    options, pytest_args = parser.parse_known_args()

    with tempfile.TemporaryDirectory(prefix="peft_suite_") as folder:
        scratch = Path(folder)
        source = find_tests((options.sdist or fetch_sdist(scratch)).resolve(), scratch)
        cache = (options.cache or scratch / "cache").resolve()
        hub = scratch / "huggingface" / "hub"
        os.environ |= {
            "HF_HOME": str(hub.parent),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PEFT_SUITE_CONFIG": options.config,
            "PYTHONPATH": os.pathsep.join(filter(None, [folder, str(HERE), os.environ.get("PYTHONPATH")])),
        }
        import models  # these two read the environment
        import plugin

        models.ensure_models(cache)
        shutil.copytree(cache, hub)  # the adapters are this run's own
        models.save_adapters(hub, plugin.Ours)
        copy_tests(source, scratch / "tests", plugin.NAMES)
        (scratch / "pytest.ini").write_text("[pytest]\naddopts = -q -p plugin -p no:cacheprovider --disable-warnings")
        files = [f"tests/{file}" for file in FILES]
        return subprocess.run([sys.executable, "-m", "pytest", *files, *pytest_args], cwd=scratch).returncode


if __name__ == "__main__":
    raise SystemExit(main())
