"""The paper from end to end: what its tables and figures need, made where it is missing, and drawn."""
