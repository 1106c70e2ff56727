"""Link every term of the glossary where a tutorial, guide or lab note first uses it."""

import functools
import re
from typing import Any

from docutils import nodes

GLOSSARY = "reference/glossary"
FOLDERS = ("tutorials/", "how_to/", "lab/")
# Words that also have their everyday meaning, and would be linked where they have that.
AMBIGUOUS = ("drop", "grow", "part", "step")
# Inside these a word is no plain text, or has a link already.
SKIPPED = (nodes.literal, nodes.literal_block, nodes.reference, nodes.title, nodes.raw)


def link(app: Any, doctree: nodes.document, docname: str) -> None:
    """Replace the first use of each term by a link."""
    if not docname.startswith(FOLDERS):
        return
    terms = terms_of(app.env.get_doctree(GLOSSARY))
    address = app.builder.get_relative_uri(docname, GLOSSARY)
    for paragraph in list(doctree.findall(nodes.paragraph)):
        for text in list(paragraph.findall(nodes.Text)):
            if not terms:
                return
            if not _is_skipped(text):
                text.parent.replace(text, _linked(text.astext(), terms, address))


def terms_of(glossary: nodes.document) -> dict[str, str]:
    """Give the anchor of each term, by the term in lower case."""
    found = {}
    for section in glossary.findall(nodes.section):
        if section.parent is not None and not list(section.findall(nodes.section))[1:]:
            found[section[0].astext().lower()] = section["ids"][0]
    return {term: anchor for term, anchor in found.items() if term not in AMBIGUOUS}


def _is_skipped(node: nodes.Node) -> bool:
    while node is not None:
        if isinstance(node, SKIPPED):
            return True
        node = node.parent
    return False


def _linked(text: str, terms: dict[str, str], address: str) -> list[nodes.Node]:
    """Link the terms in a text, and take them from those that are still to be linked."""
    match = _pattern(tuple(terms)).search(text)
    if not match:
        return [nodes.Text(text)]
    term = match[1].lower()
    anchor = terms.pop(term)
    shown = nodes.reference("", match[0], internal=True, refuri=f"{address}#{anchor}")
    shown["classes"] = ["term"]
    before = [nodes.Text(text[: match.start()])] if match.start() else []
    rest = text[match.end() :]
    after = _linked(rest, terms, address) if terms else [nodes.Text(rest)]
    return [*before, shown, *after]


@functools.cache
def _pattern(terms: tuple[str, ...]) -> re.Pattern[str]:
    longest = sorted(terms, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, longest))})s?(?![\w-])", re.I)


def setup(app: Any) -> dict[str, bool]:
    """Link terms once all other links of a page are known."""
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
