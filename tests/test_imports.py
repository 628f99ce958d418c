"""Import rules: folders import in one direction, and each heavy package is imported in one place."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = (  # modules and folders of ddae/, bottom up: each imports only from those before it, and from its own folder
    "__version__ errors atomic progress pages distributed config data models sharding method export training report "
    "trainer eval train train_tokenizer tools ablation commands api cli __main__"
).split()
HEAVY = {  # package -> the only modules or folders that may import it
    "deepspeed": ("ddae.distributed",),
    "mlflow": ("ddae.training.mlflow_tracker",),
    "wandb": ("ddae.training.wandb_tracker",),
    "nvidia": ("ddae.data.dali",),
    "tyro": ("ddae.config.cli",),
    "webdataset": ("ddae.data.shard_writer",),
    "fsspec": ("ddae.data.cache",),
    "segmentation_models_pytorch": ("ddae.eval.upernet",),
    "triton": ("ddae_kernels.triton_impl",),
}
NEEDS_TORCH_AND_TRITON_ONLY = "ddae_kernels"


def modules() -> dict[str, list[str]]:
    """Return the imported modules and names of every module of ddae and ddae_kernels."""
    imported = {}
    for base in (ROOT, ROOT / "kernels"):
        for path in sorted(base.glob("ddae*/**/*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            imported[name] = list(imports(path))
    return imported


def imports(path: Path):
    """Yield "package.module" and "package.module.name" of each import in a file."""
    yield from imports_in(ast.parse(path.read_text()), path)


def imports_in(tree: ast.AST, path: Path):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_folders_import_only_from_lower_ones():
    for name, imported in modules().items():
        if not name.startswith("ddae."):
            continue
        place = ORDER.index(name.split(".")[1])
        for each in imported:
            if each.startswith("ddae."):
                assert ORDER.index(each.split(".")[1]) <= place, f"{name} imports {each}"


def test_no_circular_imports():
    imported = {name: names for name, names in modules().items() if "." in name}
    graph = {
        name: {module for module in imported if module != name and any(within(each, module) for each in names)}
        for name, names in imported.items()
    }
    while leaves := {name for name, edges in graph.items() if not edges}:
        graph = {name: edges - leaves for name, edges in graph.items() if name not in leaves}
    assert not graph, f"circular imports among {sorted(graph)}"


def test_heavy_packages_are_imported_in_one_place():
    for name, imported in modules().items():
        for package, allowed in HEAVY.items():
            if any(within(each, package) for each in imported):
                assert any(within(name, each) for each in allowed), f"{name} imports {package}"


class WithoutTypeChecking(ast.NodeTransformer):
    """Removes `if TYPE_CHECKING:` blocks, which run in type checkers only."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def test_kernels_need_torch_and_triton_only():
    for name in modules():
        if within(name, NEEDS_TORCH_AND_TRITON_ONLY):
            path = ROOT / "kernels" / name.replace(".", "/")
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            imported = imports_in(WithoutTypeChecking().visit(ast.parse(path.read_text())), path)
            packages = {each.split(".")[0] for each in imported} - sys.stdlib_module_names
            assert packages <= {"torch", "triton", "ddae_kernels"}, f"{name} imports {packages}"


def test_no_module_has_a_catch_all_name():
    for name in modules():
        assert name.split(".")[-1] not in ("utils", "misc", "common", "helpers"), name
