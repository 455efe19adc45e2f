"""The networks that judge images of the embedded world."""
