"""Train linear classifiers on a frozen encoder's features: several blocks and both poolings in one run."""

import require_packages  # noqa: F401

from ddae.commands.linear_probe import main

if __name__ == "__main__":
    main()
