"""Evaluate an encoder by k-nearest neighbours, without training, and measure its features' effective rank.

python launch/knn.py --encoder runs/demo --data data/imagenet

The training split is the bank and the validation split the queries. A part of the training split selects block and
pooling. Prints the accuracy beside untrained weights, raw pixels and chance. Writes results.json and figures to knn/ in
the run's folder, and adds them to its report.html.
"""

import argparse
from pathlib import Path
from typing import get_args

from ddae.config.base import TrackerKind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="run folder or export folder")
    parser.add_argument("--data", required=True, help="folder of shards with classes and the splits train and val")
    parser.add_argument("--k", type=int, default=20, help="number of neighbours (default: 20)")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the neighbours' weights (default: 0.07)")
    parser.add_argument("--batch", type=int, default=256, help="images per forward pass (default: 256)")
    parser.add_argument("--workers", type=int, default=4, help="decoding processes (default: 4)")
    parser.add_argument("--tracker", choices=get_args(TrackerKind), default="mlflow", help="default: mlflow")
    parser.add_argument("--out", type=Path, help="output folder (default: knn/ in the encoder's run)")
    parser.add_argument("--grey", action="store_true", help="convert images to grey with equal mean and contrast")
    parser.add_argument("--untrained_seed", type=int, default=0, help="seed of the untrained encoder (default: 0)")
    parser.add_argument("--cache", default="data/cache", help="folder with cached results of untrained encoders")
    args = parser.parse_args()
    from ddae.config.evaluation import task_folder  # takes seconds
    from ddae.eval.knn import Settings, evaluate, format_results

    out = args.out or Path(task_folder(args.encoder, "knn"))
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    print(format_results(evaluate(args.encoder, args.data, out, settings, args.tracker)))
