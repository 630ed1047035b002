"""A Kubernetes control plane on free ports of this host: the real programs, nodes by kwok."""

from __future__ import annotations

import contextlib
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.cluster.certificates import Authority, encoded, signing_keys, write_kubeconfig
from tests.cluster.kubectl import Kubectl
from tests.cluster.nodes import NODES, STAGES
from tests.cluster.programs import Program, free_ports, tool, until

_ISSUER = "https://kubernetes.default.svc"


class ControlPlane:
    """Owns the processes; `start` returns when pods are scheduled and run, `close` ends all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authority = Authority()
        self.authority_file = directory / "ca.crt"
        self.authority_file.write_bytes(self._authority.certificate)
        self.port = 0
        self.programs: dict[str, Program] = {}

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def kubectl(self) -> Kubectl:
        """As who may do anything."""
        return Kubectl(self._directory / "admin.conf")

    def token_kubeconfig(self, path: Path, token: str) -> Path:
        """A kubeconfig of whom a token names."""
        return write_kubeconfig(path, self.url, self._authority.certificate, {"token": token})

    def start(self) -> None:
        etcd_port, peer_port, self.port = free_ports(3)
        self._start_etcd(etcd_port, peer_port)
        self._start_api_server(etcd_port)
        admin = self._kubeconfig("admin", "tests", "system:masters")
        self._start_rest()
        self._until(
            lambda: self._answers("/readyz"), lambda: self.programs["kube-apiserver"].read_log()
        )
        kubectl = Kubectl(admin)
        kubectl.apply(*NODES)
        self._until(lambda: _ready_nodes(kubectl) == len(NODES), lambda: kubectl("get", "nodes"))
        # Pods cannot be made before.
        self._until(
            lambda: kubectl.exists("serviceaccount", "default", namespace="default"),
            lambda: self.programs["kube-controller-manager"].read_log()[-2000:],
        )

    def close(self) -> None:
        """The API server first, which otherwise waits for etcd."""
        for program in reversed(self.programs.values()):
            program.process.kill()
        for program in self.programs.values():
            program.process.wait()

    def _start(self, name: str, *arguments: str) -> None:
        self.programs[name] = Program(name, [tool(name), *arguments], self._directory)

    def _start_etcd(self, port: int, peer_port: int) -> None:
        url, peer_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
        self._start(
            "etcd",
            *(
                "--data-dir",
                str(self._directory / "etcd"),
                "--log-level",
                "error",
                "--unsafe-no-fsync",
            ),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
            *("--initial-cluster", f"default={peer_url}"),
        )

    def _start_api_server(self, etcd_port: int) -> None:
        names = ("127.0.0.1", "localhost", "kubernetes.default.svc", "10.96.0.1")
        certificate, key = self._authority.server(*names).write(self._directory, "apiserver")
        public, private = signing_keys().write(self._directory, "service-accounts")
        self._start(
            "kube-apiserver",
            *("--etcd-servers", f"http://127.0.0.1:{etcd_port}"),
            *("--bind-address", "127.0.0.1", "--secure-port", str(self.port)),
            *("--tls-cert-file", str(certificate), "--tls-private-key-file", str(key)),
            *("--client-ca-file", str(self.authority_file)),
            *("--authorization-mode", "Node,RBAC", "--service-account-issuer", _ISSUER),
            *("--service-account-key-file", str(public)),
            *("--service-account-signing-key-file", str(private)),
            *("--service-cluster-ip-range", "10.96.0.0/16"),
            # Nobody reaches it by the address of the `kubernetes` Service.
            *("--endpoint-reconciler-type", "none"),
        )

    def _start_rest(self) -> None:
        name = "kube-controller-manager"
        self._start(
            name,
            *("--kubeconfig", str(self._kubeconfig(name, f"system:{name}"))),
            *("--service-account-private-key-file", str(self._directory / "service-accounts.key")),
            *("--root-ca-file", str(self.authority_file), "--use-service-account-credentials"),
            *("--leader-elect=false", "--secure-port", "0"),
        )
        name = "kube-scheduler"
        self._start(
            name,
            *("--kubeconfig", str(self._kubeconfig(name, f"system:{name}"))),
            *("--leader-elect=false", "--secure-port", "0"),
        )
        stages = self._directory / "stages.yaml"
        stages.write_text(STAGES)
        self._start(
            "kwok",
            *("--kubeconfig", str(self._kubeconfig("kwok", "kwok", "system:masters"))),
            *("--manage-all-nodes", "--node-lease-duration-seconds", "40", "--config", str(stages)),
            *("--server-address", f"127.0.0.1:{free_ports(1)[0]}"),
        )

    def _kubeconfig(self, name: str, user: str, group: str = "") -> Path:
        pair = self._authority.client(user, group)
        credentials = {
            "client-certificate-data": encoded(pair.certificate),
            "client-key-data": encoded(pair.key),
        }
        path = self._directory / f"{name}.conf"
        return write_kubeconfig(path, self.url, self._authority.certificate, credentials)

    def _answers(self, path: str) -> bool:
        context = ssl.create_default_context(cafile=str(self.authority_file))
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"{self.url}{path}", context=context, timeout=5) as reply:
                return bool(reply.status == 200)
        return False

    def _until(self, condition: Callable[[], object], say: Callable[[], object]) -> None:
        def holds() -> object:
            for program in self.programs.values():
                program.check()
            return condition()

        until(holds, say=say)


def _ready_nodes(kubectl: Kubectl) -> int:
    nodes = kubectl.get("nodes")["items"]
    conditions = [node["status"].get("conditions", []) for node in nodes]
    return sum(
        any(one["type"] == "Ready" and one["status"] == "True" for one in node)
        for node in conditions
    )


@contextlib.contextmanager
def running_control_plane(directory: Path) -> Iterator[ControlPlane]:
    plane = ControlPlane(directory)
    try:
        plane.start()
        yield plane
    finally:
        plane.close()
