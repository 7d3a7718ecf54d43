"""What a training went through: its path, read back and compared with others."""
