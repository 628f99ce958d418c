"""Metrics of predicted classes. C: number of classes."""

import torch
from torch import Tensor
from torch.nn import functional as F


def count_confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count images or pixels by true class (rows) and predicted class (columns), int64 of equal shape -> [C, C].

    Those whose label is not below C are not counted.
    """
    valid = labels < num_classes
    pairs = labels[valid] * num_classes + predicted[valid]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def sum_metrics(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of images, of correct ones (top-1, top-5), and the sum of their cross-entropies: float32 [4].

    logits [B, C], labels int64 [B].
    """
    is_top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss.new_tensor(len(labels)), is_top[:, 0].sum(), is_top.sum(), loss])


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Return the IoU of each class, float [C, C] -> [C]; NaN for a class that is neither labelled nor predicted."""
    correct = confusion.diagonal()
    return correct / (confusion.sum(0) + confusion.sum(1) - correct)


def segmentation_scores(confusion: Tensor) -> dict[str, float]:
    """Return mean IoU, mean class accuracy and pixel accuracy in percent. confusion: int64 [C, C].

    The means are over the classes that occur.
    """
    confusion = confusion.double()
    correct = confusion.diagonal()
    return {
        "miou": 100 * float(intersection_over_union(confusion).nanmean()),
        "class_accuracy": 100 * float((correct / confusion.sum(1)).nanmean()),
        "pixel_accuracy": 100 * float(correct.sum() / confusion.sum()),
    }


def majority_class_scores(confusion: Tensor) -> dict[str, float]:
    """Return segmentation_scores() of predicting the most frequent class for every pixel."""
    pixels = confusion.sum(1)
    constant = torch.zeros_like(confusion)
    constant[:, pixels.argmax()] = pixels
    return segmentation_scores(constant)
