"""The database: it opens and takes a write, its schema is this hvctl's, and its journal mode keeps what was
acknowledged."""

from __future__ import annotations

from hvctl.errors import HvctlError
from hvctl.model.finding import Finding, failing, ok
from hvctl.settings import Settings

NAME = "database"
LOST = "every command that changes something, and the journal"


def probe(settings: Settings) -> Finding:
    from hvctl.adapters.store.store import Store

    try:
        with Store(settings.database) as store:
            store.check_schema()
            store.check_writable()
    except HvctlError as e:
        remedy = e.hint or "hvctl host prepare --yes"
        return failing(NAME, e.message.removesuffix("."), LOST, remedy, fixable="host prepare" in remedy)
    return ok(NAME, f"{settings.database.partition('://')[0].partition('+')[0]}, schema is current")
