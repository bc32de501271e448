"""What every method is built on; nothing here is imported by users."""
