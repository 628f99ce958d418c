"""Pretrain a Vision Transformer without labels."""

import require_packages  # noqa: F401

from ddae.commands.pretrain import main

if __name__ == "__main__":
    main()
