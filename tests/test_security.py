"""The page on security has every limit of `medqa/limits.py`, with its value."""

import re
from pathlib import Path

from medqa import limits

PAGE = (Path(__file__).parents[1] / "docs" / "security.md").read_text(encoding="utf-8")


def test_the_page_has_every_limit():
    """After a change of a limit, or for a new one, edit the table there."""
    shown = dict(re.findall(r"^\| `([A-Z_]+)` \| ([\d,]+) \| \S.* \|$", PAGE, flags=re.MULTILINE))
    assert shown == {name: f"{value:,.0f}" for name, value in vars(limits).items() if name.isupper()}
