"""Data flows one way: each file imports only from files above it in this list. One heavy package, one file."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    *("ddae_kernels.reference", "ddae_kernels.implementation", "ddae_kernels.triton_impl", "ddae_kernels.operators"),
    *("ddae_kernels.distance", "ddae_kernels.dynamic", "ddae_kernels"),
    *(
        "ddae.errors",
        "ddae.slices",
        "ddae.counter",
        "ddae.distributed",
        "ddae.system",
        "ddae.watchdog",
        "ddae.schedules",
        "ddae.patches",
        "ddae.masks",
    ),
    *("ddae.experiment", "ddae.config", "ddae.presets", "ddae.ablations", "ddae.ds_config", "ddae.betas"),
    *("ddae.data.remote", "ddae.data.shards", "ddae.data.shard_writer", "ddae.data.digits", "ddae.data.sampling"),
    *(
        "ddae.data.jpeg",
        "ddae.data.resize",
        "ddae.data.pillow",
        "ddae.data.dali",
        "ddae.data.reader",
        "ddae.data.choice",
    ),
    *("ddae.data.rescue", "ddae.data.loader", "ddae.data.preview"),
    *(
        "ddae.sharding.archives",
        "ddae.sharding.devkit",
        "ddae.sharding.keys",
        "ddae.sharding.sources",
        "ddae.sharding.inspection",
    ),
    *("ddae.sharding.workers", "ddae.sharding.target", "ddae.sharding.report", "ddae.sharding.sharder"),
    *("ddae.sharding.verification", "ddae.sharding.ade20k", "ddae.benchmark"),
    *("ddae.model.vit", "ddae.model.decoder", "ddae.model.teacher", "ddae.model.tokenizer"),
    *(
        "ddae.one_by_one",
        "ddae.branches",
        "ddae.method",
        "ddae.naive",
        "ddae.optim",
        "ddae.work",
        "ddae.plan",
        "ddae.engine",
        "ddae.outcomes",
        "ddae.stopping",
        "ddae.checkpoint",
        "ddae.foreign",
        "ddae.weights",
    ),
    *(
        "ddae.dump",
        "ddae.run_folder",
        "ddae.meter",
        "ddae.tracker",
        "ddae.session",
        "ddae.figures",
        "ddae.model_card",
        "ddae.report",
    ),
    *("ddae.eval.baselines", "ddae.eval.examples", "ddae.eval.features", "ddae.eval.recipes"),
    *("ddae.eval.pictures", "ddae.eval.knn"),
    *("ddae.eval.online", "ddae.eval.augment", "ddae.eval.classifier", "ddae.eval.fit", "ddae.eval.finetune"),
    *("ddae.eval.heads", "ddae.eval.linear_probe", "ddae.eval.benchmark"),
    *("ddae.eval.recipes_segment", "ddae.eval.scenes", "ddae.eval.upernet", "ddae.eval.segment", "ddae.eval.predict"),
    *("ddae.eval.recipes_tokenizer", "ddae.eval.tokenizing"),
    *("ddae.eval.attention", "ddae.eval.attention_pictures", "ddae.eval.gallery"),
    *(
        "ddae.step",
        "ddae.train",
        "ddae.replay",
        "ddae.eval.packed",
        "ddae.eval.tables",
        "ddae.eval.ablate",
        "ddae.doctor",
        "ddae.cli",
        "ddae.rung",
        "ddae.ladder",
    ),
    "ddae",
]
HEAVY = {  # package -> the files that may import it
    "deepspeed": {"ddae.engine", "ddae.rung"},  # the latter as it comes, for what is measured against
    "mlflow": {"ddae.tracker"},
    "nvidia": {"ddae.data.dali"},
    "matplotlib": {
        "ddae.figures",
        "ddae.report",
        "ddae.benchmark",
        "ddae.ladder",
        "ddae.eval.pictures",
        "ddae.eval.attention_pictures",
        "ddae.eval.gallery",
    },
    "tyro": {"ddae.cli"},
    "webdataset": {"ddae.data.shard_writer"},
    "timm": {
        "ddae.model.vit",
        "ddae.naive",
        "ddae.eval.augment",
        "ddae.eval.tokenizing",
        "ddae.eval.heads",
        "ddae.eval.predict",
    },
    "PIL": {
        "ddae.doctor",
        *("ddae.eval.augment", "ddae.eval.predict", "ddae.eval.pictures", "ddae.eval.scenes"),
        *("ddae.data.pillow", "ddae.data.digits"),
        "ddae.sharding.inspection",
        "ddae.sharding.ade20k",
        "ddae.benchmark",
    },
    "fsspec": {"ddae.data.remote"},
    "aiohttp": {"ddae.data.remote"},
    "tqdm": {"ddae.sharding.workers", "ddae.sharding.ade20k"},
    "sklearn": {"ddae.data.digits"},
    "scipy": {"ddae.sharding.devkit", "ddae.sharding.ade20k"},
    "segmentation_models_pytorch": {"ddae.eval.upernet"},
    "safetensors": {
        "ddae.eval.upernet",
        "ddae.weights",
        "ddae.foreign",
        "ddae.slices",
        "ddae.checkpoint",
        "ddae.dump",
        "ddae.replay",
    },
    "triton": {"ddae_kernels.triton_impl"},
}


def sources():
    for base in (ROOT, ROOT / "kernels"):
        for path in sorted(base.glob("ddae*/**/*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            if name not in ("ddae.data", "ddae.model", "ddae.sharding", "ddae.eval"):  # empty
                yield name, path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in ORDER else str(node.module) for name in named)


@pytest.mark.parametrize("name, path", list(sources()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_imports_only_from_above(name, path):
    place = ORDER.index(name)
    for imported in imports(path):
        if imported.split(".")[0] in ("ddae", "ddae_kernels"):
            if imported == "ddae":
                continue
            assert imported in ORDER, imported
            assert ORDER.index(imported) < place, f"{name} imports {imported}, which stands below it"
        for package, allowed in HEAVY.items():
            assert imported.split(".")[0] != package or name in allowed, f"{name} imports {package}"


def test_the_kernels_need_torch_and_triton_alone():
    for name, path in sources():
        if name.startswith("ddae_kernels"):
            packages = {imported.split(".")[0] for imported in imports(path)}
            assert packages - sys.stdlib_module_names <= {"torch", "triton", "ddae_kernels"}, (name, packages)


def test_no_file_outgrows_its_room():
    paths = [path for _, path in sources()] + list(ROOT.glob("launch/*.py")) + list(ROOT.glob("data_prep/*.py"))
    for path in paths:
        assert len(path.read_text().splitlines()) <= 600, path
        assert path.stem not in ("utils", "misc", "common", "helpers", "base")
