"""Which implementation and which block sizes a call gets: plan (dataclass, heuristic), store (measured JSON tables)."""
