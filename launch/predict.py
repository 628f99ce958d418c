"""What a fine-tuned classifier takes pictures for, or where a segmenter sees what.

python launch/predict.py --classifier runs/demo/finetune photo.jpg
python launch/predict.py --segmenter runs/demo/segment --out seen photo.jpg     # seen/photo_classes.png
"""

import argparse
from pathlib import Path

from ddae.errors import command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--classifier", type=Path, help="folder of a finished fine-tuning")
    which.add_argument("--segmenter", type=Path, help="folder of a finished segmentation")
    parser.add_argument("--out", type=Path, help="folder for a segmenter's pictures; left out: seen")
    parser.add_argument("photos", nargs="+", type=Path, help="picture files")
    words = parser.parse_args()
    if words.classifier and words.out:
        parser.error("--out is for a --segmenter: a classifier draws nothing")
    out = words.out or Path("seen")
    from ddae.eval.predict import predict, segment  # seconds to import

    photos = words.photos
    found = predict(words.classifier, photos) if words.classifier else segment(words.segmenter, photos, out)
    for photo, guesses in found.items():
        print(f"{photo}: {', '.join(f'{guess.name} {guess.share:.0%}' for guess in guesses)}")
    if words.segmenter:
        print(f"pictures: {out}")


if __name__ == "__main__":
    command("predict", main)
