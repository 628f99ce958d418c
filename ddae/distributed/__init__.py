"""Processes and sharded state: ranks, the DeepSpeed engine, checkpoints, preemption signals, the watchdog."""
