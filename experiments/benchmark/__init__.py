"""What guidance costs: seconds, memory, operations."""
