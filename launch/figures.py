"""The paper's figures, of one encoder or of several side by side.

python launch/figures.py runs/demo
python launch/figures.py DDAE=runs/vit_b MAE=mae_pretrain_vit_base.pth --data data/imagenet --out compared

Distances of masked patches (Fig. 2), attention of the cls token (3, 7), attention distance of every head (4), betas
(5, 6) and reconstructions, as pictures and in report.html; how local the deep blocks look as numbers in results.json.
"""

import argparse
import json
from pathlib import Path

from ddae.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="+", help="PATH or NAME=PATH: run folders, exports, published files")
    parser.add_argument("--data", default="", help="shards of images; left out: the first run's own")
    parser.add_argument("--masks", default="", help="shards with masks, to hold attention against the foreground")
    parser.add_argument("--classes", type=int, default=0, help="how many the masks have, where they do not name them")
    parser.add_argument("--what", nargs="+", default=(), help="distance, attention, locality, betas, reconstructions")
    parser.add_argument("--block", type=int, default=3, help="whose attention is shown")
    parser.add_argument("--images", type=int, default=128, help="over which attention is measured")
    parser.add_argument("--shown", type=int, default=6, help="images that are shown")
    parser.add_argument("--svg", action="store_true", help="pictures as SVG, too")
    parser.add_argument("--out", type=Path, help="folder; left out: figures of the first run, runs/NAME/gallery")
    args = parser.parse_args()
    from ddae.config.evaluation import task_folder
    from ddae.eval.paper_figures import Settings, gallery  # seconds to import
    from ddae.report.html import page_of

    out = args.out or Path(task_folder(args.encoders[0].rpartition("=")[2], "gallery"))
    amounts = args.block, args.images, args.shown, args.svg, args.masks, args.classes
    print(json.dumps(gallery(args.encoders, args.data, out, Settings(args.what, *amounts)), indent=2))
    print(f"pictures:  {page_of(out)}")


if __name__ == "__main__":
    run_command("figures", main)
