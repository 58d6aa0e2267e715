"""Whether machines can run a training: looked at, and said on one page."""
