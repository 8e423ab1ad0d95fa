"""What is counted and timed: stages of a batch, the literal path beside them, sizes of published models."""
