"""Somebody else's model, made cheap."""
