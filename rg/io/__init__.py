"""What is read from files, bounded and checked, and written to them."""
