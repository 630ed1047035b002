from dataclasses import fields
from pathlib import Path

from services.launch.config import ServeConfig

DOCS = Path(__file__).parents[3] / "docs"


def test_every_flag_of_serve_is_in_the_documentation():
    text = (DOCS / "tuning.md").read_text() + (DOCS / "quick-start.md").read_text()
    text += (DOCS / "chat-templates.md").read_text()
    missing = [
        flag
        for field in fields(ServeConfig)
        if (flag := "--" + field.name.replace("_", "-")) not in text
    ]
    assert missing == []
