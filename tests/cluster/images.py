"""What the images of deploy/docker/Dockerfile start, and with which environment."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field

from tests.e2e.system import ROOT

_DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
# Images of others, which run what they are told; its program is this host's.
_FOREIGN = {"redis"}


@dataclass(slots=True)
class Image:
    """A target of the Dockerfile."""

    entrypoint: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def image_of(name: str) -> Image:
    """By what a pod names: `registry/rhizome-gateway:1.0`."""
    short = name.rpartition("/")[2].partition("@")[0].partition(":")[0]
    if short in _FOREIGN:
        return Image()
    return _targets()[short.removeprefix("rhizome-")]


@functools.cache
def _targets() -> dict[str, Image]:
    targets: dict[str, Image] = {}
    current = Image()
    for line in _DOCKERFILE.read_text().replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            base = targets.get(source.strip(), Image())
            current = Image(base.entrypoint, dict(base.environment))
            targets[name.strip()] = current
        elif word == "ENV":
            current.environment |= dict(re.findall(r"(\w+)=(\S+)", rest))
        elif word == "ENTRYPOINT":
            current.entrypoint = tuple(json.loads(rest))
    # Where the image has its Python.
    for image in targets.values():
        image.environment.pop("PATH", None)
    return targets
