"""A container without an image: a process with a machine's network, and a root file system of its
own, which is this host's with other files mounted into it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.network import Machine
from tests.cluster.programs import DIE_WITH_PARENT
from tests.e2e.system import ROOT

# The user that the images have.
USER = 10001
# What an image holds of Rhizome is this repository, and Python with its packages.
_PLACES = {path.resolve() for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix))}
_PROGRAM_PATHS = [path for path in _PLACES if not _PLACES & set(path.parents)]
_ENVIRONMENT = {
    "PATH": f"{sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONPATH": str(ROOT),
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerSpec:
    """What runs, and what it finds."""

    name: str
    machine: Machine
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    hostname: str = ""
    # Becomes /etc/hosts, the only source of names.
    hosts: Path
    # By path in the container: a folder or file of this host, or None for an empty writable folder.
    mounts: Mapping[str, Path | None] = field(default_factory=dict)
    read_only_root: bool = True
    user: int = USER


class Container:
    """Runs a spec until `close`; who ends is started again, as the kubelet does."""

    def __init__(
        self, spec: ContainerSpec, directory: Path, *, restart_delay_s: float = 1.0
    ) -> None:
        self.spec = spec
        self._directory = directory / spec.name
        self._directory.mkdir(parents=True)
        self.log = self._directory / "log"
        # Exit statuses so far.
        self.statuses: list[int] = []
        self._restart_delay_s = restart_delay_s
        self._closing = threading.Event()
        self._started = threading.Event()
        self.process: subprocess.Popen[bytes]
        # The kernel ends the process when the thread that started it ends, so the thread stays.
        self._thread = threading.Thread(target=self._keep_running, daemon=True)
        self._thread.start()
        self._started.wait()

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        self._closing.set()
        # Again, because it may be starting anew.
        while self._thread.is_alive():
            self.process.kill()
            self._thread.join(0.1)

    def _keep_running(self) -> None:
        while not self._closing.is_set():
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    command_of(self.spec, self._directory),
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            self._started.set()
            self.statuses.append(self.process.wait())
            self._closing.wait(self._restart_delay_s)


def run_once(
    spec: ContainerSpec, directory: Path, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a spec to its end."""
    place = directory / spec.name
    place.mkdir(parents=True)
    return subprocess.run(
        command_of(spec, place),
        env={},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def command_of(spec: ContainerSpec, directory: Path) -> list[str]:
    """The command that makes the root file system under `directory` and becomes the container."""
    environment = {**_ENVIRONMENT, **spec.environment}
    return [
        *("/usr/bin/env", f"PATH={environment['PATH']}"),
        *DIE_WITH_PARENT,
        *spec.machine.entering,
        *("unshare", "--mount", "--uts", "--propagation", "private"),
        *("sh", "-eu", "-c", _script(spec, directory), "sh"),
        *("env", "-i", *(f"{name}={value}" for name, value in environment.items())),
        *spec.command,
    ]


def _script(spec: ContainerSpec, directory: Path) -> str:
    work = directory / "root"
    work.mkdir(exist_ok=True)
    root = work / "merged"
    lines = [
        f"hostname {spec.hostname or spec.name}",
        f"mount -t tmpfs none {work}",
        f"mkdir {work}/upper {work}/work {root}",
        f"mount -t overlay -o lowerdir=/,upperdir={work}/upper,workdir={work}/work none {root}",
        *(f"mount --rbind /{name} {root}/{name}" for name in ("proc", "sys", "dev")),
    ]

    def mount(source: Path | None, target: str) -> None:
        # A link in the path, such as /var/run, would lead out of the new root.
        place = shlex.quote(f"{root}{os.path.realpath(target)}")
        if source is None:
            lines.extend(
                (f"mkdir -p {place}", f"mount -t tmpfs none {place}", f"chmod 1777 {place}")
            )
            return
        if source.is_dir():
            lines.append(f"mkdir -p {place}")
        else:
            lines.append(f"mkdir -p $(dirname {place}) && rm -f {place} && touch {place}")
        lines.append(f"mount --rbind {shlex.quote(str(source))} {place}")

    for target, source in sorted(spec.mounts.items()):
        mount(source, target)
    for path in _PROGRAM_PATHS:
        mount(path, str(path))
        # The user of the images may pass through, though root's home may be in the way.
        lines.extend(f"chmod a+x {root}{parent}" for parent in path.parents[:-1])
    mount(spec.hosts, "/etc/hosts")
    # No name server: a name that is not in the hosts file does not exist.
    lines.append(f"rm -f {root}/etc/resolv.conf && touch {root}/etc/resolv.conf")
    if spec.read_only_root:
        lines.append(f"mount -o remount,ro {root}")
    rights = (
        f"--reuid {spec.user} --regid {spec.user} --clear-groups --no-new-privs --bounding-set -all"
    )
    lines += [
        f"cd {root}",
        f'exec chroot {root} setpriv {rights} --inh-caps -all --pdeathsig KILL -- "$@"',
    ]
    return "\n".join(lines)
