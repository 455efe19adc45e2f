"""Scripts and configurations behind each shipped weight, table and figure."""
