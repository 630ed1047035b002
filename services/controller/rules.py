"""What an operator asks of a group's autoscaling: the annotation of its StatefulSets."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Target = Annotated[float, msgspec.Meta(gt=0)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class ScalingRules(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"
):
    """Bounds, targets and windows; docs/kubernetes-controller.md describes each."""

    min_replicas: Annotated[int, msgspec.Meta(ge=1)]
    max_replicas: Annotated[int, msgspec.Meta(ge=1)]
    # A target of None is not looked at.
    saturation: _Target | None = 0.8
    queue_seconds: _Target | None = 2.0
    kv_used: _Target | None = 0.9
    scale_up_window_seconds: _Seconds = 15.0
    scale_down_window_seconds: _Seconds = 300.0
    drain_timeout_seconds: _Seconds = 600.0

    def __post_init__(self) -> None:
        if self.max_replicas < self.min_replicas:
            raise ValueError("maxReplicas must be >= minReplicas")
        if self.saturation is None and self.queue_seconds is None and self.kv_used is None:
            raise ValueError("one of saturation, queueSeconds and kvUsed must have a target")


def read_rules(annotation: str) -> ScalingRules:
    """Raises ValueError, naming what is wrong."""
    try:
        return msgspec.json.decode(annotation, type=ScalingRules)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
