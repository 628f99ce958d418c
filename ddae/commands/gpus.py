"""The GPUs of this machine, for what is decided before training starts."""

import os


def num_gpus() -> int:
    """Return the number of GPUs that this process may use. Where there is none, torch is not imported."""
    if not any(name.startswith("nvidia") and name[6:].isdigit() for name in os.listdir("/dev")):
        return 0
    import torch  # takes seconds

    return torch.cuda.device_count()
