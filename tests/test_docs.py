"""The code of the pages for users runs as it is printed, top to bottom."""

import re
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", ["training", "serving"])
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = (DOCS / f"{page}.md").read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks
    names: dict = {"__name__": page}
    for block in blocks:
        line = text.count("\n", 0, block.start()) + 1
        exec(compile("\n" * line + block[1], f"docs/{page}.md", "exec"), names)  # a failure names the page's own line
