"""The architecture as tests: who may import whom, no model known by name, small documented files.

Each rule is a function from source text to complaints, and each has a negative control: text that breaks it.
"""

import ast
import functools
import graphlib
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("partitioner", "passes", "runtime")
MAX_LINES = 400

MAX_ENTRIES = 12  # modules and subfolders of a folder, beside __init__.py and __main__.py, whose names are Python's
PYTHONS = ("__init__.py", "__main__.py")

LEAVES = ("partitioner.errors", "partitioner.sharding")
ORDER = {
    # each imports only what stands before it
    "partitioner": (
        "errors",
        "sharding",
        "program",
        "analysis",
        "capture",
        "proof",
        "storage",
        "compile",
        "planning",
        "plugin",
        "serving",
        "cli",
        "__main__",
    ),
    "runtime": (
        "ops",
        "program",
        "weights",
        "processes",
        "communication",
        "kv_cache",
        "execution",
        "sampling",
        "pipeline",
        "generation",
        "engine",
        "launching",
    ),
}
STANDARD = tuple(sys.stdlib_module_names)
MAY_IMPORT = {
    "leaf": (*STANDARD, *LEAVES),
    "partitioner": (
        *STANDARD,
        "torch",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "sympy",
        "yaml",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "typer",
        "rich",
        "fastapi",
        "starlette",
        "pydantic",
        "uvicorn",
        "h11",
        "prometheus_client",
        "httpx2",
        "xgrammar",
        "ray",
        "partitioner",
        "runtime",
    ),
    "passes": (*STANDARD, "torch", "sympy", "partitioner", "runtime.ops"),
    "runtime": (*STANDARD, "torch", "triton", "xgrammar", *LEAVES, "runtime"),
}

