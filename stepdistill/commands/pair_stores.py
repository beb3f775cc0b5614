"""pairs: what the command line asks of it; and the checking and merging of stores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stepdistill.commands.pairs import pairs, place_of, read_pairs_config
from stepdistill.data.pairs import merge as stores
from stepdistill.data.pairs.folder import open_folder
from stepdistill.data.pairs.store import described
from stepdistill.run.errors import CheckFailed, UserError


def command(
    name: str, more: Sequence[str], *, verify: bool, merge: str | None, part: str | None
) -> Path | str:
    """What ``stepdistill pairs`` does; returns what it prints.

    Args:
        name: a config, or a store.
        more: overrides of the config, or further stores.
        verify: check the store.
        merge: where the stores are copied to.
        part: K/N, which of the store's files are made.

    Raises:
        UserError: bad input, or two of the options at once.
        CheckFailed: shards of a store are bad.
    """
    if sum((verify, merge is not None, part is not None)) > 1:
        raise UserError("pairs: --verify, --merge and --part do not go together; give one of them")
    if verify:
        return verify_store(name, more)
    if merge is not None:
        return merge_stores([name, *more], merge)
    return pairs(name, more, part=_part(part))


def _part(text: str | None) -> tuple[int, int]:
    """What K/N says, from 0."""
    if text is None:
        return 0, 1
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise UserError(f"--part {text}: write it as K/N, K from 1 to N, such as 1/4")
    return int(k) - 1, int(n)


def verify_store(name: str, overrides: Sequence[str] = ()) -> str:
    """Read all of a store and say which of its shards are bad; returns that none is.

    Args:
        name: the store's folder or URL, or a config whose store it is.
        overrides: of the config.

    Raises:
        CheckFailed: some are; each was told in a line before.
        UserError: there is no such store.
    """
    folder = open_folder(store_place(name, overrides))
    plan, bad, count = stores.plan_in(folder), 0, 0
    for fault in stores.verify(folder, plan):
        count += 1
        if fault is not None:
            bad += 1
            print(f"{fault.path}: {fault.what}")
    if bad:
        raise CheckFailed(
            f"{folder.place}: {bad} of {count} shards are bad; remove these files and run "
            "`stepdistill pairs` with the store's config again (of a merged store, --merge)"
        )
    return f"{folder.place}: {described(plan)} in {count} shards, all as they should be"


def merge_stores(names: Sequence[str], out: str) -> str:
    """Copy the stores into one; returns its place.

    Raises:
        UserError: they do not go together, or ``out`` holds other pairs.
    """
    plan = stores.merge([open_folder(store_place(name)) for name in names], open_folder(out))
    print(f"{out}: {described(plan)}", file=sys.stderr)
    return out


def store_place(name: str, overrides: Sequence[str] = ()) -> str:
    """A store's place, given as such or by the config that it is made by."""
    if not overrides and ("://" in name or Path(name).is_dir()):
        return name
    return place_of(read_pairs_config(name, overrides))
