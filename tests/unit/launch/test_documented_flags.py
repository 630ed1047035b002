import re
import shlex
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

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


def flag_names(config: Any) -> list[str]:
    """Of a configuration and of the parts it is made of."""
    names: list[str] = []
    for name, kind in get_type_hints(config).items():
        names += flag_names(kind) if is_dataclass(kind) else [name]
    return names


def test_every_flag_of_serve_is_in_the_documentation():
    text = (DOCS / "tuning.md").read_text() + (DOCS / "quick-start.md").read_text()
    text += (DOCS / "chat-templates.md").read_text() + (DOCS / "security.md").read_text()
    text += (DOCS / "tracing.md").read_text()
    missing = [
        flag
        for name in flag_names(ServeConfig)
        if (flag := "--" + name.replace("_", "-")) not in text
    ]
    assert missing == []


def test_every_flag_of_offline_is_in_the_documentation():
    text = (DOCS / "slurm.md").read_text()
    own = set(flag_names(OfflineConfig)) - set(flag_names(ServeConfig))
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
