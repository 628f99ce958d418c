"""Parts of a run: step, optimizer groups, schedules, metrics, FLOPs, non-finite guard, tracker, run directory."""
