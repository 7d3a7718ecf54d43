"""Models that run elsewhere (NDIF): what travels there, and the trace that runs there."""
