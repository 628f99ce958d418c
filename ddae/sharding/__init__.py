"""Converts archives and folders of images to shards: scan sources, inspect and convert images, write, verify."""
