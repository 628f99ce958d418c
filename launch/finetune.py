"""Fine-tune an encoder on labelled shards."""

import require_packages  # noqa: F401

from ddae.commands.finetune import main

if __name__ == "__main__":
    main()
