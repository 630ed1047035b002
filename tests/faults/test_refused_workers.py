"""Workers that do not fit their pool: refused, saying why, and without harm to those that do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from services.common.model_files import builtin_model_path
from tests.fakes.cluster import running_cluster
from tests.faults.settled import until_ready, worker_info
from tests.faults.streams import run_streams

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


def another_tokenizer(path: Path) -> Path:
    """The built-in one but for its last merge."""
    shutil.copytree(builtin_model_path(), path, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def test_workers_of_another_kind_are_refused_saying_why(tmp_path: Path, num_streams: int) -> None:
    odd = {
        "page_size": ("--page-size", "32"),
        "tokenizer_digest": ("--tokenizer-path", str(another_tokenizer(tmp_path / "tokenizer"))),
    }
    with running_cluster(num_schedulers=1, num_gateways=1, num_workers=1) as cluster:
        for number, arguments in enumerate(odd.values(), start=1):
            cluster.start(
                f"worker-{number}",
                *("--listen", f"unix:{cluster.directory}/worker-{number}.sock"),
                *("--scheduler", f"unix:{cluster.directory}/scheduler-0.sock"),
                *("--worker-id", f"w{number}", *arguments),
            )
        for number, field in enumerate(odd, start=1):
            cluster.wait_for("scheduler-0", f"event=worker_refused worker=w{number} field={field}")
            cluster.wait_for(f"worker-{number}", field)
            (refusal,) = worker_info(cluster, number).refusals
            assert field in refusal
        until_ready(cluster, 1)
        assert all(one.text for one in run_streams(cluster.clients, num_streams, lambda: None))
        for number in (1, 2):
            assert worker_info(cluster, number).load.num_output_tokens == 0
