"""Groups of workers: sets, ranks, ports, placement, and what is refused while rendering."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tests.chart.rendering import HelmError, Manifests, Pod, group, render, template

CUDA_NODES = {"tp": 8, "nodes": 2}


def worker_sets(manifests: Manifests) -> dict[str, Any]:
    return {
        name: entry
        for name, entry in manifests.of_kind("StatefulSet").items()
        if entry["metadata"]["labels"]["app.kubernetes.io/component"] == "worker"
    }


def host_ports(pod: Pod) -> set[int]:
    return {port["hostPort"] for port in pod.container["ports"]}


def test_without_groups_there_is_one_named_main() -> None:
    (name,) = worker_sets(render({"model": "pvc://models/some"}))
    assert name == "rhizome-worker-main"


def test_the_built_in_model_runs_on_cpus_and_takes_no_gpu() -> None:
    pod = render().pod("rhizome-worker-main")
    assert pod.env["RHIZOME__WORKER__DEVICE"] == "cpu"
    assert pod.container["image"] == "rhizome-worker-cpu:0.1.0"
    assert "resources" not in pod.container


def test_another_model_runs_on_gpus_as_many_as_it_has_ranks() -> None:
    pod = render(group(tp=4)).pod("rhizome-worker-main")
    assert pod.env["RHIZOME__WORKER__DEVICE"] == "cuda"
    assert pod.env["RHIZOME__WORKER__TP_SIZE"] == "4"
    assert pod.container["resources"]["limits"] == {"nvidia.com/gpu": 4}


def test_gpus_go_by_the_resources_name() -> None:
    pod = render(group(tp=2, gpuResource="amd.com/gpu")).pod("rhizome-worker-main")
    assert pod.container["resources"]["requests"] == {"amd.com/gpu": 2}


def test_a_group_on_one_node_is_one_set_of_all_its_replicas() -> None:
    (entry,) = worker_sets(render(group(replicas=3, tp=8))).values()
    assert entry["spec"]["replicas"] == 3
    assert entry["spec"]["updateStrategy"] == {"type": "RollingUpdate"}
    assert entry["metadata"]["annotations"] == {"rhizome.ai/nodes": "1"}


def test_zero_replicas_are_zero() -> None:
    (entry,) = worker_sets(render(group(replicas=0))).values()
    assert entry["spec"]["replicas"] == 0


def test_pain_28_m_each_replica_over_nodes_is_a_set_with_a_pod_a_node() -> None:
    manifests = render(group(replicas=2, **CUDA_NODES))
    sets = worker_sets(manifests)
    assert {name: entry["spec"]["replicas"] for name, entry in sets.items()} == {
        "rhizome-worker-main-0": 2,
        "rhizome-worker-main-1": 2,
    }
    for unit, (name, entry) in enumerate(sets.items()):
        assert entry["spec"]["podManagementPolicy"] == "Parallel"
        # The controller replaces pods of an outdated unit, all at once.
        assert entry["spec"]["updateStrategy"] == {"type": "OnDelete"}
        assert entry["metadata"]["annotations"]["rhizome.ai/nodes"] == "2"
        assert entry["spec"]["template"]["metadata"]["labels"]["rhizome.ai/unit"] == str(unit)
        service = manifests.get("Service", name)["spec"]
        assert service["clusterIP"] == "None"
        assert service["publishNotReadyAddresses"] is True
        assert entry["spec"]["serviceName"] == name


def test_autoscaled_units_are_all_there_and_the_first_are_on() -> None:
    sets = worker_sets(render(group(replicas=2, minReplicas=1, maxReplicas=4, **CUDA_NODES)))
    assert [entry["spec"]["replicas"] for entry in sets.values()] == [2, 2, 0, 0]
    for entry in sets.values():
        bounds = json.loads(entry["metadata"]["annotations"]["rhizome.ai/autoscaling"])
        assert bounds == {"minReplicas": 1, "maxReplicas": 4}


def test_targets_of_the_controller_go_along() -> None:
    values = group(minReplicas=1, maxReplicas=4)
    values["worker"]["autoscaling"] = {"targets": {"saturation": 0.6, "kvUsed": None}}
    (entry,) = worker_sets(render(values)).values()
    bounds = json.loads(entry["metadata"]["annotations"]["rhizome.ai/autoscaling"])
    assert bounds["saturation"] == 0.6


@pytest.mark.parametrize(("replicas", "started"), [(0, 2), (3, 3), (9, 4)])
def test_an_autoscaled_group_starts_within_its_bounds(replicas: int, started: int) -> None:
    (entry,) = worker_sets(render(group(replicas=replicas, minReplicas=2, maxReplicas=4))).values()
    assert entry["spec"]["replicas"] == started


def test_ranks_come_from_the_pods_index_and_meet_at_the_first_pod() -> None:
    pod = render(group(**CUDA_NODES)).pod("rhizome-worker-main-0")
    assert pod.env["RHIZOME__WORKER__NNODES"] == "2"
    assert pod.env["RHIZOME__WORKER__NODE_RANK"] == {
        "fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}
    }
    name = "rhizome-worker-main-0-0.rhizome-worker-main-0.llm.svc"
    assert pod.env["RHIZOME__WORKER__NCCL_INIT_ADDR"] == f"{name}:{pod.ports['nccl']}"
    assert pod.container["resources"]["limits"] == {"nvidia.com/gpu": 4}


def test_workers_are_named_after_their_pods() -> None:
    pod = render(group()).pod("rhizome-worker-main")
    assert pod.env["RHIZOME__WORKER__WORKER_ID"] == "$(POD_NAME)"
    assert pod.env["RHIZOME__WORKER__ADVERTISE_ADDRESS"] == "$(POD_IP):30040"


def test_several_nodes_use_the_host_network_with_the_clusters_names() -> None:
    pod = render(group(**CUDA_NODES)).pod("rhizome-worker-main-0")
    assert pod.spec["hostNetwork"] is True
    assert pod.spec["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert host_ports(pod) == set(pod.ports.values())
    one = render(group(tp=8)).pod("rhizome-worker-main")
    assert "hostNetwork" not in one.spec
    assert not any("hostPort" in port for port in one.container["ports"])


def test_the_host_network_can_be_left_and_joined() -> None:
    apart = render(group(hostNetwork=False, **CUDA_NODES)).pod("rhizome-worker-main-0")
    assert "hostNetwork" not in apart.spec
    assert apart.ports["grpc"] == 30040
    joined = render(group(hostNetwork=True)).pod("rhizome-worker-main")
    assert joined.spec["hostNetwork"] is True


def test_no_two_sets_on_the_host_network_have_a_port_in_common() -> None:
    values = group(replicas=3, **CUDA_NODES)
    values["worker"]["groups"]["other"] = {"replicas": 2, **CUDA_NODES}
    values["worker"]["groups"]["single"] = {"hostNetwork": True}
    pods = [pod for pod in render(values).pods() if pod.component == "worker"]
    assert len(pods) == 6
    for one, other in itertools.combinations(pods, 2):
        assert not host_ports(one) & host_ports(other)
    # Below the ports of NodePorts, and below those that the kernel gives to outgoing connections.
    assert all(port < 30000 for pod in pods for port in host_ports(pod))


def test_a_group_that_is_added_later_leaves_a_given_port_where_it_is() -> None:
    values = group(hostPort=25000, **CUDA_NODES)
    before = render(values).pod("rhizome-worker-main-0").ports
    values["worker"]["groups"]["added"] = CUDA_NODES
    assert render(values).pod("rhizome-worker-main-0").ports == before


def test_pods_of_a_unit_are_on_different_nodes_of_one_rack() -> None:
    pod = render(group(topologyKey="example.com/rack", **CUDA_NODES)).pod("rhizome-worker-main-0")
    selector = {
        "matchLabels": {
            "app.kubernetes.io/instance": "rhizome",
            "rhizome.ai/group": "main",
            "rhizome.ai/unit": "0",
        }
    }
    rule = "requiredDuringSchedulingIgnoredDuringExecution"
    assert pod.spec["affinity"]["podAntiAffinity"][rule] == [
        {"labelSelector": selector, "topologyKey": "kubernetes.io/hostname"}
    ]
    assert pod.spec["affinity"]["podAffinity"][rule] == [
        {"labelSelector": selector, "topologyKey": "example.com/rack"}
    ]


def test_affinities_of_ones_own_are_kept() -> None:
    own = {"labelSelector": {"matchLabels": {"a": "b"}}, "topologyKey": "zone"}
    rule = "requiredDuringSchedulingIgnoredDuringExecution"
    affinity = {"podAntiAffinity": {rule: [own]}, "nodeAffinity": {}}
    pod = render(group(affinity=affinity, **CUDA_NODES)).pod("rhizome-worker-main-0")
    assert pod.spec["affinity"]["podAntiAffinity"][rule][0] == own
    assert len(pod.spec["affinity"]["podAntiAffinity"][rule]) == 2


def test_nccl_is_told_its_interface_and_may_lock_memory() -> None:
    nccl = {"socketInterface": "eth1", "ibHca": "mlx5", "ibDisable": False, "debug": "INFO"}
    pod = render(group(nccl={**nccl, "ipcLock": True}, **CUDA_NODES)).pod("rhizome-worker-main-0")
    told = {name: value for name, value in pod.env.items() if name.startswith(("NCCL", "GLOO"))}
    assert told == {
        "NCCL_SOCKET_IFNAME": "eth1",
        "GLOO_SOCKET_IFNAME": "eth1",
        "NCCL_IB_HCA": "mlx5",
        "NCCL_IB_DISABLE": "0",
        "NCCL_DEBUG": "INFO",
    }
    assert pod.container["securityContext"]["capabilities"] == {
        "drop": ["ALL"],
        "add": ["IPC_LOCK"],
    }


def test_shared_memory_is_as_large_as_asked() -> None:
    pod = render(group(shmSize="16Gi")).pod("rhizome-worker-main")
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod.container["volumeMounts"]}
    assert mounts["shm"] == "/dev/shm"


def test_the_startup_probe_waits_as_long_as_loading_may_take() -> None:
    probe = render(group(startupSeconds=7200)).pod("rhizome-worker-main").container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 7200


def test_the_grace_covers_the_longest_drain() -> None:
    pod = render(group(config={"drain_timeout_s": 600.5})).pod("rhizome-worker-main")
    assert pod.env["RHIZOME__WORKER__DRAIN_TIMEOUT_S"] == "600.5"
    assert pod.spec["terminationGracePeriodSeconds"] == 631


def test_a_groups_values_go_over_the_defaults() -> None:
    values = group(config={"context_length": 8192}, labels={"zone": "a"}, args=["--page-size=32"])
    values["worker"]["groupDefaults"] = {"role": "decode", "config": {"quantization": "fp8"}}
    pod = render(values).pod("rhizome-worker-main")
    assert pod.env["RHIZOME__WORKER__ROLE"] == "decode"
    assert pod.env["RHIZOME__WORKER__CONTEXT_LENGTH"] == "8192"
    assert pod.env["RHIZOME__WORKER__QUANTIZATION"] == "fp8"
    assert pod.env["RHIZOME__WORKER__LABEL"] == "zone=a"
    assert pod.container["args"] == ["--page-size=32"]


def test_large_numbers_are_written_out() -> None:
    values = group(config={"max_total_tokens": 200_000_000})
    pod = render(values).pod("rhizome-worker-main")
    assert pod.env["RHIZOME__WORKER__MAX_TOTAL_TOKENS"] == "200000000"


def test_kernels_of_the_image_are_copied_to_where_others_may_be_added() -> None:
    pod = render(group()).pod("rhizome-worker-main")
    (copying,) = pod.spec["initContainers"]
    (target,) = (mount["mountPath"] for mount in copying["volumeMounts"])
    assert copying["command"][-1] == target == pod.env["RHIZOME__WORKER__KERNEL_CACHE_DIR"]


def test_leader_worker_sets_take_the_place_of_sets_over_nodes() -> None:
    values = group(replicas=2, **CUDA_NODES)
    values["worker"]["leaderWorkerSet"] = {"enabled": True}
    values["worker"]["groups"]["single"] = {}
    manifests = render(values)
    assert set(worker_sets(manifests)) == {"rhizome-worker-single"}
    lws = manifests.get("LeaderWorkerSet", "rhizome-worker-main")["spec"]
    assert lws["replicas"] == 2
    assert lws["leaderWorkerTemplate"]["size"] == 2
    assert lws["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    pod = manifests.pod("rhizome-worker-main")
    rank = "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']"
    assert pod.env["RHIZOME__WORKER__NODE_RANK"] == {"fieldRef": {"fieldPath": rank}}
    assert pod.container["args"] == [f"--nccl-init-addr=$(LWS_LEADER_ADDRESS):{pod.ports['nccl']}"]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"tp": 6, "nodes": 4}, "tp 6 cannot be divided over 4 nodes"),
        ({"tp": 8, "nodes": 2, "gpusPerNode": 8}, "takes 4 on each"),
        ({"tp": 2, "device": "cpu", "gpusPerNode": 2}, "takes 0 on each (device cpu)"),
        ({"maxReplicas": 3}, "minReplicas and maxReplicas go together"),
        ({"minReplicas": 4, "maxReplicas": 3}, "minReplicas 4 is above maxReplicas 3"),
        ({"hostPort": 20000}, "hostPort is for the host network, which is off"),
        ({"replicas": 30, **CUDA_NODES}, "30 replicas need 120 ports"),
        ({"hostPort": 65500, "replicas": 20, **CUDA_NODES}, "go beyond 65535"),
        ({"model": "some model"}, "must be builtin, org/name"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_with_its_groups_name(
    values: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(HelmError) as refusal:
        template(group(**values))
    assert complaint in str(refusal.value)
    if "model" not in values:
        assert "worker.groups.main" in str(refusal.value)


def test_ports_that_collide_are_refused_and_both_groups_named() -> None:
    values = group(hostPort=21000, **CUDA_NODES)
    values["worker"]["groups"]["other"] = {"hostPort": 21003, **CUDA_NODES}
    with pytest.raises(HelmError, match=r"\.other: ports 21003 to 21006 .*\.main"):
        template(values)


def test_names_that_collide_are_refused() -> None:
    values = group(**CUDA_NODES)
    values["worker"]["groups"]["main-0"] = {}
    with pytest.raises(HelmError, match="rhizome-worker-main-0 is also that of"):
        template(values)


def test_a_name_that_no_pod_could_have_is_refused() -> None:
    with pytest.raises(HelmError, match="longer than the 52 characters"):
        template({"worker": {"groups": {"a" * 40: {}}}})


@pytest.mark.parametrize("by", ["hpa", "keda"])
def test_who_cannot_scale_units_is_refused(by: str) -> None:
    values = group(minReplicas=1, maxReplicas=2, **CUDA_NODES)
    values["worker"]["autoscaling"] = {"by": by}
    with pytest.raises(HelmError, match=f"{by} cannot scale replicas of 2 nodes"):
        template(values)


def test_units_are_refused_without_what_restarts_them_as_one() -> None:
    with pytest.raises(HelmError, match="need the controller"):
        template({**group(**CUDA_NODES), "controller": {"enabled": False}})
