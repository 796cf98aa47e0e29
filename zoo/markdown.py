"""Markdown: tables, and pages of which parts are generated."""

import re
from collections.abc import Iterable, Mapping, Sequence


def filled(text: str, blocks: Mapping[str, str], others: str = r"(smoothness|explanations)\w*") -> str:
    """Return the text with what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` replaced.

    Raises:
        KeyError: a name that is not among the blocks, and does not match ``others``, those that something else fills.
    """

    def block(found: re.Match[str]) -> str:
        if found[1] not in blocks and re.fullmatch(others, found[1]):
            return found[0]
        return f"<!-- begin {found[1]} -->\n\n{blocks[found[1]]}\n\n<!-- end {found[1]} -->"

    return re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", block, text, flags=re.DOTALL)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, in which bars and line breaks of the cells are no more than that."""
    lines = (header, ["---"] * len(header), *rows)
    escaped = ([" ".join(cell.replace("|", r"\|").split()) for cell in cells] for cells in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)
