"""Encoder weights in and out: own exports, published files, timm, ONNX, model cards."""
