"""A decoded crop to the size that the model sees. Both back ends end in it on a CPU, so they differ by their JPEG
decoders alone; it is twice to four times as fast as Pillow's and DALI's own."""

import numpy as np
import torch
from torch.nn import functional as F


def resize(crop: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [3, S, S], bicubic with antialiasing as torchvision's, flipped left to right or not."""
    planes = torch.from_numpy(crop).permute(2, 0, 1)[None]  # torch is fast where the colours of a pixel lie together
    resized = F.interpolate(planes, (size, size), mode="bicubic", antialias=True)[0]
    return (resized.flip(-1) if flip else resized).numpy()
