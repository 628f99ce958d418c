"""Judge an encoder without labels: beside untrained weights and raw pixels, on photos that it was not trained on.

ddae report --encoder runs/mine

Two-crop retrieval: how often a crop finds the other crop of its photo among those of all photos. Effective rank and
standard deviation of the features. The error of reconstructed masked pixels beside that of each patch's mean colour.
Writes results.json and a figure with the nearest neighbours of a few photos to report/ in the run's folder, and adds
both to its report.html.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ddae.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="run folder, export folder or published file")
    parser.add_argument("--data", default="", help="a folder of images, or shards (default: those of the run)")
    parser.add_argument("--images", type=int, default=1000, help="at most so many images (default: 1000)")
    parser.add_argument("--out", type=Path, help="output folder (default: report/ in the encoder's run)")
    args = parser.parse_args()
    if args.images < 2:
        raise UserError(f"--images is {args.images}; expected at least 2. Correct it.")
    from ddae.config.evaluation import task_folder  # takes seconds
    from ddae.config.pretrain import DataConfig, PretrainConfig
    from ddae.eval.without_labels import evaluate, format_results
    from ddae.report.html import report_page
    from ddae.sharding.photos import is_photo_folder, with_shards

    out, data = args.out or Path(task_folder(args.encoder, "report")), args.data
    if not data:
        config_file = Path(args.encoder) / "config.json"
        if not config_file.exists() or not (Path(args.encoder) / "metrics.jsonl").exists():
            raise UserError(f"{args.encoder} is no run, so that its images are unknown. Pass some as --data.")
        data = PretrainConfig.read(config_file).data.sources[0]
    elif is_photo_folder(data):
        config = replace(PretrainConfig(), data=DataConfig(train=data))
        data = str(with_shards(config, config.model.image_size).data.train)
    print(format_results(evaluate(args.encoder, data, out, args.images)))
    print(f"figures: {report_page(out)}")
