"""Commands around a run: plan, doctor, replay, benchmarks."""
