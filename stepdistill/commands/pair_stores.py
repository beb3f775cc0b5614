"""pairs --verify and --merge: check a store that is there, or put several into one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stepdistill.commands.pairs import place_of, read_pairs_config
from stepdistill.data.pairs.folder import open_folder
from stepdistill.data.pairs.merge import merge, plan_in, verify
from stepdistill.data.pairs.store import described
from stepdistill.run.errors import CheckFailed


def verify_store(name: str, overrides: Sequence[str] = ()) -> None:
    """Read all of a store and say which of its shards are bad.

    Args:
        name: the store's folder or URL, or a config whose store it is.
        overrides: of the config.

    Raises:
        CheckFailed: some are; each was told in a line before.
        UserError: there is no such store.
    """
    folder = open_folder(store_place(name, overrides))
    plan, bad, count = plan_in(folder), 0, 0
    for fault in verify(folder, plan):
        count += 1
        if fault is not None:
            bad += 1
            print(f"{fault.path}: {fault.what}")
    if bad:
        raise CheckFailed(
            f"{folder.place}: {bad} of {count} shards are bad; remove these files and run "
            "`stepdistill pairs` with the store's config again (of a merged store, --merge)"
        )
    print(f"{folder.place}: {described(plan)} in {count} shards, all as they should be")


def merge_stores(names: Sequence[str], out: str) -> str:
    """Copy the stores into one; returns its place.

    Raises:
        UserError: they do not go together, or ``out`` holds other pairs.
    """
    plan = merge([open_folder(store_place(name)) for name in names], open_folder(out))
    print(f"{out}: {described(plan)}", file=sys.stderr)
    return out


def store_place(name: str, overrides: Sequence[str] = ()) -> str:
    """A store's place, given as such or by the config that it is made by."""
    if not overrides and ("://" in name or Path(name).is_dir()):
        return name
    return place_of(read_pairs_config(name, overrides))
