"""Loads a service's frozen config dataclass from flags, then the environment, then defaults.

Flag `--page-size`, then `RHIZOME__WORKER__PAGE_SIZE` (double underscores: Kubernetes injects
`RHIZOME_WORKER_PORT=tcp://…` for a Service of that name). An unknown flag or a value that does not
parse is one line that names it, and exit status 2. This is the only reader of the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import App, Parameter
from cyclopts.config import Env

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# No service forks without exec; gRPC's fork handlers would only warn. Read when gRPC loads.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

Config = TypeVar("Config", bound="DataclassInstance")


def parse_config(
    config_type: type[Config],
    service: str,
    argv: Sequence[str] | None = None,
    program: str | None = None,
) -> Config:
    """Read `config_type`, a frozen dataclass; `service` is part of the environment's prefix.

    `program` is what `--help` calls the command. Prints the reason and exits with status 2 on bad
    input, with 0 after `--help`.
    """
    app = App(
        name=program or f"python -m services.{service}",
        config=Env(f"RHIZOME__{service.upper()}__", command=False),
        help=(config_type.__doc__ or "").strip(),
        result_action="return_value",
        version_flags=[],
    )

    def load(config: object) -> object:
        return config

    # The type is known only here, so the annotation is set by hand; cyclopts wants a default
    # exactly where every field has one.
    load.__annotations__["config"] = Annotated[config_type, Parameter(name="*")]
    if not any(_is_required(field) for field in fields(config_type)):
        load.__defaults__ = (config_type(),)
    app.default(load)

    try:
        config = app(list(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        sys.exit(_report(service, error))
    if config is None:
        sys.exit(0)
    assert isinstance(config, config_type), "cyclopts returns what `load` returned"
    return config


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra` on top, for starting a child."""
    return {**os.environ, **extra}


def set_default_environment(defaults: Mapping[str, str]) -> None:
    """Set what the environment leaves open, for libraries that read it and for all children."""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def set_environment(values: Mapping[str, str]) -> None:
    """Set what a flag says, for libraries that read it and for all children."""
    os.environ.update(values)


def engine_environment(kernel_cache_dir: Path | None) -> dict[str, str]:
    """What libraries must find before torch is imported: how products are chosen, unless it is set.

    And where Triton, FlashInfer and torch's compiler keep kernels; None for their own places.
    """
    # The same as torch.backends.cuda.preferred_blas_library, which prints a warning.
    chosen = {"TORCH_BLAS_PREFER_CUBLASLT": os.environ.get("TORCH_BLAS_PREFER_CUBLASLT", "1")}
    if kernel_cache_dir is None:
        return chosen
    root = kernel_cache_dir.resolve()
    return chosen | {
        "TRITON_CACHE_DIR": str(root / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(root),
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
    }


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _report(service: str, error: ValueError) -> int:
    print(f"{service}: {error}", file=sys.stderr)
    return 2
