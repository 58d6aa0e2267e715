"""Training methods: one short module each, one interface (`interface.py`), one registry."""
