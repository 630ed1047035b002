"""The Dockerfile installs extras that exist and starts programs that exist, one per service."""

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SERVICES = {"gateway", "tokenizer", "scheduler", "cache_index", "worker"}


def test_every_service_has_a_target_that_starts_it() -> None:
    started = re.findall(r'ENTRYPOINT \["python", "-m", "services\.(\w+)"\]', DOCKERFILE)
    assert set(started) == SERVICES
    assert len(started) == len(SERVICES)
    assert all(find_spec(f"services.{name}.__main__") for name in started)
    targets = re.findall(r"^FROM runtime AS ([\w-]+)$", DOCKERFILE, re.MULTILINE)
    assert {target.replace("-", "_") for target in targets} == SERVICES


def test_installed_extras_exist_under_their_normal_names() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    installed = re.findall(r"'\.\[([\w-]+)\]'", DOCKERFILE)
    assert len(installed) == len(SERVICES)
    assert set(installed) <= set(extras)
    # Older pips find an extra only by its normal name.
    assert all(re.fullmatch("[a-z-]+", name) for name in extras)


def test_only_the_workers_image_holds_torch() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    with_torch = {name for name, needs in extras.items() if any("torch" in need for need in needs)}
    assert with_torch == {"worker"}
