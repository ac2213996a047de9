"""Where a model is rotated, and what each row of a batch uses there."""
