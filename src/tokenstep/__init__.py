"""Plain ViT segmenters made cheap: superpatch merging and early exits (STEP)."""

__version__ = "0.1.0"