# Names of models that are ordinary words here.
ENGLISH = {
    "aria": "as in: aria-label, of HTML",
    "beam": "as in: beam search",
    "align": "as in: aligned ranges",
    "encoder-decoder": "the kind of model",
}
# Names of weights that are somebody's interface.
PROMISED = {
    "partitioner.capture.trace.transformers_hooks": (
        "gate_up_proj",
        "up_proj",
        "down_proj",
    ),  # what transformers' experts interface holds
}
WEIGHT_NAMES = re.compile(
    r"\b(?:[qkvo]_proj|(?:gate|up|down|gate_up|in|out)_proj|qkv(?:_proj)?|gate_up|lm_head|embed_tokens|embed_out|wte|wpe"
    r"|c_attn|c_fc|c_proj|fc[12]|query_key_value|self_attn|self_attention|input_layernorm|post_attention_layernorm"
    r"|dense_h_to_4h|dense_4h_to_h|word_embeddings|score)\b"
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


@functools.lru_cache(1)  # of the module that the rules look at one after the other
def parsed(source: str) -> tuple[ast.Module, tuple[ast.AST, ...]]:
    """A module, and all that is in it."""
    tree = ast.parse(source)
    return tree, tuple(ast.walk(tree))


@functools.cache
def imported(module: str, source: str) -> tuple[tuple[int, str], ...]:
    """Every module name that `source` imports, at any depth, with `from a import b` as both `a` and `a.b`."""
    return tuple(_imported(module, source))


def _imported(module: str, source: str) -> Iterator[tuple[int, str]]:
    for node in parsed(source)[1]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # an __init__.py is its own parent: seen as one level too high here, which is never more permissive
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return f"{name}.".startswith(_dotted(prefixes))


@functools.cache
def _dotted(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}." for prefix in prefixes)


def wrong_imports(module: str, source: str) -> list[str]:
    kind = "leaf" if within(module, LEAVES) else module.split(".")[0]
    complaints = []
    for line, name in imported(module, source):
        if not within(name, MAY_IMPORT[kind]) and not (module == "passes" or within(name, (module,))):
            complaints.append(f"{module}:{line} imports {name}")
        elif kind != "runtime" and within(name, ("torch.distributed",)):
            complaints.append(f"{module}:{line} imports {name}; only runtime talks to other ranks")
    return complaints


def wrong_order(module: str, source: str) -> list[str]:
    """Imports of a room that stands later in `ORDER`."""
    package, _, rest = module.partition(".")
    order, room = ORDER.get(package, ()), rest.partition(".")[0]
    if not order or not rest:
        return []
    if room not in order:
        return [f"{module}: {package}/{room} has no place in the order of rooms"]
    later = tuple(f"{package}.{name}" for name in order[order.index(room) + 1 :])
    return [
        f"{module}:{line} imports {name}, a later room"
        for line, name in imported(module, source)
        if within(name, later)
    ]


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Modules and folders that import each other, in any folder; `imports`: module -> modules."""
    complaints = []
    folders = {".".join(module.split(".")[:depth]) for module in imports for depth in range(1, module.count(".") + 1)}
    for folder in sorted(folders):
        start = len(folder) + 1
        below: dict[str, set[str]] = {}
        for module, names in imports.items():
            if module.startswith(folder + "."):
                here = module[start:].partition(".")[0]
                inside = {name[start:].partition(".")[0] for name in names if name.startswith(folder + ".")}
                below.setdefault(here, set()).update(inside - {here})
        try:
            list(graphlib.TopologicalSorter(below).static_order())
        except graphlib.CycleError as error:
            complaints.append(f"{folder}: {' imports '.join(reversed(error.args[1]))}")
    return complaints


def crowded(folder: str, entries: list[str]) -> list[str]:
    """Folders with too many entries, or with one: a room of one file is none."""
    if len(entries) > MAX_ENTRIES:
        return [f"{folder} has {len(entries)} entries, more than {MAX_ENTRIES}: {', '.join(entries)}"]
    return [f"{folder} holds nothing but {entries[0]}"] if len(entries) == 1 else []


def wrong_distributed(module: str, source: str) -> list[str]:
    """`torch.distributed` reached as an attribute; as an import it is found by `wrong_imports`."""
    if within(module, ("runtime",)):
        return []
    return [
        f"{module}:{node.lineno} touches torch.distributed"
        for node in parsed(source)[1]
        if isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]


def words(line: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", line.lower())


def camel_words(line: str) -> list[str]:
    return words(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", line))


MODEL_NAMES = {tuple(words(name)): name for name in CONFIG_MAPPING_NAMES if len(name) > 3 and name not in ENGLISH}
FIRST_WORDS = {first for first, *_ in MODEL_NAMES}


def model_names(module: str, source: str) -> list[str]:
    """Names of models anywhere in the text, comments included, as words or as parts of snake_case and CamelCase."""
    complaints = []
    for number, line in enumerate(source.splitlines(), 1):
        found = set()
        for split in (words(line), camel_words(line)):
            for start in (place for place, word in enumerate(split) if word in FIRST_WORDS):
                for stop in range(start + 1, min(start + 6, len(split)) + 1):
                    found.add(MODEL_NAMES.get(tuple(split[start:stop])))
        complaints += [f"{module}:{number} names the model {name!r}" for name in sorted(filter(None, found))]
    return complaints


def docstrings(source: str) -> set[int]:
    found = set()
    for node in parsed(source)[1]:
        body = node.body if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else []
        for statement in body:  # strings that stand alone: docstrings of modules, functions, classes and fields
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                found.add(id(statement.value))
    return found


def weight_names(module: str, source: str) -> list[str]:
    """Names of weights in what is executed: strings that are no docstrings, and identifiers."""
    prose = docstrings(source)
    complaints = []
    for node in parsed(source)[1]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            text = node.value
        elif isinstance(node, ast.Name):
            text = node.id
        elif isinstance(node, ast.Attribute):
            text = node.attr
        else:
            continue
        names = [name for name in WEIGHT_NAMES.findall(text) if name not in PROMISED.get(module, ())]
        complaints += [f"{module}:{node.lineno} names the weight {name!r}" for name in names]
    return complaints


def too_long(module: str, source: str) -> list[str]:
    lines = source.count("\n")
    return [f"{module} has {lines} lines, more than {MAX_LINES}: find its second idea"] if lines > MAX_LINES else []


def undocumented(module: str, source: str) -> list[str]:
    private = any(part.startswith("_") for part in module.split("."))
    if private or not source.strip() or ast.get_docstring(parsed(source)[0]):
        return []
    return [f"{module} has no docstring"]


RULES: list[Callable[[str, str], list[str]]] = [
    wrong_imports,
    wrong_order,
    wrong_distributed,
    model_names,
    weight_names,
    too_long,
    undocumented,
]


def test_every_module_keeps_every_rule() -> None:
    paths = list(sources())
    assert len(paths) > 10
    read = ((module_name(path), path.read_text(encoding="utf-8")) for path in paths)
    complaints = [text for module, source in read for rule in RULES for text in rule(module, source)]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runtime.engine.engine", "from partitioner.program import Program"),
        ("runtime.engine.engine", "import partitioner"),
        ("runtime.engine.engine", "def f():\n    from transformers import AutoModel"),
        ("runtime.engine.engine", "import numpy"),
        ("runtime.engine.engine", "import passes.tensor_parallel"),
        ("passes.one", "from passes.two import Two"),
        ("passes.one", "from passes import two"),
        ("passes.one", "from . import two"),
        ("passes.one", "from .two import Two"),
        ("passes.one", "from runtime.engine.engine import Engine"),
        ("passes.one", "import torch.distributed as dist"),
        ("passes.one", "from torch import distributed"),
        ("partitioner.compile.parts", "import passes"),
        ("partitioner.compile.parts", "from passes.tensor_parallel import TensorParallel"),
        ("partitioner.compile.parts", "from torch.distributed import all_reduce"),
        ("partitioner.sharding.mesh", "import torch"),
        ("partitioner.sharding.mesh", "from partitioner import Plan"),
    ],
)
def test_wrong_import_is_found(module: str, source: str) -> None:
    assert wrong_imports(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runtime.ops.one", "from runtime.program.shards import Piece"),
        ("runtime.communication.one", "def f():\n    import runtime.kv_cache.cache"),
        ("partitioner.analysis.labels.one", "from partitioner.compile.emit import Emitter"),
        ("partitioner.storage.one", "if TYPE_CHECKING:\n    from partitioner.compile import parts"),
        ("partitioner.elsewhere.one", "import torch"),
        ("runtime.one", "import torch"),
    ],
)
def test_import_against_the_order_of_rooms_is_found(module: str, source: str) -> None:
    assert wrong_order(module, source)
    assert not wrong_order("partitioner.cli.one", source.replace("partitioner.elsewhere", "partitioner.cli"))


def test_modules_do_not_import_each_other() -> None:
    named = {module_name(path): path for path in sources()}
    imports = {
        module: {name for _, name in imported(module, path.read_text(encoding="utf-8")) if name.startswith(PACKAGES)}
        for module, path in named.items()
        if path.stem != "__init__"
    }
    assert not circles(imports), "\n".join(circles(imports))


def test_circle_is_found() -> None:
    assert circles({"runtime.a.x": {"runtime.a.y.f"}, "runtime.a.y": {"runtime.a.z"}, "runtime.a.z": {"runtime.a.x"}})
    assert circles({"runtime.a.x": {"runtime.b.y"}, "runtime.b.z": {"runtime.a.y"}})
    assert not circles({"runtime.a.x": {"runtime.b.y"}, "runtime.b.z": {"runtime.b.y"}})


def holds_files(path: Path) -> bool:
    """Whether it is a file, or a folder with more in it than what Python left behind."""
    return path.is_file() or any(each.is_file() and "__pycache__" not in each.parts for each in path.rglob("*"))


def folders() -> Iterator[tuple[str, list[str]]]:
    for package in (*PACKAGES, "tests", "benchmarks", "examples", "docs"):
        for folder in [ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())]:
            names = sorted(path.name for path in folder.iterdir() if path.name not in PYTHONS and holds_files(path))
            if folder.name != "__pycache__" and names:
                yield str(folder.relative_to(ROOT)), names


def test_no_folder_is_crowded_and_none_holds_one_file() -> None:
    complaints = [
        text
        for folder, entries in folders()
        for text in crowded(folder, entries)
        if len(entries) != 1 or folder.startswith(PACKAGES)
    ]
    assert not complaints, "\n" + "\n".join(complaints)


def test_crowded_folder_is_found() -> None:
    assert crowded("runtime/ops", [f"op_{index}.py" for index in range(MAX_ENTRIES + 1)])
    assert crowded("runtime/ops", ["attention.py"])
    assert not crowded("runtime/ops", [f"op_{index}.py" for index in range(MAX_ENTRIES)])


def test_every_room_has_its_line_in_the_documentation() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {str(path.parent.relative_to(ROOT)) for path in sources() if path.parent.parent != ROOT}
    missing = sorted(room for room in rooms if f"{room.rpartition('/')[2]}/" not in text)
    assert not missing


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "runtime.engine.engine",
            "import torch.distributed as dist\nfrom partitioner.errors import RankLost\nimport threading",
        ),
        ("runtime.engine.engine", "from runtime.ops import attention\nfrom .ops import attention"),
        ("passes.one", "from partitioner.program import Program\nfrom runtime.ops.collectives import all_reduce"),
        ("partitioner.compile.parts", "from runtime.engine.engine import Engine\nimport torch"),
        ("partitioner.sharding.mesh", "from partitioner.errors import PlanError\nimport math"),
    ],
)
def test_right_import_is_not_found(module: str, source: str) -> None:
    assert not wrong_imports(module, source)


def test_distributed_as_attribute_is_found() -> None:
    assert wrong_distributed("partitioner.compile.parts", "import torch\ntorch.distributed.barrier()")
    assert not wrong_distributed("runtime.engine.engine", "import torch\ntorch.distributed.barrier()")


@pytest.mark.parametrize("line", ["# like Llama", "class LlamaRule: ...", "if name == 'gpt_neox':", "qwen3_rotary = 1"])
def test_model_name_is_found(line: str) -> None:
    assert model_names("passes.one", line)
    assert not model_names("passes.one", line.translate(str.maketrans("aeiouw", "xxxxxx")))


@pytest.mark.parametrize("line", ["if path.endswith('q_proj.weight'): ...", "x = layer.lm_head", "gate_up = 1"])
def test_weight_name_is_found(line: str) -> None:
    assert weight_names("passes.one", line)


def test_weight_name_in_prose_is_not_found() -> None:
    assert not weight_names("passes.one", '"""Such as q_proj.weight."""\n# or lm_head\n')


def test_ordinary_words_are_names_of_models() -> None:
    assert set(ENGLISH) <= set(CONFIG_MAPPING_NAMES)


def test_long_file_is_found() -> None:
    assert too_long("passes.one", "x = 1\n" * (MAX_LINES + 1))
    assert not too_long("passes.one", "x = 1\n" * MAX_LINES)


def test_docstring_is_asked_of_every_module_with_text() -> None:
    assert undocumented("runtime.engine.engine", "import torch\n")
    assert not undocumented("runtime.engine.engine", '"""What it is."""\n')
    assert not undocumented("runtime", "")


def test_every_folder_with_code_is_a_package() -> None:
    """One without would be missing from the wheel, and nothing would say so."""
    assert not [path for path in sources() if not (path.parent / "__init__.py").exists()]


def test_a_pass_has_one_file_one_test_and_one_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["entry-points"]["partitioner.passes"]
    files = {path.stem for path in (ROOT / "passes").glob("*.py") if path.stem != "__init__"}
    assert files == {name.replace("-", "_") for name in declared}
    for name, target in declared.items():
        stem = name.replace("-", "_")
        assert target == f"passes.{stem}:{stem.title().replace('_', '')}"
        assert [*(ROOT / "tests" / "passes").rglob(f"test_{stem}.py")], f"{name} has no test of its own"
