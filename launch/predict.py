"""What a fine-tuned classifier takes pictures for.

python launch/predict.py --classifier runs/demo/finetune photo.jpg
"""

import argparse
from pathlib import Path

from ddae.errors import command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True, type=Path, help="folder of a finished fine-tuning")
    parser.add_argument("photos", nargs="+", type=Path, help="picture files")
    words = parser.parse_args()
    from ddae.eval.predict import predict  # seconds to import

    for photo, guesses in predict(words.classifier, words.photos).items():
        print(f"{photo}: {', '.join(f'{guess.name} {guess.probability:.0%}' for guess in guesses)}")


if __name__ == "__main__":
    command("predict", main)
