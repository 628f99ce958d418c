"""Train a tokenizer for the presets beitv2 and dds_beitv2: a codebook that reconstructs the features of a teacher."""

import require_packages  # noqa: F401

from ddae.commands.train_tokenizer import main

if __name__ == "__main__":
    main()
