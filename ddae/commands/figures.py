"""Draw the paper's figures of one encoder, or of several side by side.

python launch/figures.py runs/demo
python launch/figures.py DDAE=runs/vit_b MAE=mae_pretrain_vit_base.pth --data data/imagenet --out compared

Distance maps of masked patches (Fig. 2), attention maps of the cls token (Figs. 3, 7), attention distance by head
(Fig. 4), betas (Figs. 5, 6) and reconstructions go to PNG files and report.html, attention statistics to results.json.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="+", help="PATH or NAME=PATH: run folders, exports, published files")
    parser.add_argument("--data", default="", help="shards of images (default: those of the first run)")
    parser.add_argument("--masks", default="", help="shards with masks, for the IoU of attention and foreground")
    parser.add_argument("--classes", type=int, default=0, help="of the masks, if the shards do not name them")
    kinds = "distance, attention, locality, betas, reconstructions"
    parser.add_argument("--what", nargs="+", default=(), help=f"{kinds} (default: all)")
    parser.add_argument("--block", type=int, default=3, help="block whose attention is drawn (default: 3)")
    parser.add_argument("--images", type=int, default=128, help="images for attention statistics (default: 128)")
    parser.add_argument("--shown", type=int, default=6, help="images in the figures (default: 6)")
    parser.add_argument("--svg", action="store_true", help="write SVG files beside the PNG files")
    parser.add_argument("--out", type=Path, help="output folder (default: gallery/ in the first run)")
    args = parser.parse_args()
    from ddae.config.evaluation import task_folder  # takes seconds
    from ddae.eval.paper_figures import FigureSettings, draw_paper_figures
    from ddae.report.html import report_page

    out = args.out or Path(task_folder(args.encoders[0].rpartition("=")[2], "gallery"))
    settings = FigureSettings(args.what, args.block, args.images, args.shown, args.svg, args.masks, args.classes)
    print(json.dumps(draw_paper_figures(args.encoders, args.data, out, settings), indent=2))
    print(f"figures: {report_page(out)}")
