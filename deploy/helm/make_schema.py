"""Writes the `config` parts of the chart's values.schema.json from the services' configurations.

`python deploy/helm/make_schema.py`; a test compares. What the chart sets itself is no value.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

SCHEMA = Path(__file__).parent / "rhizome" / "values.schema.json"

CONFIGS = {
    "gateway": "GatewayConfig",
    "tokenizer": "TokenizerConfig",
    "scheduler": "SchedulerConfig",
    "cache_index": "CacheIndexConfig",
    "controller": "ControllerConfig",
    "worker": "WorkerConfig",
}
# Fields that templates fill from other values, or from what they make.
_OF_ALL = {
    "health_port",
    "metrics_port",
    "log_format",
    "otlp_traces_endpoint",
    "trace_sample_ratio",
}
_OF_ALL |= {"tls_cert_file", "tls_key_file", "tls_ca_file", "tls_server_name"}
SET_BY_THE_CHART = {
    "gateway": _OF_ALL
    | {"host", "port", "grpc_listen", "gateway_id", "schedulers", "tokenizers", "tenants"}
    | {"redis_url", "api_keys", "admin_api_key", "ssl_certfile", "ssl_keyfile"},
    "tokenizer": _OF_ALL | {"listen", "model_path", "chat_template"},
    "scheduler": _OF_ALL | {"listen", "cache_index", "leader_lease", "tenants", "pools"},
    "cache_index": _OF_ALL | {"listen", "scheduler"},
    "controller": _OF_ALL | {"release", "scheduler", "leader_lease"},
    "worker": _OF_ALL
    | {"listen", "advertise_address", "scheduler", "worker_id", "role", "label", "device"}
    | {"model_path", "served_model_name", "chat_template", "kernel_cache_dir"}
    | {"tp_size", "nnodes", "node_rank", "nccl_init_addr"},
}
# What means nothing in a pod, or has another form there: one key for all is no Secret of several
# keys, the Lease elects instead of Redis, and a pod sees its own GPUs only.
NEVER_SET = {
    "gateway": {"parent_pid", "api_key"},
    "tokenizer": {"parent_pid"},
    "scheduler": {"parent_pid", "redis_url", "kubeconfig"},
    "cache_index": {"parent_pid"},
    "controller": {"parent_pid", "kubeconfig"},
    "worker": {"parent_pid", "base_gpu_id"},
}


class ConfigField(NamedTuple):
    """A field as operators know it."""

    name: str
    type: Any
    description: str


def config_type(service: str) -> type:
    """The dataclass of a service's configuration."""
    loaded = getattr(import_module(f"services.{service}.config"), CONFIGS[service])
    assert isinstance(loaded, type)
    return loaded


def config_fields(config: type) -> Iterator[ConfigField]:
    """All fields; those of a nested dataclass count as the config's own, as they do as flags."""
    hints = typing.get_type_hints(config, include_extras=False)
    described = _descriptions(config)
    for field in fields(config):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from config_fields(typing.cast(type, hint))
        else:
            yield ConfigField(field.name, hint, described.get(field.name, ""))


def config_schema(service: str) -> dict[str, Any]:
    """What `<service>.config` may hold."""
    hidden = SET_BY_THE_CHART[service] | NEVER_SET[service]
    properties = {
        field.name: _value_schema(field.type) | {"description": field.description}
        for field in config_fields(config_type(service))
        if field.name not in hidden
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _descriptions(config: type) -> dict[str, str]:
    """The docstrings below the fields, of base classes too."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                found[statement.target.id] = " ".join(str(following.value.value).split())
    return found


def _value_schema(hint: Any) -> dict[str, Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (inner,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
        schema = _value_schema(inner)
        if "enum" in schema:
            return schema | {"enum": [*schema["enum"], None]}
        kind = schema["type"]
        return schema | {"type": [*(kind if isinstance(kind, list) else [kind]), "null"]}
    if typing.get_origin(hint) is Literal:
        return {"enum": list(typing.get_args(hint))}
    if typing.get_origin(hint) is tuple:
        return {"type": "array", "items": {"type": "string"}}
    if hint is float:
        # YAML's infinity is none in JSON.
        return {"type": ["number", "string"], "pattern": "^inf$"}
    return {"type": {bool: "boolean", int: "integer", str: "string", Path: "string"}[hint]}


def main() -> None:
    schema = json.loads(SCHEMA.read_text())
    for service in CONFIGS:
        schema["$defs"][f"{service}_config"] = config_schema(service)
    SCHEMA.write_text(json.dumps(schema, indent=2) + "\n")


if __name__ == "__main__":
    main()
