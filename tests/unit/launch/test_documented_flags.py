import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from services.cache_index.config import CacheIndexConfig
from services.common.config import parse_config
from services.gateway.config import GatewayConfig
from services.launch.config import OfflineConfig, ServeConfig
from services.scheduler.config import SchedulerConfig
from services.tokenizer.config import TokenizerConfig
from services.worker.config import WorkerConfig

DOCS = Path(__file__).parents[3] / "docs"
CONFIGS: dict[str, Any] = {
    "gateway": GatewayConfig,
    "tokenizer": TokenizerConfig,
    "scheduler": SchedulerConfig,
    "cache_index": CacheIndexConfig,
    "worker": WorkerConfig,
}


def test_every_flag_of_serve_is_in_the_documentation():
    text = (DOCS / "tuning.md").read_text() + (DOCS / "quick-start.md").read_text()
    text += (DOCS / "chat-templates.md").read_text()
    missing = [
        flag
        for field in fields(ServeConfig)
        if (flag := "--" + field.name.replace("_", "-")) not in text
    ]
    assert missing == []


def test_every_flag_of_offline_is_in_the_documentation():
    text = (DOCS / "slurm.md").read_text()
    own = {field.name for field in fields(OfflineConfig)} - {f.name for f in fields(ServeConfig)}
    assert own
    assert [name for name in own if f"`--{name.replace('_', '-')}`" not in text] == []


def test_every_command_that_starts_a_service_is_accepted_by_it():
    text = (DOCS / "quick-start.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    python -m services\.(\w+) (.*)$", text, re.MULTILINE)
    assert {service for service, _ in commands} == set(CONFIGS)
    for service, flags in commands:
        parse_config(CONFIGS[service], service, shlex.split(flags))


def test_every_page_is_in_the_readme():
    readme = (DOCS.parent / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in readme] == []
