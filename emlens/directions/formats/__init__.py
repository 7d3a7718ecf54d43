"""Directions in the formats of others: read, written, and turned into their objects."""
