"""The import graph keeps its shape: layers point down, heavy libraries stay at home, light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("searche1", "megatron_ext", "tools", "scripts")
LAYERS = (  # top first: a module imports its own layer and those below
    {"__main__", "cli"},
    {"quickstart"},
    {"cycle", "play"},
    {"grpo", "opsd"},
    {"checkpoints"},
    {"session"},
    {"engines", "probe"},
    {"colocation", "sync", "ranks", "cluster_check"},
    {"evaluation", "report", "screen", "prepare"},
    {"policy", "rollout"},
    {
        "packing",
        "pairs",
        "prompts",
        "tags",
        "rewards",
        "data",
        "retrieval",
        "metrics",
        "runs",
        "world",
        "doctor",
        "planner",
        "models",
        "progress",
        "timeline",
        "health",
    },
    {"config", "benchmarks", "console", "stopping", "ports", "addresses"},
    {"types"},
)
STRANGERS = ({"grpo", "opsd"}, {"policy", "rollout"})  # same layer, yet neither knows the other
HOMES = {
    "megatron": ("megatron_ext/", "tools/bench/"),  # a benchmark measures ours beside it
    "transformer_engine": ("megatron_ext/",),
    "sglang": ("searche1/rollout/", "tools/bench/stock_server.py"),
    "faiss": ("searche1/retrieval/index.py", "tools/"),
}
TORCH_FREE = ("types", "tags", "prompts", "rewards", "data", "config", "retrieval.client", "rollout.protocol")
IN_NO_LOCK = {"transformer_engine", "wandb"}  # used where somebody installed it


def imported_modules(source: str, module: str, *, is_package: bool) -> set[str]:
    """Full names of everything `source` imports, wherever in the file; `module` is its own name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def imports_of_every_file() -> dict[str, set[str]]:
    """{path relative to the root: full names of what it imports}"""
    imports = {}
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        relative = path.relative_to(ROOT)
        parts = relative.with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        imports[relative.as_posix()] = imported_modules(path.read_text(), module, is_package=is_package)
    return imports


IMPORTS = imports_of_every_file()


def files_importing(library: str, *, outside: tuple[str, ...]) -> list[str]:
    return [
        file
        for file, modules in IMPORTS.items()
        if any(module.split(".")[0] == library for module in modules) and not file.startswith(outside)
    ]


def room_of(file: str) -> str | None:
    """The module or subpackage of searche1 that a file belongs to: "rollout" for searche1/rollout/engine.py."""
    parts = Path(file).with_suffix("").parts
    return parts[1] if parts[0] == "searche1" and parts[1] != "__init__" else None


def layer_of(room: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if room in layer), None)


def objection(importer: str, imported: str) -> str | None:
    """Why one room of searche1 may not import another, None if it may. Rooms without a layer are not judged."""
    own, other = layer_of(importer), layer_of(imported)
    if own is None or other is None:
        return None
    if other < own:
        return f"{imported} lies above {importer}"
    if importer != imported and any({importer, imported} <= pair for pair in STRANGERS):
        return f"{importer} and {imported} do not know each other"
    return None


def test_imports_are_found_in_every_form_and_place():
    source = "import a.b as c\nfrom . import near\nfrom .. import far\ndef f():\n    from searche1 import tags\n"
    found = {"a.b", "searche1.rollout.near", "searche1.far", "searche1.tags"}
    assert imported_modules(source, "searche1.rollout.engine", is_package=False) == found
    assert imported_modules("from .x import y", "searche1.rollout", is_package=True) == {"searche1.rollout.x.y"}


def test_the_rule_tells_up_from_down():
    assert objection("cycle", "types") is None
    assert objection("rewards", "tags") is None
    assert objection("rollout", "rollout") is None
    assert objection("types", "config") is not None
    assert objection("opsd", "grpo") is not None


def test_every_module_has_a_layer():
    rooms = {room for room in map(room_of, IMPORTS) if room}
    homeless = sorted(room for room in rooms if layer_of(room) is None)
    assert not homeless, f"give {homeless} a place in LAYERS"


def test_imports_go_down_only():
    objections = set()
    for file, modules in IMPORTS.items():
        importer = room_of(file)
        for module in modules:
            parts = module.split(".")
            if importer and parts[0] == "searche1" and (reason := objection(importer, parts[1])):
                objections.add(f"{file}: {reason}")
    assert not objections, "\n".join(sorted(objections))


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_is_imported_only_where_it_lives(library: str):
    strays = files_importing(library, outside=HOMES[library])
    assert not strays, f"{library} lives in {HOMES[library]} only, but is imported in {strays}"


def test_the_megatron_extensions_know_nothing_of_searche1():
    strays = [file for file in files_importing("searche1", outside=()) if file.startswith("megatron_ext/")]
    assert not strays


@pytest.mark.parametrize("module", TORCH_FREE)
def test_a_light_module_imports_without_torch(module: str):
    code = f"import sys, searche1.{module}; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, f"importing searche1.{module} loads torch, or fails: {result.stderr}"


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.stem)
def test_every_library_that_the_code_imports_is_in_every_lock(lock: Path):
    lines = [line for line in lock.read_text().splitlines() if not line.startswith(("#", " "))]  # and no hashes
    assert all("==" in line for line in lines), "a lock pins every package exactly"
    locked = {normalized(line.split("==")[0]) for line in lines}
    assert len(locked) == len(lines), "a package is pinned twice"
    assert len(locked & {"faiss-cpu", "faiss-gpu"}) == 1, "faiss-cpu and faiss-gpu both install the module `faiss`"

    providers = packages_distributions()
    providers["faiss"] = ["faiss-cpu", "faiss-gpu"]
    missing = {}
    for file, modules in IMPORTS.items():
        libraries = {module.split(".")[0] for module in modules} - set(FOLDERS) - IN_NO_LOCK - sys.stdlib_module_names
        for library in libraries:
            is_neighbour = (ROOT / file).with_name(f"{library}.py").is_file()  # a tool's own helper module
            if not is_neighbour and not locked & {normalized(name) for name in providers.get(library, [library])}:
                missing[library] = file
    assert not missing, f"nothing in {lock.name} provides {missing}"


def normalized(distribution: str) -> str:
    return distribution.lower().replace("_", "-")
