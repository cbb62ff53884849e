"""The examples of CONTRIBUTING and of docs/new_host.md, run as they stand there."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GUIDES = (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "new_host.md")


def example(name: str) -> Any:
    """The class ``name`` of the one example that defines it."""
    text = "".join(guide.read_text(encoding="utf-8") for guide in GUIDES)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (block,) = (block for block in blocks if f"class {name}" in block)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, name, "exec"), names)
    return names[name]
