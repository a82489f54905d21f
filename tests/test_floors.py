"""The architecture of CONTRIBUTING.md, read off the imports: they go to a lower floor or stay in their own room."""

import ast
from pathlib import Path

import pytest

import fpq_jax

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("_errors", "_version"),
    ("_numerics", "_support"),
    ("_matmul", "_algorithms", "_storage", "_generation"),
    ("_transform", "models", "debug"),
    ("_checkpoints",),
    ("_pipeline",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
COMMANDS = len(FLOORS)  # what stands in no room: commands and the package's own list of names
SOURCES = {
    f"fpq_jax.{path.relative_to(root).with_suffix('').as_posix().replace('/', '.')}": path
    for root, folder in ((ROOT / "fpq_jax", ROOT / "fpq_jax"), (ROOT, ROOT / "models"))
    for path in folder.rglob("*.py")
}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it; ``from package import module`` counts as the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} imports relatively"
    return found


def test_the_tree_has_the_rooms_of_the_plan_and_no_others():
    rooms = {room_of(module) for module in SOURCES if module.count(".") > 1} | {"_errors", "_version"}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_go_downward(module):
    own = room_of(module)
    floor = FLOOR.get(own, COMMANDS)
    used = {room_of(name) for name in imports(SOURCES[module]) if name in SOURCES}
    wrong = [room for room in used if room != own and FLOOR.get(room, COMMANDS) >= floor]
    assert not wrong or module == "fpq_jax.__init__", f"{module} imports {wrong}"


@pytest.mark.parametrize("module", [module for module in sorted(SOURCES) if room_of(module) == "models"])
def test_models_read_no_file(module):
    used = {name.split(".")[0] for name in imports(SOURCES[module])}
    assert not used & {"pathlib", "os", "io", "json", "safetensors"}
    names = {node.id for node in ast.walk(ast.parse(SOURCES[module].read_text("utf-8"))) if isinstance(node, ast.Name)}
    assert "open" not in names


def test_sub_packages_are_empty():
    packages = [path for module, path in SOURCES.items() if module.endswith("__init__")]
    full = [path for path in packages if len(ast.parse(path.read_text(encoding="utf-8")).body) > 1]
    assert {path.parent.name for path in full} == {"fpq_jax", "debug"}


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda path: path.name)
def test_scripts_use_public_names_or_say_why_not(script):
    text = script.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fpq_jax._"):
            assert "# private: " in ast.get_source_segment(text, node) + text.splitlines()[node.end_lineno - 1]
            assert not {alias.name for alias in node.names} & set(fpq_jax.__all__)
