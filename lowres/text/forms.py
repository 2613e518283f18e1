"""What the rows of a source are, where nobody says it: text if they can be that, else pairs, else chats."""

from __future__ import annotations

from dataclasses import replace

from lowres.errors import UserError
from lowres.text.documents import numbered_documents
from lowres.text.listing import list_files
from lowres.text.source import CHATS, PAIRS, TEXT, Source


def with_form(source: Source) -> Source:
    """The source, read in the first form in which it can be. Raises UserError as for text."""
    refused: UserError | None = None
    for form in (TEXT, PAIRS, CHATS):
        tried = replace(source, form=form)
        try:
            if source.on_hub:
                next(numbered_documents(tried), None)
            else:
                list_files(tried).check()
        except UserError as error:
            refused = refused or error
        else:
            return tried
    assert refused is not None
    raise refused
