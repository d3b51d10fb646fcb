"""Runs PEFT's own test suite on an outside tuner, offline. See README.md."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def fetch_sdist(folder: Path) -> Path:
    version = importlib.metadata.version("peft")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", f"peft=={version}"]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    return next(folder.glob("peft-*.tar.gz"))


def find_tests(sdist: Path, scratch: Path) -> Path:
    """PEFT's tests folder in a source distribution, packed or not."""
    if sdist.is_file():
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        sdist = scratch
    for tests in (sdist, sdist / "tests", *sdist.glob("*/tests")):
        if (tests / "testing_common.py").exists():
            return tests
    raise SystemExit(f"no tests/testing_common.py under {sdist}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Further arguments go to pytest, such as -n 2 -k merge.")
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution, a tar.gz or a folder (default: download)")
    parser.add_argument("--config", default="hawada_peft:HawAdaConfig", help="the tuner's config class, module:Class")
    parser.add_argument("--cache", type=Path, help="keep the tiny models here between runs (default: made anew)")
    options, pytest_args = parser.parse_known_args()

    with tempfile.TemporaryDirectory(prefix="peft_suite_") as name:
        scratch = Path(name)
        cache = (options.cache or scratch / "cache").resolve()
        environment = os.environ | {
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PEFT_SUITE_CONFIG": options.config,
            "PYTHONPATH": os.pathsep.join(filter(None, [name, str(HERE), os.environ.get("PYTHONPATH")])),
        }
        os.environ.update(environment)
        from models import ensure_models

        ensure_models(cache / "hub")
        shutil.copytree(find_tests(options.sdist or fetch_sdist(scratch), scratch), scratch / "tests", dirs_exist_ok=True)
        shutil.copy(HERE / "extra.py", scratch / "tests" / "test_extra.py")
        (scratch / "tests" / "__init__.py").touch()
        (scratch / "pytest.ini").write_text("[pytest]\naddopts = -q -p no:cacheprovider --disable-warnings\n")
        files = [str(scratch / "tests" / file) for file in os.environ.get("FILES","").split()]
        command = [sys.executable, "-m", "pytest", "-p", "plugin", "--rootdir", name, *files, *pytest_args]
        return subprocess.run(command, cwd=scratch, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
