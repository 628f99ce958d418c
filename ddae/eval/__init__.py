"""Downstream tasks: k-NN, linear probe, fine-tuning, segmentation, attention, the paper's figures."""
