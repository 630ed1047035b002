"""The Dockerfile installs extras that exist and starts programs that exist, a target per image."""

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SERVICES = {"gateway", "tokenizer", "scheduler", "cache_index", "controller", "worker"}
IMAGES = {"gateway", "tokenizer", "scheduler", "cache-index", "controller", "worker", "worker-cpu"}


class Stage:
    """A stage of the Dockerfile: what it is built on, and its instructions."""

    def __init__(self, text: str) -> None:
        head, _, self.body = text.partition("\n")
        self.base, _, self.name = head.partition(" AS ")


STAGES = {
    stage.name: stage for stage in map(Stage, re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:])
}


def test_every_service_has_a_target_that_starts_it() -> None:
    started = re.findall(r'ENTRYPOINT \["python", "-m", "services\.(\w+)"\]', DOCKERFILE)
    assert set(started) == SERVICES
    assert len(started) == len(IMAGES)
    assert all(find_spec(f"services.{name}.__main__") for name in started)


@pytest.mark.parametrize("image", sorted(IMAGES))
def test_an_image_has_its_dependencies_below_its_source(image: str) -> None:
    body = STAGES[image].body
    assert STAGES[f"{image}-dependencies"].base == "dependencies"
    dependencies = body.index(f"COPY --from={image}-dependencies /opt/rhizome /opt/rhizome")
    assert dependencies < body.index("pip install --no-deps /wheels/*.whl")
    assert "services services" not in STAGES["dependencies"].body


@pytest.mark.parametrize("image", sorted(IMAGES | {"download"}))
def test_an_image_runs_as_a_user_that_the_kubelet_knows_is_not_root(image: str) -> None:
    users = re.findall(r"^USER (.+)$", STAGES[image].body, re.MULTILINE)
    assert users == ["10001"]


def test_installed_extras_exist_under_their_normal_names() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    installed = set(re.findall(r"'\.\[([\w-]+)\]'", DOCKERFILE))
    default = re.search(r"^ARG WORKER_EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert default is not None
    installed.add(default[1])
    assert installed == {name.replace("_", "-") for name in SERVICES}
    assert installed <= set(extras)


def test_only_the_workers_images_hold_torch() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    with_torch = {name for name, needs in extras.items() if any("torch" in need for need in needs)}
    assert with_torch == {"worker"}


def test_both_workers_images_hold_the_torch_that_the_project_asks_for() -> None:
    (asked,) = (
        need
        for need in PYPROJECT["project"]["optional-dependencies"]["worker"]
        if need.startswith("torch")
    )
    assert f"'{asked}'" in STAGES["worker-cpu-dependencies"].body
