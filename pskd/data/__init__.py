"""Data: what the samples are (`catalog`), and how ids become a `Batch` (`arrays`)."""
