"""Classify images with a fine-tuned classifier, or segment them.

python launch/predict.py --classifier runs/demo/finetune photo.jpg
python launch/predict.py --segmenter runs/demo/segment --out seen photo.jpg     # seen/photo_classes.png
"""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--classifier", type=Path, help="folder of a finished fine-tuning run")
    which.add_argument("--segmenter", type=Path, help="folder of a finished segmentation run")
    parser.add_argument("--out", type=Path, help="folder for segmented images (default: seen)")
    parser.add_argument("photos", nargs="+", type=Path, help="image files")
    args = parser.parse_args()
    if args.classifier and args.out:
        parser.error("--out is for --segmenter; a classifier writes no images")
    out = args.out or Path("seen")
    from ddae.eval.predict import classify_images, segment_images  # takes seconds

    if args.classifier:
        predictions = classify_images(args.classifier, args.photos)
    else:
        predictions = segment_images(args.segmenter, args.photos, out)
    for photo, classes in predictions.items():
        print(f"{photo}: {', '.join(f'{each.name} {each.share:.0%}' for each in classes)}")
    if args.segmenter:
        print(f"segmented images: {out}")
