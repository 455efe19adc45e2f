"""How well heads read and guide."""
