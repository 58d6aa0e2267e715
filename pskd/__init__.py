"""PSKD: progressive self-knowledge distillation for image classifiers, at scale."""
