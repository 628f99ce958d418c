"""Imports go one way between folders, and one module alone imports each heavy package."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = (  # what stands in ddae/, bottom up: each imports only what stands before it, or beside it in its own folder
    *(
        "__version__",
        "errors",
        "atomic",
        "distributed",
        "config",
        "data",
        "models",
        "sharding",
        "method",
        "export",
        "training",
        "report",
    ),
    *("trainer", "eval", "train", "train_tokenizer", "tools", "ablation"),
)
HEAVY = {  # package -> the only modules, or folders, that import it
    "deepspeed": ("ddae.distributed",),
    "mlflow": ("ddae.training.tracker",),
    "nvidia": ("ddae.data.dali",),
    "tyro": ("ddae.config.cli",),
    "webdataset": ("ddae.data.shard_writer",),
    "fsspec": ("ddae.data.cache",),
    "segmentation_models_pytorch": ("ddae.eval.upernet",),
    "triton": ("ddae_kernels.triton_impl",),
}
NEEDS_TORCH_AND_TRITON_ONLY = "ddae_kernels"


def modules() -> dict[str, list[str]]:
    """Every module of the two packages, and the modules and names that it imports."""
    found = {}
    for base in (ROOT, ROOT / "kernels"):
        for path in sorted(base.glob("ddae*/**/*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            found[name] = list(imports(path))
    return found


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_folders_import_only_from_those_below():
    for name, imported in modules().items():
        if not name.startswith("ddae."):
            continue
        place = ORDER.index(name.split(".")[1])
        for each in imported:
            if each.startswith("ddae."):
                assert ORDER.index(each.split(".")[1]) <= place, f"{name} imports {each}"


def test_no_two_modules_import_each_other():
    graph = modules()
    graph = {
        name: {m for m in graph if m != name and any(within(i, m) for i in found)} for name, found in graph.items()
    }
    graph = {name: {m for m in found if "." in m} for name, found in graph.items() if "." in name}
    while leaves := {name for name, found in graph.items() if not found}:
        graph = {name: found - leaves for name, found in graph.items() if name not in leaves}
    assert not graph, f"a cycle of imports among {sorted(graph)}"


def test_one_heavy_package_one_module():
    for name, imported in modules().items():
        for package, allowed in HEAVY.items():
            if any(within(each, package) for each in imported):
                assert any(within(name, each) for each in allowed), f"{name} imports {package}"


def test_the_kernels_need_torch_and_triton_only():
    for name, imported in modules().items():
        if within(name, NEEDS_TORCH_AND_TRITON_ONLY):
            packages = {each.split(".")[0] for each in imported} - sys.stdlib_module_names
            assert packages <= {"torch", "triton", "ddae_kernels"}, f"{name} imports {packages}"


def test_no_module_is_a_drawer():
    for name in modules():
        assert name.split(".")[-1] not in ("utils", "misc", "common", "helpers"), name
