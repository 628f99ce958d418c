"""What a fine-tuned classifier takes pictures for, or where a segmenter sees what.

python launch/predict.py --classifier runs/demo/finetune photo.jpg
python launch/predict.py --segmenter runs/demo/segment --out seen photo.jpg     # seen/photo_classes.png
"""

import argparse
from pathlib import Path

from ddae.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--classifier", type=Path, help="folder of a finished fine-tuning")
    which.add_argument("--segmenter", type=Path, help="folder of a finished segmentation")
    parser.add_argument("--out", type=Path, help="folder for a segmenter's pictures; left out: seen")
    parser.add_argument("photos", nargs="+", type=Path, help="picture files")
    args = parser.parse_args()
    if args.classifier and args.out:
        parser.error("--out is for a --segmenter: a classifier draws nothing")
    out = args.out or Path("seen")
    from ddae.eval.predict import predict, segment  # seconds to import

    photos = args.photos
    found = predict(args.classifier, photos) if args.classifier else segment(args.segmenter, photos, out)
    for photo, guesses in found.items():
        print(f"{photo}: {', '.join(f'{guess.name} {guess.share:.0%}' for guess in guesses)}")
    if args.segmenter:
        print(f"pictures: {out}")


if __name__ == "__main__":
    run_command("predict", main)
