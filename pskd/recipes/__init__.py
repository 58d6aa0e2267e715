"""Recipes: one short YAML each, selected by name."""
