"""Fine-tune an encoder with UperNet for semantic segmentation, on shards with masks."""

import require_packages  # noqa: F401

from ddae.commands.segment import main

if __name__ == "__main__":
    main()
