"""The paper's tables as experiments: rows, running them, the resulting table."""
