"""The paper: distances, betas, branches, EMA teacher, the whole pretraining model."""
