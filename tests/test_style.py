"""House rules that a linter has no name for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

MOST_FILE_LINES, MOST_FUNCTION_LINES = 400, 60
DRAWS = re.compile(  # global randomness, unless given a generator
    r"torch\.(bernoulli|multinomial|normal|poisson|rand|randint|randn|randperm)(_like)?"
    r"|.*\.(bernoulli|cauchy|exponential|geometric|log_normal|normal|random|uniform)_"
)
GLOBAL = re.compile(r"(np|numpy)\.random\.[a-z]\w*|random\.[a-z]\w*")  # never; classes take a seed
SEEDED = re.compile(r"(np|numpy)\.random\.default_rng")
UNPICKLES = re.compile(
    r"(torch|joblib|c?[pP]ickle|dill|cloudpickle|marshal|shelve)\.(load|loads|open|Unpickler)"
    r"|torch\.hub\.load(_state_dict_from_url)?|torch\.jit\.load|(pd|pandas)\.read_pickle"
)
HEAVY = set(
    "accelerate diffusers numpy peft scipy sklearn tensorboard torch torchmetrics torchvision"
    " transformers".split()
)


def banned(source: str) -> Iterator[str]:
    """Draws of global random numbers, and readers of pickles, as "line: why: what"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            keyed = given.get("generator", "None") != "None" or (
                SEEDED.fullmatch(name) and node.args
            )
            if (DRAWS.fullmatch(name) or GLOBAL.fullmatch(name)) and not keyed:
                yield f"{node.lineno}: global randomness: {name}"
            if UNPICKLES.fullmatch(name) or given.get("allow_pickle", "False") != "False":
                yield f"{node.lineno}: unpickles: {name}"
        elif isinstance(node, ast.ImportFrom):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                if any(rule.fullmatch(name) for rule in (DRAWS, GLOBAL, UNPICKLES)):
                    yield f"{node.lineno}: imports {name} by name"


def too_long(source: str) -> Iterator[str]:
    """The file, and each function in it, that is over its limit."""
    lines = source.count("\n")
    if lines >= MOST_FILE_LINES:
        yield f"1: {lines} lines, not < {MOST_FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length >= MOST_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {length} lines, not < {MOST_FUNCTION_LINES}"


@pytest.mark.parametrize("rule", [banned, too_long])
def test_product_keeps_the_rule(shipped, root, rule) -> None:
    wrong = [
        f"{path.relative_to(root)}:{line}"
        for path in shipped.values()
        if path.suffix == ".py"
        if rule is not too_long or "assets" not in path.parts  # which hold copies
        for line in rule(path.read_text("utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("rule", "source", "found"),
    [
        (banned, "torch.randn(3)", 1),
        (banned, "torch.randn(3, generator=None)", 1),
        (banned, "torch.randn(3, generator=g)", 0),
        (banned, "torch.rand_like(x)", 1),
        (banned, "nn.init.normal_(w)", 1),
        (banned, "x.uniform_(generator=g)", 0),
        (banned, "np.random.randn(3)", 1),
        (banned, "np.random.default_rng()", 1),
        (banned, "np.random.default_rng(seed)", 0),
        (banned, "np.random.Philox(key=seed)", 0),
        (banned, "random.shuffle(x)", 1),
        (banned, "rng.normal('noise', index, shape)", 0),
        (banned, "from torch import randn", 1),
        (banned, "torch.load(path, weights_only=True)", 1),
        (banned, "np.load(path, allow_pickle=True)", 1),
        (banned, "safetensors.torch.load_file(path)", 0),
        (too_long, "\n" * 400, 1),
        (too_long, "\n" * 399, 0),
        (too_long, "def f():\n" + "    x = 1\n" * 59, 1),
        (too_long, "def f():\n" + "    x = 1\n" * 58, 0),
    ],
)
def test_the_check_itself(rule, source: str, found: int) -> None:
    assert len(list(rule(source))) == found


def test_help_imports_nothing_heavy() -> None:
    """``stepdistill --help`` answers at once."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "runpy.run_module('stepdistill', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    imported = {name.split(".")[0] for name in done.stderr.split()}
    assert "stepdistill" in imported
    assert not imported & HEAVY


def test_public_names_are_found_lazily() -> None:
    import stepdistill

    assert set(stepdistill.__all__) <= set(dir(stepdistill))
    for name in stepdistill.__all__:
        assert getattr(stepdistill, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        stepdistill.nonsense  # noqa: B018
