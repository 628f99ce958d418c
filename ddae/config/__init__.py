"""Every setting: dataclasses, presets and recipes, the DeepSpeed JSON, the command line."""
