"""The card of the embedded model."""
