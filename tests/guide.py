"""The examples of CONTRIBUTING, run as they stand there."""

import re
from pathlib import Path
from typing import Any

GUIDE = Path(__file__).parent.parent / "CONTRIBUTING.md"


def example(name: str) -> Any:
    """The class ``name`` of the one example that defines it."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if f"class {name}" in block)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, str(GUIDE), "exec"), names)
    return names[name]
