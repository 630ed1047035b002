"""Where models come from: the forms of `model`, caches, downloads, tokenizers' files."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chart.rendering import HelmError, Pod, render, template


def volume(pod: Pod, name: str = "models") -> dict[str, Any]:
    (found,) = (volume for volume in pod.spec["volumes"] if volume["name"] == name)
    return {kind: value for kind, value in found.items() if kind != "name"}


def mount(pod: Pod, name: str = "models") -> tuple[str, bool]:
    (found,) = (m for m in pod.container["volumeMounts"] if m["name"] == name)
    return found["mountPath"], found.get("readOnly", False)


def test_the_built_in_model_needs_no_volume() -> None:
    for name in ("rhizome-worker-main", "rhizome-tokenizer"):
        pod = render().pod(name)
        assert "models" not in {volume["name"] for volume in pod.spec["volumes"]}
        assert not [env for env in pod.env if env.endswith("MODEL_PATH")]


def test_a_directory_of_a_claim_is_mounted_read_only_everywhere() -> None:
    manifests = render({"model": "pvc://weights/qwen/Qwen3-8B/"})
    for name, service in (("rhizome-worker-main", "WORKER"), ("rhizome-tokenizer", "TOKENIZER")):
        pod = manifests.pod(name)
        assert volume(pod) == {"persistentVolumeClaim": {"claimName": "weights", "readOnly": True}}
        assert mount(pod) == ("/model", True)
        assert pod.env[f"RHIZOME__{service}__MODEL_PATH"] == "/model/qwen/Qwen3-8B"
    served = manifests.pod("rhizome-worker-main").env["RHIZOME__WORKER__SERVED_MODEL_NAME"]
    assert served == "Qwen3-8B"


def test_a_path_is_a_directory_of_the_node() -> None:
    pod = render({"model": "/srv/models/Qwen3-8B"}).pod("rhizome-worker-main")
    assert volume(pod) == {"hostPath": {"path": "/srv/models/Qwen3-8B", "type": "Directory"}}
    assert mount(pod) == ("/srv/models/Qwen3-8B", True)


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "hf://Qwen/Qwen3-8B"])
def test_a_model_of_the_hub_is_downloaded_before_the_worker_starts(model: str) -> None:
    pod = render({"model": model}).pod("rhizome-worker-main")
    download = pod.spec["initContainers"][-1]
    path = pod.env["RHIZOME__WORKER__MODEL_PATH"]
    assert download["args"][:4] == [
        *("download", "Qwen/Qwen3-8B", "--revision=main", f"--local-dir={path}")
    ]
    assert "--include=*.safetensors" in download["args"]
    assert pod.env["RHIZOME__WORKER__SERVED_MODEL_NAME"] == "Qwen/Qwen3-8B"
    assert mount(pod) == ("/models", True)


def test_a_revision_has_a_directory_of_its_own() -> None:
    pod = render({"model": "Qwen/Qwen3-8B@v1.1"}).pod("rhizome-worker-main")
    assert "--revision=v1.1" in pod.spec["initContainers"][-1]["args"]
    assert pod.env["RHIZOME__WORKER__MODEL_PATH"] == "/models/Qwen--Qwen3-8B--v1.1"


def test_tokenizers_download_no_weights_and_need_no_cache() -> None:
    values = {"model": "Qwen/Qwen3-8B", "modelCache": {"existingClaim": "cache"}}
    pod = render(values).pod("rhizome-tokenizer")
    (download,) = pod.spec["initContainers"]
    assert "--include=tokenizer.json" in download["args"] or "--include=*.json" in download["args"]
    assert "--include=*.safetensors" not in download["args"]
    assert volume(pod) == {"emptyDir": {}}


def test_tokenizers_may_get_their_files_from_elsewhere() -> None:
    values = {"model": "/srv/model", "tokenizer": {"model": "Qwen/Qwen3-8B"}}
    manifests = render(values)
    assert manifests.pod("rhizome-tokenizer").spec["initContainers"]
    assert volume(manifests.pod("rhizome-worker-main"))["hostPath"]["path"] == "/srv/model"


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        ({}, {"emptyDir": {}}),
        ({"sizeLimit": "100Gi"}, {"emptyDir": {"sizeLimit": "100Gi"}}),
        ({"existingClaim": "mine"}, {"persistentVolumeClaim": {"claimName": "mine"}}),
        ({"claim": {"create": True}}, {"persistentVolumeClaim": {"claimName": "rhizome-models"}}),
        ({"hostPath": "/var/m"}, {"hostPath": {"path": "/var/m", "type": "DirectoryOrCreate"}}),
    ],
    ids=str,
)
def test_downloads_are_kept_where_the_cache_is(
    cache: dict[str, Any], expected: dict[str, Any]
) -> None:
    pod = render({"model": "a/b", "modelCache": cache}).pod("rhizome-worker-main")
    assert volume(pod) == expected


def test_a_claim_of_the_chart_outlives_the_release() -> None:
    cache = {"claim": {"create": True, "size": "1Ti", "storageClassName": "fast"}}
    claim = render({"model": "a/b", "modelCache": cache}).get(
        "PersistentVolumeClaim", "rhizome-models"
    )
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"]["resources"]["requests"]["storage"] == "1Ti"
    assert claim["spec"]["storageClassName"] == "fast"


def test_two_caches_are_refused() -> None:
    cache = {"existingClaim": "mine", "hostPath": "/var/m"}
    with pytest.raises(HelmError, match="give one of existingClaim, claim.create and hostPath"):
        template({"model": "a/b", "modelCache": cache})


def test_the_hubs_token_comes_from_a_secret() -> None:
    cache = {"tokenSecret": {"name": "hub", "key": "t"}, "endpoint": "https://hub.example.com"}
    pod = render({"model": "a/b", "modelCache": cache}).pod("rhizome-worker-main")
    env = {entry["name"]: entry for entry in pod.spec["initContainers"][-1]["env"]}
    assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "t"}}
    assert env["HF_ENDPOINT"]["value"] == "https://hub.example.com"


def test_several_models_are_declared_as_pools() -> None:
    values = {
        "model": "pvc://models/base",
        "servedModelName": "base-name",
        "worker": {"groups": {"a": {}, "b": {"model": "pvc://models/tuned"}}},
    }
    manifests = render(values)
    config = manifests.get("ConfigMap", "rhizome-config")["data"]
    assert (
        config["pools.json"] == '[{"served_model_name":"base-name"},{"served_model_name":"tuned"}]'
    )
    pod = manifests.pod("rhizome-scheduler")
    assert pod.env["RHIZOME__SCHEDULER__POOLS"] == "/etc/rhizome/config/pools.json"


def test_one_model_needs_no_declaration() -> None:
    manifests = render({"worker": {"groups": {"a": {}, "b": {"role": "decode"}}}})
    assert ("ConfigMap", "rhizome-config") not in manifests
    assert "RHIZOME__SCHEDULER__POOLS" not in manifests.pod("rhizome-scheduler").env


def test_tokenizers_and_workers_have_the_same_chat_template() -> None:
    manifests = render({"chatTemplate": "chatml"})
    assert manifests.pod("rhizome-tokenizer").env["RHIZOME__TOKENIZER__CHAT_TEMPLATE"] == "chatml"
    assert manifests.pod("rhizome-worker-main").env["RHIZOME__WORKER__CHAT_TEMPLATE"] == "chatml"


def test_preloading_pulls_every_image_and_downloads_every_model_once() -> None:
    values = {
        "model": "a/b",
        "preload": {"enabled": True, "nodeSelector": {"gpu": "yes"}},
        "modelCache": {"hostPath": "/var/m"},
        "worker": {"groups": {"x": {}, "y": {"device": "cpu"}, "z": {"model": "c/d"}}},
    }
    pod = render(values).pod("rhizome-preload")
    assert pod.kind == "DaemonSet"
    assert pod.spec["nodeSelector"] == {"gpu": "yes"}
    images = {container["image"] for container in pod.containers}
    assert images == {
        *("rhizome-worker:0.1.0", "rhizome-worker-cpu:0.1.0", "rhizome-download:0.1.0")
    }
    downloads = [c["args"][1] for c in pod.spec["initContainers"] if "args" in c]
    assert downloads == ["a/b", "c/d"]
    names = [container["name"] for container in pod.containers]
    assert len(set(names)) == len(names)
