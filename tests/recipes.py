"""Short runs of every method, found by its file and its config alone."""

from __future__ import annotations

from functools import cache

from stepdistill.commands.read import read_config
from stepdistill.run.config import CONFIGS
from stepdistill.trainers.find import methods, trainer

METHODS = [method.name for method in methods()]
SHORT = "steps=6 batch_size=16 log.every_steps=1 log.tensorboard=false sample.every_steps=0".split()
SHORT += "eval.every_steps=0 checkpoint.every_steps=2".split()
PAIRS = "pairs.num=40 pairs.steps=2 pairs.shard=16".split()
STAGES = "targets=1 record_every=2 interval=1".split()  # other players from step 2 on


@cache
def recipe(method: str) -> str:
    """The name of a method's config: METHOD-digits, else the first that names the method."""
    own = f"{method}-digits"
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    names.sort(key=lambda name: name != own)  # it comes first, and the others need not be read
    found = (name for name in names if read_config(name)[1].method == method)
    first = next(found, None)
    assert first, f"{method} has no config; write configs/{method}-digits.yaml"
    return first


def distils(method: str) -> bool:
    """Whether a method has a teacher; one that has none trains a teacher."""
    return trainer(method).Config.model_fields["teacher"].is_required()


def command(method: str, run: str, *more: str) -> list[str]:
    """The command line of a short run, with checkpoints at every second step."""
    pairs = PAIRS if trainer(method).needs == "pairs" else []
    known = trainer(method).Config.model_fields
    staged = list(STAGES) if "record_every" in known else []
    staged += ["critic_first=0"] if "critic_first" in known else []
    staged += ["warmup=1"] if "warmup" in known else []
    staged += ["alone=2"] if "alone" in known else []
    head = getattr(read_config(recipe(method))[1], "adversary", None)
    staged += ["adversary.from_step=2"] if getattr(head, "from_step", 0) else []
    verb = "train" if distils(method) else "teacher"
    return [verb, recipe(method), f"run={run}", *SHORT, *pairs, *staged, *more]


DISTILS = [name for name in METHODS if distils(name)]
KINDS = [  # a method of each kind of run, where all would take long and are the same in what is
    # tested: no teacher, pairs, other players in time, adapters, an adversary, several students,
    # averages as targets, a network told more, a smaller network
    *("denoising", "reflow", "slim_flow", "crd", "sim", "dmd2", "disback", "msd", "phased_dmd"),
    *("consistency", "lcm", "tlcm"),
]
assert set(KINDS) <= set(METHODS)
