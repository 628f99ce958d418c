"""What an encoder has learnt, by its nearest neighbours: no training, seconds, and a look at its health without labels.

python launch/knn.py --encoder runs/demo --data data/imagenet

The training split is the bank and the validation split asks; a part of the training split chooses block and pooling.
Prints the accuracy beside untrained weights, raw pixels and chance, and leaves results.json and pictures in the run's
folder knn/, and in its report.html.
"""

import argparse
from pathlib import Path

from ddae.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="a run folder or an export folder")
    parser.add_argument("--data", required=True, help="shards with classes: a folder with splits train and val")
    parser.add_argument("--k", type=int, default=20, help="neighbours that vote")
    parser.add_argument("--temperature", type=float, default=0.07, help="of their weights")
    parser.add_argument("--batch", type=int, default=256, help="images at a time")
    parser.add_argument("--workers", type=int, default=4, help="processes that decode")
    parser.add_argument("--tracker", choices=("mlflow", "jsonl"), default="mlflow", help="where the numbers go, too")
    parser.add_argument("--out", type=Path, help="folder of the results; left out: knn in the encoder's run")
    parser.add_argument("--grey", action="store_true", help="images in grey, of equal mean and contrast")
    parser.add_argument("--untrained_seed", type=int, default=0, help="of the untrained encoder beside it")
    parser.add_argument("--cache", default="data/cache", help="folder that remembers results of untrained encoders")
    args = parser.parse_args()
    from ddae.config.evaluation import task_folder
    from ddae.eval.knn import Settings, evaluate, show  # seconds to import

    out = args.out or Path(task_folder(args.encoder, "knn"))
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    print(show(evaluate(args.encoder, args.data, out, settings, args.tracker)))


if __name__ == "__main__":
    run_command("knn", main)
